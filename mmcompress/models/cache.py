"""A cache that holds fewer rows than tokens were seen: logical length for callers, physical rows for masks, at every layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PromptState:
    """One reduction that the cache went through.

    cut: the first layer that holds the reduced rows. length: columns before it, padding included. mask [B, rows after
    it]: real row or padding.
    """

    cut: int
    length: int
    mask: Tensor

    def physical(self, mask: Tensor) -> Tensor:
        """[B, length + new] -> [B, rows + new]."""
        kept = self.mask
        if len(kept) != len(mask):
            kept = kept.repeat_interleave(len(mask) // len(kept), 0)
        return torch.cat([kept.to(mask), mask[:, self.length :]], -1)


def physical(states: list[PromptState], mask: Tensor, upto: int) -> Tensor:
    """The 2-D mask over the rows that layer `upto` holds, from the mask [B, columns] before these states."""
    for state in states:
        if state.cut <= upto:
            mask = state.physical(mask)
    return mask


class LogicalLength:
    """Mixed into the class of one cache object. Safe for caches; model classes are never changed."""

    reduced: list[PromptState]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # tokens seen
        gone = sum(s.length - s.mask.shape[1] for s in self.reduced if s.cut <= layer_idx)
        return super().get_seq_length(layer_idx) + gone  # type: ignore[misc]

    def get_query_offset(self, layer_idx: int = 0) -> int:  # rows held
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._move(lambda m: m.index_select(0, beam_idx.to(m.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._move(lambda m: m[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._move(lambda m: m.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.reduced = [PromptState(s.cut, 0, s.mask[:, :0]) for s in self.reduced]

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        self.reduced = [PromptState(s.cut, s.length, move(s.mask)) for s in self.reduced]


@functools.cache
def _logical(base: Any) -> Any:
    return type("Logical" + base.__name__, (LogicalLength, base), {})


def states_of(cache: Any) -> list[PromptState]:
    """The reductions a cache went through ([] for None and for untouched caches)."""
    return getattr(cache, "reduced", None) or []


def remember(cache: Any, states: list[PromptState]) -> None:
    """Note on the cache what it holds now."""
    cache.reduced = states
    if not isinstance(cache, LogicalLength):
        kind: Any = type(cache)
        cache.__class__ = _logical(kind)
