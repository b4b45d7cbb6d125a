"""First stage: teach tower (by LoRA) and projector, without the language model, to say in words what a token shows.

The tokens of a mark spell it: "red star" from left to right, "top left" below (views.py). The mean output over some of the
tokens that say one word must name it among all words, by its product with the words' embeddings; every token is
drawn, gently, to its word's embedding, those that show no mark to the vocabulary's mean. The language model then reads
pictures as it reads text: it binds colour to shape after a few hundred examples, where tokens that said all words at once took
thousands. Views are made without end.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmcompress.zoo.boxes import token_boxes, token_marks
from mmcompress.zoo.eye import SIDE, TOKENS, Eye, normalised
from mmcompress.zoo.lora import LoRALinear, add_lora_
from mmcompress.zoo.state import State, rate
from mmcompress.zoo.views import TABLES, spelled, view

BATCH, RANK, WARMUP = 8, 16, 60


def scale_of(eye: Eye, seed: int, num: int = 32) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [W] of the tower's features."""
    with torch.inference_mode():
        x = torch.cat([eye.features(normalised([view(seed, i)[0]])).float().flatten(0, 1) for i in range(num)])
    return x.mean(0).clone(), (x.std(0) + 1e-6).clone()


def teach(
    eye: Eye, words: Tensor, tokenizer: Any, out: Path, steps: int, seed: int
) -> tuple[dict[str, LoRALinear], dict[str, float]]:
    """Adapt tower and projector in place, going on from a state in `out`; returns the tower's LoRA layers and the last figures.

    words [V, D]: the language model's embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    eye.tower.requires_grad_(False)
    eye.mean, eye.std = scale_of(eye, seed)
    layers = add_lora_(eye.tower, generator, RANK)
    lora = [p for m in layers.values() for p in (m.a, m.b)]
    eye.projector.requires_grad_(True)
    eye.calm_()
    groups: list[dict[str, Any]] = [{"params": list(eye.projector.parameters()), "peak": 8e-4}, {"params": lora, "peak": 4e-4}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    state = State(out / "see", [p for g in groups for p in g["params"]], optimizer)
    done = state.load()
    mean = words.float().mean(0)
    vector = {w: words[tokenizer(w, add_special_tokens=False).input_ids[0]].float() - mean for t in TABLES for w in t}
    boxes = token_boxes((SIDE, SIDE), None)
    log = (out / "log.jsonl").open("a")
    stats: dict[str, list[float]] = {}
    line: dict[str, float] = {}
    make = lambda step: [view(seed + 1, step * BATCH + i) for i in range(BATCH)]  # noqa: E731
    step, bar = done, tqdm(initial=done, total=steps, desc="see", mininterval=10)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, step)
        try:
            while step < steps:
                views = coming.result()
                coming = pool.submit(make, step + 1)
                for g in optimizer.param_groups:
                    g["lr"] = g["peak"] * rate(step, steps, WARMUP)
                loss, right = lesson(eye, views, boxes, vector, mean, np.random.default_rng([seed, step]))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
                optimizer.step()
                step += 1
                bar.update()
                stats.setdefault("loss", []).append(loss.item())
                for name, hits in right.items():
                    stats.setdefault(name, []).extend(hits)
                if step % 25 == 0 or step == steps:
                    line = {k: round(float(np.mean(v)), 3) for k, v in stats.items() if v}
                    log.write(json.dumps({"stage": "see", "step": step, **line}) + "\n")
                    log.flush()
                    bar.set_postfix_str(" ".join(f"{k}={v}" for k, v in line.items()))
                    stats = {}
                state.keep(step)
        finally:
            state.save(step)
            bar.close()
    return layers, {**line, "cpu_minutes": state.cpu_minutes}


NAMES = ("digit", "word", "colour", "shape", "side", "height")


def lesson(eye: Eye, views, boxes: Tensor, vector: dict[str, Tensor], mean: Tensor, rng: np.random.Generator):
    """Loss of one batch, and per table whether each group of tokens named its word right, among all words of all tables."""
    features = eye.features(normalised([v for v, _ in views])).float()
    rows, owner, background = [], [], []
    said: list[list[tuple[int, str]]] = []
    for b, (_, marks) in enumerate(views):
        label = token_marks(boxes, marks).numpy()
        for j, mark in enumerate(marks):
            for tokens, names in spelled(mark, np.nonzero(label == j)[0], boxes.numpy(), eye.places):
                tokens = rng.choice(tokens, min(len(tokens), int(rng.integers(1, 9))), replace=False)
                rows.append(b * TOKENS + tokens)
                owner += [len(said)] * len(tokens)
                said.append(names)
        other = np.nonzero(label < 0)[0]
        background.append(b * TOKENS + rng.choice(other, min(len(other), 16), replace=False))
    device, flat = features.device, features.flatten(0, 1)
    at = torch.tensor(owner, device=device)
    index = torch.from_numpy(np.concatenate([*rows, *background]))
    z = eye.project(flat[index.to(device)]) - mean
    target = torch.stack([torch.stack([vector[w] for _, w in names]).sum(0) for names in said])
    pulled = (z[: len(at)] - target[at]).square().sum(-1).mean() + z[len(at) :].square().sum(-1).mean()
    pooled = z.new_zeros(len(said), z.shape[1]).index_add(0, at, z[: len(at)]) / at.bincount()[:, None]
    logits, right = pooled @ torch.stack(list(vector.values())).T, {}
    which = {w: i for i, w in enumerate(vector)}
    of, table, word = torch.tensor([(j, t, which[w]) for j, names in enumerate(said) for t, w in names], device=device).T
    mine = torch.zeros_like(logits, dtype=torch.bool).index_put((of, word), torch.tensor(True, device=device))
    hit = mine.gather(1, logits.argmax(-1, keepdim=True))[of, 0]  # a single token may say either of its two words
    for k, name in enumerate(NAMES):
        if bool((table == k).any()):
            right[name] = hit[table == k].float().tolist()
    named = nn.functional.cross_entropy(logits[of], word)
    return named + 0.02 * pulled, right
