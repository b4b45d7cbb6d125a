"""How often a zoo model answers right: full tokens, greedy, several questions behind one reading of a picture.

A question counts as right when the model's first choice is the expected token at every place of the answer, its end included:
exactly what greedy `generate` would write. Questions of one picture are not independent, so the interval resamples pictures.
`python -m mmcompress.zoo.measure image RUN BLIND_RUN` makes a finished run the shipped parts: measures both, writes the card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mmcompress.eval.tasks import Detail, EasyVQA, create_task
from mmcompress.zoo import _build, list_models, parts_dir
from mmcompress.zoo.features import Scene, layout, tower_features
from mmcompress.zoo.train import Reader, kind_of
from mmcompress.zoo.wheels import WHEELS

TASKS = ("easy_vqa", "detail:small", "detail:middle", "detail:large")


def questions(task: str, pictures: int, seed: int = 0) -> list[tuple[Image.Image, list[tuple[str, str]]]]:
    """Test pictures of a task, each with all its questions (six of a detail scene, about ten of easy_vqa)."""
    if task != "easy_vqa":
        scenes = Detail(task.partition(":")[2]).scenes("test", pictures, seed)
        return [(picture, [q for m in marks for q in m.questions]) for picture, marks in scenes]
    return [(picture, marks[0].questions) for picture, marks in EasyVQA().scenes("test", pictures, seed)]


@torch.inference_mode()
def measure(model, processor, task: str, pictures: int, seed: int = 0, blind: bool = False) -> dict:
    """Accuracy (ratio), its 95 % bootstrap interval over pictures, n questions, and accuracy by the kind of answer.

    A detail scene has one digit and one word, but two colours and two shapes, which weigh half: each kind counts the same.
    """
    reader, rows = Reader(model, processor.tokenizer), []
    by_kind: dict[str, list] = {}
    for picture, pairs in tqdm(questions(task, pictures, seed), desc=task + (" blind" if blind else ""), mininterval=10):
        order, _ = layout(model.config, picture.size)
        features = np.zeros((0, 0), np.float16) if blind else tower_features(model, processor, picture).float().numpy()
        scene = Scene(features, order, torch.full((0,), -1), [])
        _, right = reader(scene, pairs, None if blind else torch.arange(len(order)))
        kinds = [kind_of(task.partition(":")[0], answer) for _, answer in pairs]
        rows.append([(float(ok), 0.5 if k in ("colour", "shape") else 1.0) for ok, k in zip(right, kinds, strict=True)])
        for kind, ok in zip(kinds, right, strict=True):
            by_kind.setdefault(kind, []).append(ok)
    low, high = interval(rows, seed)
    flat = np.array([v for r in rows for v in r])
    return {
        "accuracy": round(float(np.average(flat[:, 0], weights=flat[:, 1])), 4),
        "interval": [round(low, 4), round(high, 4)],
        "n": len(flat),
        "pictures": len(rows),
        "by_kind": {k: round(float(np.mean(v)), 4) for k, v in sorted(by_kind.items())},
    }


def question_only(task: str, pictures: int, seed: int = 0) -> float:
    """What the best model without the picture can reach: each question's commonest answer in the train split; else chance."""
    if task != "easy_vqa":
        return create_task(task).chance  # drawn evenly, independent of the question
    seen: dict[str, Counter[str]] = {}
    for _, marks in EasyVQA(64).scenes("train", 4000, seed):
        for question, answer in marks[0].questions:
            seen.setdefault(question, Counter())[answer] += 1
    pairs = [p for _, ps in questions(task, pictures, seed) for p in ps]
    return float(np.mean([q in seen and seen[q].most_common(1)[0][0] == a for q, a in pairs]))


def interval(rows: list[list[tuple[float, float]]], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval over pictures of the weighted mean; each picture is a list of (right, weight)."""
    rng = np.random.default_rng(seed)
    good, total = np.array([sum(v * w for v, w in r) for r in rows]), np.array([sum(w for _, w in r) for r in rows])
    picks = rng.integers(len(rows), size=(draws, len(rows)))
    low, high = np.quantile(good[picks].sum(1) / total[picks].sum(1), [0.025, 0.975])
    return float(low), float(high)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.zoo.measure", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list_models(), help="the model")
    parser.add_argument("run", type=Path, help="folder of a finished run of mmcompress.zoo.train")
    parser.add_argument("blind_run", type=Path, help="folder of a finished run with --blind")
    parser.add_argument("--pictures", type=int, default=36, help="test pictures of each task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    measured = _measure_run(args, args.run, blind=False)
    unseen = _measure_run(args, args.blind_run, blind=True)
    folder, files = parts_dir(args.name), ("projector.safetensors", "lora.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(args.run / file, folder / file)
    card = {
        "trained": json.loads((args.run / "run.json").read_text()),
        "trained_blind": json.loads((args.blind_run / "run.json").read_text()),
        "measured": measured,
        "measure_seed": args.seed,
        "blind": unseen,
        "question_only": {t: round(question_only(t, args.pictures, args.seed), 4) for t in TASKS},
        "chance": {t: round(create_task(t).chance, 4) for t in TASKS},
        "sha256": {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in files},
        "wheels": {
            w.part: {"wheel": f"{w.name}=={w.version}", "licence": w.licence, "sha256": w.sha256} for w in WHEELS.values()
        },
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    for task in TASKS:
        got, none = measured[task], unseen[task]
        print(f"{task:14} {got['accuracy']:.3f} {got['interval']} n {got['n']}  blind {none['accuracy']:.3f}  {got['by_kind']}")


def _measure_run(args: argparse.Namespace, run: Path, blind: bool) -> dict[str, dict]:
    """All tasks; what the run's measured.json already holds is not measured again."""
    file = run / "measured.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    model, processor = _build(args.name, None, run)
    for task in TASKS:
        if task not in found:
            found[task] = measure(model, processor, task, args.pictures, args.seed, blind)
            file.write_text(json.dumps(found, indent=1) + "\n")
    return {t: found[t] for t in TASKS}


if __name__ == "__main__":
    main()
