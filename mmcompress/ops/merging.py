"""Weighted mean of the rows that share an output: the merge of ToMe, of clusterings and of codebooks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.ops import core


def _fake(x, assignment, num_out, size=None, check=True):
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((num_out, x.shape[1])), x.new_empty((num_out,), dtype=total)


@core.operator(
    "merge_mean(Tensor x, Tensor assignment, SymInt num_out, Tensor? size=None, bool check=True) -> (Tensor, Tensor)",
    _fake,
    "Tensor x, Tensor assignment, Tensor? size, bool check, Tensor(a!) mean, Tensor(b!) total, Tensor(c!) bad",
)
def _merge_mean(x, assignment, num_out, size=None, check=True):
    x = core.check_rows(x)
    if assignment.shape != x.shape[:1] or assignment.dtype != torch.int64 or assignment.device != x.device:
        raise ValueError(
            f"assignment must be int64 of shape [M] = {[len(x)]} on x's device, got {assignment.dtype} {list(assignment.shape)}"
        )
    if num_out < 0:
        raise ValueError(f"num_out must not be negative, got {num_out}")
    if x.device.type == "cpu" and len(x) and not (int(assignment.min()) >= -1 and int(assignment.max()) < num_out):
        found = f"{int(assignment.min())} to {int(assignment.max())}"
        raise ValueError(f"assignment must be between -1 and num_out - 1 = {num_out - 1}, got {found}")
    if size is not None:
        if size.shape != x.shape[:1] or size.device != x.device or not size.is_floating_point():
            raise ValueError(
                f"size must be floating point of shape [M] = {[len(x)]} on x's device, got {size.dtype} {list(size.shape)}"
            )
        size = (size.float() if x.dtype != torch.float64 else size.double()).contiguous()
    compiled = core.kernel("merge_mean_sorted" if x.is_cuda else "merge_mean", x)
    if compiled:
        (out, total), bad = _fake(x, assignment, num_out), core.new_flags(x)
        if x.is_cuda:
            ordered, order = torch.sort(assignment, stable=True)
            start = torch.searchsorted(ordered, torch.arange(num_out + 1, device=x.device))
            compiled(x, order, start, size, check, out, total, bad)
        else:
            compiled(x, assignment.contiguous(), size, check, out, total, bad)
        if check:
            core.raise_not_finite(bad, "the merged x")
        return out, total
    weight = core.wide(torch.ones_like(x[:, 0])) if size is None else core.wide(size)
    target = torch.where(assignment < 0, num_out, assignment)  # dropped rows go to one row too many
    total = sum_into(weight[None], target[None], num_out + 1)[0, :num_out]
    out = sum_into((core.wide(x) * weight[:, None])[None], target[None], num_out + 1)[0, :num_out]
    out = core.narrow(torch.where(total[:, None] != 0, out / total[:, None], torch.zeros_like(out)), x.dtype)
    if check:
        core.check_finite(out, "the merged x")
    return out.to(x.dtype), core.narrow(total, x.dtype)


def sum_into(values: Tensor, index: Tensor, num_out: int) -> Tensor:
    """Sums [B, num_out, ...] of the values [B, N, ...] that share an index [B, N] in 0…num_out - 1; the same in every run.

    Differentiable.
    """
    if values.is_cuda:
        return _sum_sorted(values, index, num_out)
    where = index.view(*index.shape, *[1] * (values.dim() - 2)).expand_as(values)
    return values.new_zeros(len(values), num_out, *values.shape[2:]).scatter_add(1, where, values)


def _sum_sorted(values: Tensor, index: Tensor, num_out: int) -> Tensor:
    """On CUDA scatter_add and index_add use atomics, whose order is that of chance; an accumulating write sorts first."""
    item = torch.arange(len(values), device=values.device)[:, None].expand_as(index)
    out = values.new_zeros(len(values), num_out, *values.shape[2:])
    return out.index_put((item, index), values, accumulate=True)


def _setup(ctx, inputs, output):
    _x, assignment, _num_out, size, *_ = inputs
    ctx.save_for_backward(assignment, size, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _grad_total):
    assignment, size, total = ctx.saved_tensors
    share = (
        torch.where(total != 0, 1 / total, 0)[assignment.clamp(min=0)]
        if len(total)
        else torch.zeros_like(assignment, dtype=total.dtype)
    )
    share = torch.where(assignment < 0, 0, share if size is None else share * size)
    rows = grad[assignment.clamp(min=0)] if len(total) else grad.new_zeros((len(assignment), grad.shape[1]))
    return (rows * share[:, None]).to(grad.dtype), None, None, None, None


torch.library.register_autograd("mmcompress::merge_mean", _backward, setup_context=_setup, lib=core._library)


def merge(
    x: Tensor,
    assignment: Tensor,
    num_out: int | Sequence[int],
    size: Tensor | None = None,
    *,
    offsets: Tensor | Sequence[int] | None = None,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each output, weighted by size (default 1): (out [B, K, D] in x's dtype, sizes [B, K] float32).

    x [N, D] with assignment [N], x [B, N, D] with assignment [B, N] (columns of the item's own outputs), or ragged: x [M, D]
    with offsets, num_out one integer or one per item, assignment local to the item, outputs packed. -1 drops a row; an output
    without rows is 0 with size 0. Sums are float32 and rounded once. Differentiable in x, not in size.
    """
    rows, ends, num_items = core.pack(x, offsets)
    if assignment.shape != x.shape[:-1]:
        raise ValueError(f"assignment must have the shape of x without D, {list(x.shape[:-1])}, got {list(assignment.shape)}")
    if size is not None and size.shape != assignment.shape:
        raise ValueError(f"size must have the shape of assignment, {list(assignment.shape)}, got {list(size.shape)}")
    if not isinstance(num_out, Sequence):
        out_ends, total = torch.arange(num_items + 1, device=x.device) * num_out, num_items * num_out
    else:
        out_ends, total = core.pack_counts(num_out, x, offsets is not None, num_items, name="num_out")
    local = assignment.reshape(-1)
    if num_items != 1:
        item = torch.searchsorted(ends[1:], torch.arange(len(rows), device=x.device), right=True)
        limit = out_ends.diff()[item]
        # a value out of range must stay out of range, not fall into the next item
        local = torch.where(local < 0, local, torch.where(local < limit, local + out_ends[item], total))
    weight = None if size is None else size.detach().reshape(-1)
    out, total_size = torch.ops.mmcompress.merge_mean(rows, local, total, weight, check_finite)
    if offsets is not None or x.dim() == 2:
        return out, total_size
    return out.reshape(num_items, num_out, x.shape[-1]), total_size.reshape(num_items, num_out)
