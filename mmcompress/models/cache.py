"""A cache that holds fewer rows than tokens were seen: logical length for callers, physical rows for masks, at every layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmcompress.models import compat


@dataclass
class PromptState:
    """One reduction that the cache went through.

    cut: the first layer that holds the reduced rows. length: columns before it, padding included. mask [B, rows after
    it]: real row or padding. whole: all rows are real. tail: columns at its end that stand for one row each, as text does.
    tokens [B]: real tokens that it stands for.
    """

    cut: int
    length: int
    mask: Tensor
    whole: bool | None = None
    tail: int = 0
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.whole is None:
            self.whole = bool(self.mask.all())

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


class Licence:
    """Whether the compressor that made a cache is still installed. Shared by the seam and its caches; a copied cache shares it
    too, one that was pickled waits for a model that takes it up."""

    def __init__(self, valid: bool = True):
        self.valid = valid

    def __deepcopy__(self, memo: dict) -> Licence:
        return self

    def __reduce__(self) -> tuple:
        return Licence, (False,)


class LogicalLength:
    """Mixed into the class of one cache object. Safe for caches; model classes are never changed."""

    reduced: list[PromptState]
    licence: Licence

    def get_seq_length(self, layer_idx: int = 0) -> int:  # tokens seen
        gone = sum(s.length - s.mask.shape[1] for s in self.reduced if s.cut <= layer_idx)
        return super().get_seq_length(layer_idx) + gone  # type: ignore[misc]

    def get_query_offset(self, layer_idx: int = 0) -> int:  # rows held
        return super().get_seq_length(layer_idx)  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not self.licence.valid and is_reduced(self):
            raise RuntimeError(
                "past_key_values must come from a model without a compressor, or be used while one is installed: this cache "
                "holds fewer rows than tokens, go on inside the block or call compress_ again"
            )
        return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """As stock: a negative number removes so many tokens; what a positive one means, the stock cache says."""
        if tokens_to_remove > 0:
            compat.crop_takes(tokens_to_remove)
            gone = int(self.get_seq_length()) - tokens_to_remove
        else:
            gone = -int(tokens_to_remove)
        if gone <= 0:
            return super().crop(0) if tokens_to_remove == 0 else None  # type: ignore[misc]
        prompt = [s for s in self.reduced if s.cut == 0 and s.length]
        after = min((int(self.get_seq_length()) - s.length for s in prompt), default=gone)
        if gone > after + min((s.tail for s in prompt), default=0):
            raise ValueError(
                "crop must leave the part of the prompt that was compressed: at most "
                f"{after + min(s.tail for s in prompt)} tokens can be removed from this cache, got {gone}"
            )
        super().crop(-gone)  # type: ignore[misc]
        if (cut := max(0, gone - after)) and prompt:
            self.reduced = [
                replace(
                    s,
                    length=s.length - cut,
                    mask=s.mask[:, :-cut],
                    tail=s.tail - cut,
                    tokens=None if s.tokens is None else s.tokens - cut,
                )
                for s in self.reduced
            ]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._move(lambda m: m.index_select(0, beam_idx.to(m.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._move(lambda m: m[indices.to(m.device) if isinstance(indices, Tensor) else indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._move(lambda m: m.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.reduced = [PromptState(s.cut, 0, s.mask[:, :0]) for s in self.reduced]

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        self.reduced = [
            replace(s, mask=move(s.mask), whole=s.whole or None, tokens=None if s.tokens is None else move(s.tokens))
            for s in self.reduced
        ]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _again, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _logical(base: Any) -> Any:
    return type("Logical" + base.__name__, (LogicalLength, base), {})


def _again(base: Any) -> Any:
    kind = _logical(base)
    return kind.__new__(kind)


def states_of(cache: Any) -> list[PromptState]:
    """The reductions a cache went through ([] for None and for untouched caches)."""
    return getattr(cache, "reduced", None) or []


def is_reduced(cache: Any) -> bool:
    """Whether this cache holds fewer rows than tokens were seen, or may hold padding where its mask has none."""
    return any(s.length for s in states_of(cache))


def remember(cache: Any, states: list[PromptState], licence: Licence) -> None:
    """Note on the cache what it holds now, and while which compressor is installed that may be read."""
    cache.reduced, cache.licence = states, licence
    if not isinstance(cache, LogicalLength):
        kind: Any = type(cache)
        cache.__class__ = _logical(kind)
