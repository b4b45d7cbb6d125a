"""Geometry of a padded batch whose rows are dropped: which row goes where, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Rows `index` [B, P] along `dim` of x, whose batch dimension is the one before."""
    view = [1] * x.dim()
    view[dim - 1], view[dim] = index.shape
    shape = (*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :])
    return x.gather(dim, index.view(view).expand(shape))


def pack(valid: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    """The kept rows of valid [B, S] moved together and padded again on their side: index [B, P], real [B, P]. One host
    read of P."""
    count = valid.sum(1, keepdim=True)
    P = int(count.max())
    order = torch.argsort(valid.int(), dim=1, stable=True, descending=not left)  # stable: kept rows stay in order
    column = torch.arange(P, device=valid.device)
    if left:
        return order[:, order.shape[1] - P :], column >= P - count
    return order[:, :P], column < count


def packed_column(valid: Tensor, real: Tensor, left: bool) -> Tensor:
    """For each of S columns the packed row of the last kept column at or before it [B, S]."""
    first = real.shape[1] - valid.sum(1, keepdim=True) if left else 0
    return ((valid.long().cumsum(1) - 1).clamp(min=0) + first).clamp(max=real.shape[1] - 1)


def restore(out: Any, source: Tensor) -> Any:
    """Put outputs [B, P, …] back to S columns: a dropped column repeats the last kept row before it, so that
    `logits[s]` still predicts `labels[s + 1]`."""
    for name in ("last_hidden_state", "logits"):
        y = getattr(out, name, None)
        if y is not None:
            setattr(out, name, rows(y, source.to(y.device)))
    return out
