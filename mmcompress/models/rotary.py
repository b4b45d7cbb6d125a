"""Tokens that carry several position ids through the rotary embedding: each slot of a token turns its own slice of frequencies.

Source: Huang et al. (PPE, arXiv 2510.22936), row map. The i-th of the s frequencies of an axis, highest first, reads slot
⌊i·P/s⌋. The model's own rotary module is called for every slot and the columns of its cos and sin are picked, so that whatever
it does (axes in sections or interleaved, scaling, frequencies that follow the length) stays its own, and equal slots give its
very numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcompress.models import compat
from mmcompress.models.items import Item

SLOTS = 8
"""Slots that the signal "positions" has where the sections allow it (PPE's default)."""


@dataclass(frozen=True)
class Turned:
    """cos, sin [M, width] of the tokens at sample, column [M]; longest: the longest position id before anything was dropped."""

    sample: Tensor
    column: Tensor
    cos: Tensor
    sin: Tensor
    longest: Tensor

    def put(self, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin [B, rows, width] with those of these tokens written in; new tensors."""
        cos, sin = (
            put(t, self.sample.to(t.device), self.column.to(t.device), v.to(t.device))
            for t, v in zip(embeddings, (self.cos, self.sin), strict=True)
        )
        return cos, sin


def put(table: Tensor, sample: Tensor, column: Tensor, values: Tensor) -> Tensor:
    """Values [M, width] at these places of a table [B, rows, width], or in all of [3, B, rows, width]."""
    if table.dim() == 3:
        return table.index_put((sample, column), values)
    axis = torch.arange(len(table), device=table.device)[:, None]
    return table.index_put((axis, sample, column), values.expand(len(table), *values.shape))


@dataclass(frozen=True)
class Rotary:
    """How a text model's rotary frequencies lie. axis [F]: which of t, h, w (0, 1, 2) a frequency reads, 0 in plain RoPE."""

    axis: Tensor
    plain: bool

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any) -> Rotary:
        """Found by turning one axis at a time. Raises ValueError where the module's layout is another."""
        plain = compat.rotary_sections(module) is None
        one = torch.eye(3, dtype=torch.long, device=module.inv_freq.device)[:, :, None]  # [axis, batch, 1]
        _, sin = module(torch.zeros(1, device=one.device), one.new_ones(1, 1) if plain else one)
        sin = compat.composed(sin, module)
        first, second = (sin[:, 0] != 0).chunk(2, -1)
        if not torch.equal(first, second) or not bool((first.sum(0) == 1).all()):
            raise ValueError(f"{type(module).__name__} must turn dimensions f and f + F by one axis each to carry positions")
        return cls(first.int().argmax(0).cpu(), plain)

    @property
    def sections(self) -> tuple[int, ...]:
        """Frequencies of every axis."""
        return tuple(self.axis.bincount(minlength=1 if self.plain else 3).tolist())

    @property
    def slots(self) -> int:
        """The most slots, at most SLOTS, that share every section out evenly."""
        return math.gcd(SLOTS, *self.sections)

    def slot(self, P: int) -> Tensor:
        """The slot that each frequency reads [F]. Raises ValueError where a slot would be read by no frequency of an axis."""
        if not 1 <= P <= min(self.sections):
            raise ValueError(
                f"a token must carry between 1 and {min(self.sections)} positions with rotary sections {list(self.sections)}, "
                f"got {P}"
            )
        out = torch.empty_like(self.axis)
        for axis, size in enumerate(self.sections):
            out[self.axis == axis] = torch.arange(size) * P // size
        return out

    def offer(self, items: list[Item], position_ids: Tensor) -> None:
        """Give every item the signal "positions" [N, slots, 3]: its tokens' ids, each slot the same."""
        ids = axes(position_ids)
        for item in items:
            own = ids[:, item.sample, item.columns].T  # [N, 3]
            item.signals = {**item.signals, "positions": own[:, None].expand(-1, self.slots, -1)}

    @torch.no_grad()
    def turn(self, module: Any, items: list[Item], longest: Tensor, like: Tensor) -> Turned:
        """cos and sin of all tokens of the items at their present columns, in the dtype of `like`, by the rotary module."""
        parts = []
        for P in sorted({item.signals["positions"].shape[1] for item in items}):
            some = [item for item in items if item.signals["positions"].shape[1] == P]
            ids = torch.cat([item.signals["positions"] for item in some])  # [M, P, 3]
            row = torch.cat([ids.flatten(0, 1).T, longest[:, None]], 1)[:, None]  # [3, 1, M * P + 1]
            slot = self.slot(P).repeat(2).to(ids.device)
            dim = torch.arange(len(slot), device=ids.device)
            turned = (compat.composed(t, module) for t in module(like, row[0] if self.plain else row))
            cos, sin = (t[0, :-1].unflatten(0, (-1, P))[:, slot, dim] for t in turned)
            sample = torch.cat([torch.full_like(item.columns, item.sample) for item in some])
            parts.append((sample, torch.cat([item.columns for item in some]), cos, sin))
        sample, column, cos, sin = map(torch.cat, zip(*parts, strict=True))
        return Turned(sample, column, cos, sin, longest)


def axes(position_ids: Tensor) -> Tensor:
    """t, h, w ids [3, B, S] of position ids [B, S] (the same for all), [3, B, S] or [4, B, S] (text first)."""
    return position_ids[-3:] if position_ids.dim() == 3 else position_ids.expand(3, *position_ids.shape)
