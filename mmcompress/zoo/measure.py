"""How often a zoo model answers right: all tokens, greedy, several questions behind one reading of an item.

A question counts as right when the model's first choice is the expected token at every place of the answer, its end included:
exactly what greedy `generate` would write. Questions of one item are not independent, so the interval resamples items.
`python -m mmcompress.zoo.measure NAME RUN BLIND_RUN` makes a finished run the shipped parts: measures both, writes card.json.
`python -m mmcompress.zoo.measure NAME RUN --again` notes in the card how a second run came out; the shipped parts stay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmcompress.compressor import num_kept
from mmcompress.eval.loop import bootstrap
from mmcompress.eval.tasks import Scene, Task, create_task
from mmcompress.zoo import _build, card_file, card_of, parts_dir
from mmcompress.zoo.reader import Reader
from mmcompress.zoo.recipes import RECIPES, TASKS, sense_of
from mmcompress.zoo.sense import NEWLINE, Seen, hidden
from mmcompress.zoo.wheels import WHEELS

FILES = ("tower.safetensors", "projector.safetensors", "lora.safetensors")
TENTH = 0.1
"""Share of the tokens in two more measurements: drawn at random, and those that show the answer before others."""


def kept(seen: Seen, keep_ratio: float, rng: np.random.Generator, evidence: bool) -> torch.Tensor:
    """Tokens that are left of an item, ascending: a random share, or first those that show what is asked for; newlines stay."""
    newline = seen.order[:, 0] == NEWLINE
    tokens = (~newline).nonzero()[:, 0]
    order = torch.from_numpy(rng.permutation(len(tokens)))
    if evidence:
        order = order[torch.argsort(~seen.shows[tokens[order]], stable=True)]
    chosen = tokens[order[: num_kept(len(tokens), keep_ratio)]]
    return torch.cat([chosen, newline.nonzero()[:, 0]]).sort().values


def until(of: Task, split: str, n: int, seed: int) -> Iterator[Scene]:
    """Scenes of a split until they hold n questions (fewer where it ends)."""
    made = 0
    for scene in of.scenes(split, n, seed):
        yield scene
        made += len(scene.questions)
        if made >= n:
            break


def look(reader: Reader, task: Task, n: int, seed: int, split: str = "test", blind: bool = False) -> list[Seen]:
    """Items of a split as the model sees them, until they hold n questions."""
    out = []
    with torch.inference_mode(), tqdm(total=n, desc=f"look at {task.name}", mininterval=10, disable=blind) as bar:
        for scene in until(task, split, n, seed):
            out.append(hidden(scene) if blind else reader.sense.see(scene))
            bar.update(len(scene.questions))
    return out


@torch.inference_mode()
def answer(reader: Reader, items: list[Seen], seed: int, keep_ratio: float = 1.0, evidence: bool = False) -> dict:
    """Accuracy (ratio), its 95 % bootstrap interval over items, the numbers of questions and items, and accuracy by topic.

    keep_ratio: share of the tokens that is left, drawn at random or, with `evidence`, first those that show what is asked for.
    """
    rng = np.random.default_rng(seed)
    rows: list[list[bool]] = []
    topics: dict[str, list[bool]] = {}
    for seen in tqdm(items, desc="answer", mininterval=10):
        keep = kept(seen, keep_ratio, rng, evidence) if seen.length else None
        _, right = reader(seen, seen.questions, keep)
        rows.append(right)
        for question, ok in zip(seen.questions, right, strict=True):
            topics.setdefault(question.topic, []).append(ok)
    return summary(rows, seed, topics)


def measure(name: str, model: Any, processor: Any, task: str, n: int, seed: int = 0, blind: bool = False) -> dict:
    """`answer` for at least n test questions of a task (fewer where the split ends), with all tokens or with none."""
    of = create_task(task)
    if name == "asr":
        return transcribe(model, processor, of, n, seed)
    reader = Reader(sense_of(name, model, processor))
    return answer(reader, look(reader, of, n, seed, blind=blind), seed)


def summary(rows: list[list[Any]], seed: int, topics: dict[str, list[bool]]) -> dict:
    """The figures of `measure` from the scores of each item's questions."""
    flat = [float(score) for r in rows for score in r]
    item = [i for i, r in enumerate(rows) for _ in r]
    return {
        "accuracy": round(float(np.mean(flat)), 4),
        "interval": [round(x, 4) for x in bootstrap(flat, item, seed)],
        "n": len(flat),
        "items": len(rows),
        "by_topic": {k: round(float(np.mean(v)), 4) for k, v in sorted(topics.items())},
    }


def guess(of: Task, n: int, seed: int, learned: int = 4000) -> dict:
    """`answer` for one who never sees the item, but knows of every question's wording (of its topic, where the wording is new)
    the answer that at least `learned` training questions (fewer where the split ends) give most often."""
    said: dict[str, Counter[str]] = {}
    for scene in until(of, "train", learned, seed):
        for question in scene.questions:
            for key in (question.prompt, "topic " + question.topic):
                said.setdefault(key, Counter())[question.answer] += 1
    rows: list[list[bool]] = []
    topics: dict[str, list[bool]] = {}
    for scene in until(of, "test", n, seed):
        rows.append([])
        for question in scene.questions:
            known = said.get(question.prompt) or said.get("topic " + question.topic) or Counter([""])
            rows[-1].append(known.most_common(1)[0][0] in question.answers)
            topics.setdefault(question.topic, []).append(rows[-1][-1])
    return summary(rows, seed, topics)


def transcribe(model: Any, processor: Any, task: Any, n: int, seed: int) -> dict:
    """Accuracy of a speech recogniser: 1 - word error rate by the task's own score, through `generate`."""
    from mmcompress import create
    from mmcompress.ask import Question, ask, prepare

    scores = []
    for sample in task.samples("test", n, seed):
        inputs = prepare(model, processor, Question(sample.prompt, audio=[sample.item]))
        scores.append([float(task.score(sample, ask(model, processor, inputs, create("none"), 200).text))])
    return summary(scores, seed, {})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.zoo.measure", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(TASKS), help="the model")
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run of mmcompress.zoo.train (asr has none)")
    parser.add_argument("blind_run", type=Path, nargs="?", help="folder of a finished run with --blind")
    parser.add_argument("--again", action="store_true", help="RUN repeats the shipped recipe: note its figures, do not ship it")
    parser.add_argument("--n", type=int, default=400, help="test questions of each task (400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="threads (all cores)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="in which the model is measured")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    needs = args.name in RECIPES
    if args.again and not (needs and args.run):
        parser.error(f"--again needs RUN, of one of {', '.join(sorted(RECIPES))}; got {args.name}")
    if needs and not (args.run and (args.blind_run or args.again)):
        parser.error(f"{args.name} needs RUN and BLIND_RUN")
    if not needs and args.run:
        parser.error(f"{args.name} is not trained and takes no RUN, got {args.run}")
    try:
        runs = [_run(run, args.name, blind) for run, blind in ((args.run, False), (args.blind_run, True)) if run]
        if args.again and (runs[0]["resumed"] or runs[0]["scale"] != 1):
            raise ValueError(f"--again needs a RUN of the whole recipe in one call, got {args.run}")
    except ValueError as error:
        parser.error(str(error))
    if args.again:
        noted = card_of(args.name)
        args.seed, args.dtype = noted["measure_seed"], noted["measure_dtype"]
        asked = {task: got["n"] for task, got in noted["measured"].items()}  # the card's own questions
        noted["again"] = {"trained": runs[0], **_measured(args, args.run, asked)}
        card_file(args.name).write_text(json.dumps(noted, indent=1) + "\n")
        return
    folder = parts_dir(args.name)
    folder.mkdir(parents=True, exist_ok=True)
    asked = dict.fromkeys(TASKS[args.name], args.n)
    card: dict[str, Any] = _measured(args, args.run, asked, tenths=args.name != "asr")
    if needs:
        card["trained"], card["trained_blind"] = runs
        card["blind"] = _measured(args, args.blind_run, asked, blind=True)["measured"]
        for file in FILES:
            if (args.run / file).is_file():
                shutil.copyfile(args.run / file, folder / file)
    tasks = TASKS[args.name]
    card |= {
        "measure_seed": args.seed,
        "measure_dtype": args.dtype,
        "chance": {t: round(create_task(t).chance, 4) for t in tasks},
        "guess": {t: guess(create_task(t), args.n, args.seed) for t in tasks if args.name != "asr"},
        "sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))},
        "wheels": {
            w.part: {"wheel": f"{w.name}=={w.version}", "licence": w.licence, "sha256": w.sha256} for w in WHEELS.values()
        },
    }
    unseen = [card.get("blind", {}), card["guess"]]
    card["not_learned"] = [  # without eyes it would do as well
        t
        for t, got in card["measured"].items()
        if got["interval"][0] <= max(card["chance"][t], *(by[t]["accuracy"] for by in unseen if t in by), 0.0)
    ]
    card_file(args.name).write_text(json.dumps(card, indent=1) + "\n")
    for task in tasks:
        got, none = card["measured"][task], card.get("blind", {}).get(task, {"accuracy": float("nan")})
        print(
            f"{task:20} {got['accuracy']:.3f} {got['interval']} n {got['n']}  blind {none['accuracy']:.3f}  {got['by_topic']}"
        )


def _run(folder: Path, name: str, blind: bool) -> dict[str, Any]:
    """What a finished run says of itself. Raises ValueError where it is not one of this model, blind or not."""
    file = folder / "run.json"
    if not file.is_file():
        raise ValueError(f"{'BLIND_RUN' if blind else 'RUN'} must be the folder of a finished run, got {folder}")
    record = json.loads(file.read_text())
    if (record["name"], record["blind"]) != (name, blind):
        raise ValueError(
            f"{'BLIND_RUN' if blind else 'RUN'} must be a run of {name} {'with' if blind else 'without'} --blind, got one of "
            f"{record['name']} {'with' if record['blind'] else 'without'} it: {folder}"
        )
    return record


def _measured(
    args: argparse.Namespace, run: Path | None, asked: dict[str, int], blind: bool = False, tenths: bool = False
) -> dict[str, dict[str, dict]]:
    """Of each task, so many questions `asked`: "measured" and, with `tenths`, "random" and "evidence" with a tenth of the
    tokens; kept in the run's folder, done once."""
    file = None if run is None else run / f"measured-{args.name}.json"
    found: dict[str, dict[str, dict]] = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    of = {"seed": args.seed, "dtype": args.dtype, "asked": asked, "tenths": tenths, "parts": {}}
    if run is not None:
        of["parts"] = {f: hashlib.sha256((run / f).read_bytes()).hexdigest() for f in FILES if (run / f).is_file()}
    if found.pop("of", None) != of:  # of other parts, or other questions
        found = {}
    shipped = parts_dir(args.name)
    model, processor = _build(args.name, None, run or (shipped if any(shipped.glob("*.safetensors")) else None))
    model.to(getattr(torch, args.dtype))
    for task, n in asked.items():
        if task in found.get("measured", {}):
            continue
        if not tenths:
            got = {"measured": measure(args.name, model, processor, task, n, args.seed, blind)}
        else:
            reader = Reader(sense_of(args.name, model, processor))
            items = look(reader, create_task(task), n, args.seed)
            got = {"measured": answer(reader, items, args.seed)}
            for how in ("random", "evidence"):
                got[how] = answer(reader, items, args.seed, TENTH, how == "evidence")
        for how, figures in got.items():
            found.setdefault(how, {})[task] = figures
        if file is not None:
            file.write_text(json.dumps({"of": of, **found}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
