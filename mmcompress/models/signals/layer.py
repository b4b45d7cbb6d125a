"""Signals before a decoder layer, from the attention of the layer before it with that layer's own mask, window, soft cap and
scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcompress.models.signals import signal
from mmcompress.models.signals.taps import Attention
from mmcompress.ops.relevance import relevance


@dataclass
class Look:
    """Attention of one layer whose T rows stand at columns `first` … `first + T` of the keys that it reads.

    real [B, T]: row or padding. held [B, first]: the same of what the cache holds. last [B]: the prompt's last row.
    items: with `sample`, `columns`, `separators` among the T rows. extra: candidate rows behind the prompt.
    """

    seen: Attention
    first: int
    real: Tensor
    held: Tensor
    last: Tensor
    items: list[Any]
    extra: int = 0


@signal("query_attention", "layer", needs_text=True)
def query_attention(look: Look) -> list[Tensor]:
    """What the prompt's last row gives to each token, mean over heads (FastV, arXiv 2403.06764)."""
    T = look.real.shape[1]
    rows = torch.stack([look.seen.weights(b, look.last[b : b + 1], look.first)[:, 0].mean(0) for b in range(len(look.real))])
    return [rows[i.sample, look.first : look.first + T][i.columns] for i in look.items]


@signal("relevance", "layer", needs_text=True)
def shares(look: Look) -> list[Tensor]:
    """Attention from text to items and from items to text, [N, 2], the same for all tokens of a sample (ToDRE)."""
    visual, text, before = column_sets(look)
    every = torch.cat([look.held, look.real], 1)
    share = relevance(
        look.seen.q, look.seen.k[:, :, : every.shape[1]], visual, text, before, look.seen.scale, every,
        weights=lambda b, rows: look.seen.weights(b, rows, look.first, every[b]),
    )  # fmt: skip
    return [share[i.sample].expand(len(i.columns), 2) for i in look.items]


def column_sets(look: Look) -> tuple[Tensor, Tensor, Tensor]:
    """Over past and present columns [B, first + T]: visual ones (separators too), the prompt's text, and what stands
    before the picture."""
    real, past = look.real, look.first
    visual = torch.zeros(len(real), past + real.shape[1], dtype=torch.bool, device=real.device)
    for item in look.items:
        visual[item.sample, past + torch.cat([item.columns, item.separators])] = True
    column = torch.arange(visual.shape[1], device=real.device).expand(visual.shape)
    begin = torch.where(visual, column, visual.shape[1]).amin(1, keepdim=True)
    prompt = torch.nn.functional.pad(real, (past, 0), value=True)
    if look.extra:
        prompt = prompt & (column < real.shape[1] + past - look.extra)
    return visual, prompt & ~visual & (column > begin), prompt & (column < begin)
