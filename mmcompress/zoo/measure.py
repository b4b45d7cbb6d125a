"""How often a zoo model answers right: all tokens, greedy, several questions behind one reading of an item.

A question counts as right when the model's first choice is the expected token at every place of the answer, its end included:
exactly what greedy `generate` would write. Questions of one item are not independent, so the interval resamples items.
`python -m mmcompress.zoo.measure NAME RUN BLIND_RUN` makes a finished run the shipped parts: measures both, writes card.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmcompress.eval.tasks import create_task
from mmcompress.zoo import _build, parts_dir
from mmcompress.zoo.reader import Reader
from mmcompress.zoo.recipes import RECIPES, TASKS, sense_of
from mmcompress.zoo.sense import hidden
from mmcompress.zoo.wheels import WHEELS

FILES = ("tower.safetensors", "projector.safetensors", "lora.safetensors")


@torch.inference_mode()
def measure(
    name: str, model: Any, processor: Any, task: str, n: int, seed: int = 0, split: str = "test", blind: bool = False
) -> dict:
    """Accuracy (ratio), its 95 % bootstrap interval over items, the number of questions (at least n where the split has as
    many) and of items, and accuracy by topic."""
    rows: list[list[bool]] = []
    topics: dict[str, list[bool]] = {}
    of, made = create_task(task), 0
    if name == "asr":
        return transcribe(model, processor, of, n, seed)
    reader = Reader(sense_of(name, model, processor))
    with tqdm(total=n, desc=task + (" blind" if blind else ""), mininterval=10) as bar:
        for scene in of.scenes(split, n, seed):
            seen = hidden(scene) if blind else reader.sense.see(scene)
            _, right = reader(seen, seen.questions, None if blind else torch.arange(len(seen.order)))
            rows.append(right)
            for question, ok in zip(seen.questions, right, strict=True):
                topics.setdefault(question.topic, []).append(ok)
            made += len(right)
            bar.update(len(right))
            if made >= n:
                break
    low, high = interval(rows, seed)
    return {
        "accuracy": round(float(np.mean([ok for r in rows for ok in r])), 4),
        "interval": [round(low, 4), round(high, 4)],
        "n": made,
        "items": len(rows),
        "by_topic": {k: round(float(np.mean(v)), 4) for k, v in sorted(topics.items())},
    }


def transcribe(model: Any, processor: Any, task: Any, n: int, seed: int) -> dict:
    """Accuracy of a speech recogniser: 1 - word error rate by the task's own score, through `generate`."""
    from mmcompress import create
    from mmcompress.ask import Question, ask, prepare

    scores = []
    for sample in task.samples("test", n, seed):
        inputs = prepare(model, processor, Question(sample.prompt, audio=[sample.item]))
        scores.append([float(task.score(sample, ask(model, processor, inputs, create("none"), 200).text))])
    low, high = interval(scores, seed)
    mean = round(float(np.mean(scores)), 4)
    return {
        "accuracy": mean,
        "interval": [round(low, 4), round(high, 4)],
        "n": len(scores),
        "items": len(scores),
        "by_topic": {},
    }


def interval(rows: list[list[Any]], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval over items of the mean; each item is a list of scores."""
    rng = np.random.default_rng(seed)
    good, total = np.array([float(sum(r)) for r in rows]), np.array([len(r) for r in rows])
    picks = rng.integers(len(rows), size=(draws, len(rows)))
    low, high = np.quantile(good[picks].sum(1) / total[picks].sum(1), [0.025, 0.975])
    return float(low), float(high)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.zoo.measure", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(TASKS), help="the model")
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run of mmcompress.zoo.train (asr has none)")
    parser.add_argument("blind_run", type=Path, nargs="?", help="folder of a finished run with --blind")
    parser.add_argument("--n", type=int, default=400, help="test questions of each task (400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="threads (all cores)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="in which the model is measured")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    needs = args.name in RECIPES
    if needs and not (args.run and args.blind_run):
        parser.error(f"{args.name} needs RUN and BLIND_RUN")
    folder = parts_dir(args.name)
    folder.mkdir(parents=True, exist_ok=True)
    card: dict[str, Any] = {"measured": _measured(args, args.run, blind=False)}
    if needs:
        card["trained"] = json.loads((args.run / "run.json").read_text())
        card["trained_blind"] = json.loads((args.blind_run / "run.json").read_text())
        card["blind"] = _measured(args, args.blind_run, blind=True)
        for file in FILES:
            if (args.run / file).is_file():
                shutil.copyfile(args.run / file, folder / file)
    tasks = TASKS[args.name]
    card |= {
        "measure_seed": args.seed,
        "measure_dtype": args.dtype,
        "chance": {t: round(create_task(t).chance, 4) for t in tasks},
        "sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))},
        "wheels": {
            w.part: {"wheel": f"{w.name}=={w.version}", "licence": w.licence, "sha256": w.sha256} for w in WHEELS.values()
        },
    }
    name = "card.json" if args.name == folder.name else f"card-{args.name}.json"
    (folder / name).write_text(json.dumps(card, indent=1) + "\n")
    for task in tasks:
        got, none = card["measured"][task], card.get("blind", {}).get(task, {"accuracy": float("nan")})
        print(
            f"{task:20} {got['accuracy']:.3f} {got['interval']} n {got['n']}  blind {none['accuracy']:.3f}  {got['by_topic']}"
        )


def _measured(args: argparse.Namespace, run: Path | None, blind: bool) -> dict[str, dict]:
    """All tasks; what the run's measured.json already holds is not measured again."""
    file = None if run is None else run / f"measured-{args.name}.json"
    found = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    model, processor = _build(args.name, None, run)
    model.to(getattr(torch, args.dtype))
    for task in TASKS[args.name]:
        if task not in found:
            found[task] = measure(args.name, model, processor, task, args.n, args.seed, blind=blind)
            if file is not None:
                file.write_text(json.dumps(found, indent=1) + "\n")
    return {t: found[t] for t in TASKS[args.name]}


if __name__ == "__main__":
    main()
