"""Signals that the item, the prompt and the rotary embedding hold; nothing is tapped for them."""

from __future__ import annotations

from torch import Tensor

from mmcompress.models.signals import Signal, declare, signal

declare(Signal("crops", "layout"))
declare(Signal("positions", "rotary"))


@signal("text", "text", per_token=False, needs_text=True)
def text(x: Tensor, words: list[Tensor]) -> list[Tensor]:
    """Embeddings of each sample's own words [T, D]."""
    return [x[b, columns.to(x.device)] for b, columns in enumerate(words)]
