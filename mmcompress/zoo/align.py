"""First stage: teach the projector, without the language model, to say in words what a token shows.

The mean output over (some of) a mark's tokens is trained to name the mark among all answers of its kind, by its product with
the answers' word embeddings; and every token is drawn, gently, to the sum of the embeddings of its mark's words over the
vocabulary's mean, where tokens that show no mark go. The language model then reads pictures much as it reads text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from mmcompress.eval.tasks import COLOURS, DIGITS, EASY_WORDS, SHAPES, WORDS
from mmcompress.zoo.features import Scene

SETS = (list(DIGITS), list(WORDS), sorted({*COLOURS, *EASY_WORDS[:8]}), sorted({*SHAPES, *EASY_WORDS[8:]}))


@dataclass
class Pairs:
    """Features [n, D] of tokens (float16); `marks` the rows and the words of each mark; `background` rows that show none."""

    x: torch.Tensor
    marks: list[tuple[np.ndarray, tuple[str, ...]]]
    background: np.ndarray


def collect(scenes: list[Scene], seed: int, background: int = 24, most: int = 48) -> Pairs:
    """Tokens of every mark whose words are known (at most `most`, thumbnail and crops apart), and some others of each scene."""
    rng, xs, marks, rest, used = np.random.default_rng(seed), [], [], [], 0
    for scene in scenes:
        mark, rows = scene.mark.numpy(), []
        for j, m in enumerate(scene.marks):
            if m.kind == "shape" and len(m.words) < 2:
                continue  # colour or shape unknown
            for part in (np.nonzero(mark[:256] == j)[0], 256 + np.nonzero(mark[256:] == j)[0]):
                if len(part):
                    part = rng.choice(part, min(len(part), most), replace=False)
                    marks.append((used + np.arange(len(part)), m.words))
                    rows.append(part)
                    used += len(part)
        other = rng.choice(np.nonzero(mark < 0)[0], min(background, int((mark < 0).sum())), replace=False)
        rest.append(used + np.arange(len(other)))
        rows.append(other)
        used += len(other)
        xs.append(torch.from_numpy(np.array(scene.features[np.concatenate(rows)])))
    return Pairs(torch.cat(xs), marks, np.concatenate(rest))


def fit(
    projector: nn.Module, data: Pairs, normalise, weight: torch.Tensor, tokenizer, steps: int, seed: int
) -> dict[str, float]:
    """Train `projector`; returns the last running loss and the share of marks named right (training marks)."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    mean = weight.mean(0)
    vector = {w: weight[tokenizer(w).input_ids[0]] - mean for s in SETS for w in s}
    table = [torch.stack([vector[w] for w in s]) for s in SETS]
    where = {w: [(k, s.index(w)) for k, s in enumerate(SETS) if w in s] for w in vector}
    optimizer = torch.optim.AdamW(projector.parameters(), 1.5e-3, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps)
    loss_mean, right_mean = 2.0, 0.1
    for _ in (bar := tqdm(range(steps), desc="align", mininterval=10)):
        rows, owner, words = [], [], []
        for k, i in enumerate(rng.integers(len(data.marks), size=72)):
            tokens, said = data.marks[i]
            tokens = rng.choice(tokens, min(len(tokens), int(rng.integers(2, 14))), replace=False)
            rows.append(tokens)
            owner += [k] * len(tokens)
            words.append(said)
        rows.append(rng.choice(data.background, 96))
        at = torch.tensor(owner)
        x = normalise(data.x[torch.from_numpy(np.concatenate(rows))])
        x = x * (torch.rand(x.shape, generator=generator) > 0.15)  # features drop out: the pictures are few
        z = projector(x) - mean
        target = torch.stack([torch.stack([vector[w] for w in said]).sum(0) for said in words])
        pulled = (z[: len(at)] - target[at]).square().sum(-1).mean() + z[len(at) :].square().sum(-1).mean()
        pooled = torch.zeros(len(words), z.shape[1]).index_add(0, at, z[: len(at)]) / at.bincount()[:, None]
        named, right = [], []
        for k, vectors in enumerate(table):
            hit = [(j, c) for j, said in enumerate(words) for w in said for kk, c in where[w] if kk == k]
            if hit:
                j, c = torch.tensor(hit).T
                logits = pooled[j] @ vectors.T
                named.append(nn.functional.cross_entropy(logits, c, reduction="sum"))
                right.append((logits.argmax(-1) == c).float())
        total = sum(len(r) for r in right)
        loss = sum(named) / total + 0.02 * pulled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_mean += 0.03 * (loss.item() - loss_mean)
        right_mean += 0.03 * (torch.cat(right).mean().item() - right_mean)
        bar.set_postfix(loss=f"{loss_mean:.3f}", right=f"{right_mean:.3f}")
    return {"loss": round(loss_mean, 4), "right": round(right_mean, 4)}
