"""The k best rows of every item by score, in ascending order, and gathering rows with their positions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmcompress.ops import core
from mmcompress.ops.merging import sum_into


@core.operator(
    "top_rows(Tensor score, Tensor offsets, Tensor out_offsets, SymInt num_out, bool check=True) -> Tensor",
    lambda score, offsets, out_offsets, num_out, check=True: score.new_empty((num_out,), dtype=torch.int64),
    "Tensor score, Tensor offsets, Tensor out_offsets, bool check, Tensor(a!) rows, Tensor(b!) bad",
)
def _top_rows(score, offsets, out_offsets, num_out, check=True):
    if score.dim() != 1 or score.dtype not in core.DTYPES:
        raise ValueError(f"score must be floating point of shape [M], got {score.dtype} of shape {list(score.shape)}")
    core.check_offsets(offsets, len(score), score.device)
    core.check_offsets(out_offsets, num_out, score.device, "out_offsets")
    core.check_counts(offsets, out_offsets, num_out)
    score = score.contiguous()
    if compiled := core.kernel("top_rows", score):
        out, bad = offsets.new_empty(num_out), core.new_flags(score)
        compiled(score, offsets, out_offsets, check, out, bad)
        if check:
            _raise_nan(bad)
        return out
    if check:
        nan = score.isnan()
        _raise_nan(torch.where(nan.any(), nan.int().argmax(), -1) if len(score) else torch.full((), -1, device=score.device))
    return ranked_rows(score, offsets, out_offsets, num_out).sort().values  # items follow each other: one sort is enough


def _raise_nan(first: Tensor) -> None:
    core.refuse(first, "score must not be NaN, got NaN in row {}")


def ranked_rows(score: Tensor, offsets: Tensor, out_offsets: Tensor, num_out: int) -> Tensor:
    """The best rows of every item, by descending score and ascending row."""
    order = torch.sort(score, descending=True, stable=True).indices
    item = torch.searchsorted(offsets[1:], torch.arange(len(score), device=score.device), right=True)
    order = order[torch.sort(item[order], stable=True).indices]  # item by item, best first
    out = torch.arange(num_out, device=score.device)
    item = torch.searchsorted(out_offsets[1:], out, right=True)
    return order[offsets[item] + out - out_offsets[item]]


def _fake_gather(x, positions, index):
    return x.new_empty((index.shape[0], x.shape[1])), positions.new_empty((*positions.shape[:-1], index.shape[0]))


@core.operator(
    "gather_rows(Tensor x, Tensor positions, Tensor index) -> (Tensor, Tensor)",
    _fake_gather,
    "Tensor x, Tensor positions, Tensor index, Tensor(a!) rows, Tensor(b!) out_positions",
)
def _gather_rows(x, positions, index):
    x = core.check_rows(x)
    if positions.dim() not in (1, 2) or positions.shape[-1] != len(x) or positions.device != x.device:
        raise ValueError(
            f"positions must have shape [M] or [P, M] with M = {len(x)} on x's device, got {list(positions.shape)}"
        )
    if index.dim() != 1 or index.dtype != torch.int64 or index.device != x.device:
        raise ValueError(f"index must be int64 of shape [K] on x's device, got {index.dtype} of shape {list(index.shape)}")
    if x.device.type == "cpu" and len(index) and not (int(index.min()) >= 0 and int(index.max()) < len(x)):
        raise ValueError(f"index must be between 0 and M - 1 = {len(x) - 1}, got {int(index.min())} to {int(index.max())}")
    if (compiled := core.kernel("gather_rows", x)) and positions.dtype == torch.int64:
        rows, places = _fake_gather(x, positions, index)
        compiled(x, positions, index.contiguous(), rows, places)
        return rows, places
    return x.index_select(0, index), positions.index_select(-1, index)


def _gather_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])
    ctx.num_rows = inputs[0].shape[0]


def _gather_backward(ctx, grad, _grad_positions):
    (index,) = ctx.saved_tensors
    return sum_into(grad[None], index[None], ctx.num_rows)[0], None, None


torch.library.register_autograd("mmcompress::gather_rows", _gather_backward, setup_context=_gather_setup, lib=core._library)


class Kept(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # [B, k] ascending columns; packed row ids when ragged
    x: Tensor | None  # [B, k, D]
    position: Tensor | None  # [B, k] or [B, k, P]


def top_keep(
    score: Tensor,
    k: int | Sequence[int],
    x: Tensor | None = None,
    position: Tensor | None = None,
    *,
    offsets: Tensor | Sequence[int] | None = None,
    check_finite: bool = True,
) -> Kept:
    """Keep the k highest scores, ties to the lowest column, in ascending order; with x (and position) also their rows.

    score [N] or [B, N], or ragged [M] with offsets and k an integer or one per item. x has score's shape and D; position has
    score's shape, or that and a last axis P. Rows are differentiable in x. A score may be infinite, not NaN.
    """
    flat, ends, num_items = core.pack(score, offsets, "score", width=False)
    out_ends, total = core.pack_counts(k, score, offsets is not None, num_items, width=False)
    rows = torch.ops.mmcompress.top_rows(flat.detach(), ends, out_ends, total, check_finite)
    index = core.unpack(rows, score, offsets, k, width=False)
    if position is not None and position.shape[: score.dim()] != score.shape:
        raise ValueError(f"position must begin with the shape of score, {list(score.shape)}, got {list(position.shape)}")
    if x is None:
        if position is not None:
            position = position.flatten(0, score.dim() - 1)[rows].reshape(*index.shape, *position.shape[score.dim() :])
        return Kept(index, None, position)
    if x.shape[:-1] != score.shape:
        raise ValueError(f"x must have the shape of score, {list(score.shape)}, and D, got {list(x.shape)}")
    place = torch.arange(len(flat), device=x.device) if position is None else position.reshape(len(flat), -1).T.contiguous()
    kept, place = torch.ops.mmcompress.gather_rows(x.reshape(len(flat), x.shape[-1]), place, rows)
    if position is not None:
        position = place.T.reshape(*index.shape, *position.shape[score.dim() :])
    return Kept(index, kept.reshape(*index.shape, x.shape[-1]), position)
