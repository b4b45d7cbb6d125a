"""First stage of a model that hears: its projector, on what the frozen encoder gave, learns to say in words what sounds.

The mean output over some of a sound's tokens must name it among all names, by its product with the words' embeddings; every
token is drawn, gently, to its sound's embedding, silence to the vocabulary's mean. The counterpart of see.py, without a tower.
"""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmcompress.zoo.sense import Seen, Sense, heard
from mmcompress.zoo.state import rate

BATCH = 24  # recordings


def teach(sense: Sense, scenes: list[list[Seen]], steps: int, seed: int) -> dict[str, float]:
    """Train the projector in place on cached recordings (lists, one a task, drawn in turn); returns the last figures."""
    words = sense.model.get_input_embeddings().weight.detach().float()
    mean = words.mean(0)
    names = sorted({m.words[0] for seen in chain(*scenes) for m in seen.marks})
    ids = [sense.processor.tokenizer(n, add_special_tokens=False).input_ids[0] for n in names]
    vectors = words[ids] - mean
    trained = [p.requires_grad_(True) for p in sense.trained.values()]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.05)
    right: list[float] = []
    began = time.process_time()
    for step in (bar := tqdm(range(steps), desc="hear", mininterval=10)):
        for g in optimizer.param_groups:
            g["lr"] = 2e-3 * rate(step, steps)
        rng = np.random.default_rng([seed, step])
        loss, hit = lesson(sense, scenes, names, vectors, mean, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = (right + hit)[-2000:]
        bar.set_postfix_str(f"loss={loss.item():.3f} named={np.mean(right):.3f}")
    minutes = round((time.process_time() - began) / 60, 1)
    return {"steps": steps, "cpu_minutes": minutes, "named": round(float(np.mean(right)), 3)}


def lesson(sense: Any, scenes: list[list[Seen]], names: list[str], vectors: Tensor, mean: Tensor, rng: np.random.Generator):
    """Loss of one batch, and for each sound whether it was named right."""
    rows, owner, silent = [], [], []
    label: list[int] = []
    for i in range(BATCH):
        kind = scenes[i % len(scenes)]
        seen = kind[int(rng.integers(len(kind)))]
        for mark in seen.marks:
            x = seen.features[heard(mark)]
            take = rng.choice(len(x), min(len(x), int(rng.integers(1, 9))), replace=False)
            rows.append(x[torch.from_numpy(take).to(x.device)])
            owner += [len(label)] * len(take)
            label.append(names.index(mark.words[0]))
        silent.append(seen.features[(~seen.shows).nonzero()[:16, 0].to(seen.features.device)])
    at, target = (torch.tensor(x, device=vectors.device) for x in (owner, label))
    z = sense.project(torch.cat([*rows, *silent])) - mean
    said, rest = z[: len(at)], z[len(at) :]
    pooled = z.new_zeros(len(label), z.shape[1]).index_add(0, at, said) / at.bincount()[:, None]
    logits = pooled @ vectors.T
    pulled = (said - vectors[target[at]]).square().sum(-1).mean() + rest.square().sum(-1).mean()
    loss = nn.functional.cross_entropy(logits, target) + 0.02 * pulled
    return loss, (logits.argmax(-1) == target).float().tolist()
