"""TokDense: accuracy bought per visual token (VQToken, Zhang and Fu, arXiv 2503.16980).

Tokens are those that the language model reads of an item, separators not counted: `ItemCount.kept_from[0]` of a ledger's items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def tok_dense(percent: float, num_tokens: float) -> float:
    """Accuracy in percent over the number of visual tokens. Raises ValueError for percent outside [0, 100] or no tokens."""
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in [0, 100], got {percent!r}")
    if not 0 < num_tokens < math.inf:
        raise ValueError(f"num_tokens must be a finite number > 0, got {num_tokens!r}")
    return percent / num_tokens


def tok_dense_fixed(percent: float, counts: Sequence[int]) -> float:
    """Of the fixed-length subtask: every item has the same number of tokens. Raises ValueError where `counts` differ."""
    if len(set(counts)) != 1:
        raise ValueError(f"counts must be one number of tokens for all items, got {sorted(set(counts))}")
    return tok_dense(percent, counts[0])


def tok_dense_adaptive(percent: float, counts: Sequence[int]) -> float:
    """Of the adaptive-length subtask: over the mean number of tokens of the items. Raises ValueError for no items."""
    if not len(counts):
        raise ValueError("counts must hold at least one item, got none")
    return tok_dense(percent, math.fsum(counts) / len(counts))
