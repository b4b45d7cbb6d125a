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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mmcompress.eval.tasks import Detail, EasyVQA, create_task
from mmcompress.zoo import _build, list_models, parts_dir
from mmcompress.zoo.features import Scene, layout, tower_features
from mmcompress.zoo.train import Reader, kind_of
from mmcompress.zoo.wheels import WHEELS

TASKS = ("easy_vqa", "detail:small", "detail:middle", "detail:large")


def questions(task: str, pictures: int, per_picture: int = 4, seed: int = 0):
    """Test pictures of a task, each with `per_picture` questions: for detail one each of digit, word, colour and shape."""
    if task == "easy_vqa":
        out = []
        for i, (picture, marks) in enumerate(EasyVQA().scenes("test", pictures, seed)):
            pairs = marks[0].questions
            order = np.random.default_rng([seed, i]).permutation(len(pairs))[:per_picture]
            out.append((picture, [pairs[j] for j in order]))
        return out
    scenes = Detail(task.partition(":")[2]).scenes("test", pictures, seed)
    kinds = [(p, {m.kind: m for m in marks}, [m for m in marks if m.kind == "shape"]) for p, marks in scenes]
    every = [(p, [*m["digit"].questions, *m["word"].questions, s[0].questions[0], s[1].questions[1]]) for p, m, s in kinds]
    return [(p, q[:per_picture]) for p, q in every]


@torch.inference_mode()
def measure(model, processor, task: str, pictures: int, seed: int = 0, blind: bool = False) -> dict:
    """Accuracy (ratio), 95 % interval by bootstrap over pictures, n questions, and accuracy by the kind of answer."""
    reader, right, by_kind = Reader(model, processor.tokenizer), [], {}
    for picture, pairs in tqdm(questions(task, pictures, seed=seed), desc=task + (" blind" if blind else ""), mininterval=10):
        order, _ = layout(model.config, picture.size)
        features = np.zeros((0, 0), np.float16) if blind else tower_features(model, processor, picture).float().numpy()
        scene = Scene(features, order, torch.full((0,), -1), [])
        _, ok = reader(scene, pairs, None if blind else torch.arange(len(order)))
        right.append(ok)
        for (_, answer), good in zip(pairs, ok, strict=True):
            by_kind.setdefault(kind_of(task.partition(":")[0], answer), []).append(good)
    low, high = interval(right, seed)
    flat = [v for r in right for v in r]
    return {
        "accuracy": round(float(np.mean(flat)), 4),
        "interval": [round(low, 4), round(high, 4)],
        "n": len(flat),
        "pictures": len(right),
        "by_kind": {k: round(float(np.mean(v)), 4) for k, v in sorted(by_kind.items())},
    }


def interval(right: list[list[bool]], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over pictures (each with its questions)."""
    rng = np.random.default_rng(seed)
    good, count = np.array([sum(r) for r in right]), np.array([len(r) for r in right])
    picks = rng.integers(len(right), size=(draws, len(right)))
    return tuple(float(v) for v in np.quantile(good[picks].sum(1) / count[picks].sum(1), [0.025, 0.975]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.zoo.measure", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list_models(), help="the model")
    parser.add_argument("run", type=Path, help="folder of a finished run of mmcompress.zoo.train")
    parser.add_argument("blind_run", type=Path, help="folder of a finished run with --blind")
    parser.add_argument("--pictures", type=int, default=50, help="test pictures of each task, four questions each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    blind, processor = _build(args.name, None, args.blind_run)
    unseen = {t: measure(blind, processor, t, args.pictures * 2, args.seed, blind=True) for t in TASKS}
    del blind
    model, processor = _build(args.name, None, args.run)
    measured = {t: measure(model, processor, t, args.pictures, args.seed) for t in TASKS}
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


if __name__ == "__main__":
    main()
