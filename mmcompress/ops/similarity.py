"""Row argmax of similarities, and what follows from it: nearest rows, and bipartite matching of alternating tokens.

Source: bipartite soft matching of ToMe (Bolya et al., arXiv 2210.09461). Similarities are dot products of the raw features
times reciprocal norms; the N × N matrix is never stored by the kernels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmcompress.ops import core


def _fake(a, b, a_offsets, b_offsets, cosine=True, bias=None, check=True):
    value = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((a.shape[0],), dtype=value), a.new_empty((a.shape[0],), dtype=torch.int64)


@core.operator(
    "similarity_argmax(Tensor a, Tensor b, Tensor a_offsets, Tensor b_offsets, bool cosine=True, Tensor? bias=None,"
    " bool check=True) -> (Tensor, Tensor)",
    _fake,
    "Tensor a, Tensor b, Tensor a_offsets, Tensor b_offsets, bool cosine, Tensor? bias, bool check,"
    " Tensor(a!) value, Tensor(b!) index, Tensor(c!) bad",
)
def _similarity_argmax(a, b, a_offsets, b_offsets, cosine=True, bias=None, check=True):
    a, b = core.check_rows(a, "a"), core.check_rows(b, "b")
    core.check_same(a, b, "a and b")
    core.check_offsets(a_offsets, len(a), a.device, "a_offsets")
    core.check_offsets(b_offsets, len(b), a.device, "b_offsets")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have one width D, got {a.shape[1]} and {b.shape[1]}")
    if len(a_offsets) != len(b_offsets):
        raise ValueError(f"a_offsets and b_offsets must have one length, got {len(a_offsets)} and {len(b_offsets)}")
    if bias is not None:
        if bias.shape != b.shape[:1] or bias.device != a.device or not bias.is_floating_point():
            raise ValueError(
                f"bias must be floating point of shape [rows of b] = {[len(b)]} on a's device, got {list(bias.shape)}"
            )
        bias = (bias.float() if a.dtype != torch.float64 else bias.double()).contiguous()
    if a.device.type == "cpu":
        for item, (n, m) in enumerate(zip(a_offsets.diff().tolist(), b_offsets.diff().tolist(), strict=True)):
            if n and not m:
                raise ValueError(f"b must have at least one row in every item, got none in item {item}")
    if compiled := core.kernel("similarity_argmax", a, b):
        (value, index), bad = _fake(a, b, a_offsets, b_offsets), core.new_flags(a, 2)
        compiled(a, b, a_offsets, b_offsets, cosine, bias, check, value, index, bad)
        if check:
            core.raise_not_finite(bad[0], "a")
            core.raise_not_finite(bad[1], "b")
        return value, index
    if check:
        core.check_finite(a, "a")
        core.check_finite(b, "b")
    value, index = _fake(a, b, a_offsets, b_offsets)
    for mine, theirs in core.items(a_offsets, b_offsets):
        x, y = core.wide(a[mine]), core.wide(b[theirs])
        similarity = x @ (y * core.reciprocal_norm(y)[:, None] if cosine else y).T
        if bias is not None:
            similarity = similarity + bias[theirs]
        similarity = core.narrow(similarity, a.dtype)  # rounded first: equal columns tie, argmax takes the first
        if mine.stop > mine.start:
            index[mine] = similarity.argmax(1)
        best = similarity.gather(1, index[mine, None])[:, 0]
        value[mine] = (best * core.reciprocal_norm(x) if cosine else best).to(value.dtype)
    return value, index


def nearest(
    a: Tensor,
    b: Tensor,
    metric: str = "cosine",
    *,
    a_offsets: Tensor | Sequence[int] | None = None,
    b_offsets: Tensor | Sequence[int] | None = None,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """For every row of a the nearest row of b in its item: (value, index), ties to the lowest index. Not differentiable.

    a [N, D] with b [V, D]; a [B, N, D] with b [B, V, D], or b [V, D] for all items; or both ragged with offsets, index local to
    the item. value: the cosine, or the squared distance for "sqeuclidean"; float32.
    """
    cosine = core.is_cosine(metric)
    if (a_offsets is None) != (b_offsets is None):
        raise ValueError("a_offsets and b_offsets must both be given or both be None, got one")
    shared = a_offsets is None and a.dim() == 3 and b.dim() == 2
    rows, ends, num_items = core.pack(a.reshape(-1, a.shape[-1]) if shared else a, a_offsets, "a")
    others, other_ends, other_items = core.pack(b, b_offsets, "b")
    if num_items != other_items:
        raise ValueError(f"a and b must hold the same number of items, got {num_items} and {other_items}")
    bias = None if cosine else others.detach().to(core.narrow(others[:0], others.dtype).dtype).square().sum(-1) / -2
    value, index = torch.ops.mmcompress.similarity_argmax(
        rows.detach(), others.detach(), ends, other_ends, cosine, bias, check_finite
    )
    if not cosine:
        value = (rows.detach().to(value.dtype).square().sum(-1) - 2 * value).clamp(min=0)
    return (value.reshape(a.shape[:-1]), index.reshape(a.shape[:-1])) if a_offsets is None else (value, index)


class Match(NamedTuple):
    """A bipartite matching of N tokens, of which r are merged away."""

    anchor: Tensor  # [B, K] ascending columns that stay, K = N - r
    assignment: Tensor  # [B, N] output of every column, in the order of anchor
    value: Tensor  # [B, ceil(N / 2)] float32, cosine of every even column to its best odd one (-inf: protected or masked)
    partner: Tensor  # [B, ceil(N / 2)] that odd one, as a column
    source: Tensor  # [B, r] ascending columns that are merged away


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    protect: int = 0,
    mask: Tensor | None = None,
    check_finite: bool = True,
) -> Match:
    """Match the r most similar even columns to their nearest odd columns (ToMe, steps 1 to 5); [N, D] or [B, N, D], not
    differentiable.

    The first `protect` columns (0 to 2) are never merged away nor merged into; `mask` [N] or [B, N] is False where a column
    must not match (give r at most the number of even columns that can). Ties: the lowest odd column, the lowest even column.
    """
    if metric.dim() not in (2, 3):
        raise ValueError(f"metric must have shape [N, D] or [B, N, D], got {list(metric.shape)}")
    if protect not in (0, 1, 2):
        raise ValueError(f"protect must be 0, 1 or 2, got {protect}")
    x = metric.detach() if metric.dim() == 3 else metric.detach()[None]
    num_items, n, width = x.shape
    if not 0 <= r <= max(n - protect, 0) // 2:
        raise ValueError(f"r must be between 0 and (N - protect) // 2 = {max(n - protect, 0) // 2}, got {r}")
    num_even, num_odd = (n + 1) // 2, n // 2
    blocked = torch.zeros(num_items, n, dtype=torch.bool, device=x.device)
    if mask is not None:
        if mask.shape != metric.shape[:-1]:
            raise ValueError(f"mask must have the shape of metric without D, {list(metric.shape[:-1])}, got {list(mask.shape)}")
        blocked = blocked | ~mask.bool().reshape(num_items, n)
    if protect:
        blocked = blocked | (torch.arange(n, device=x.device) < protect)
    flat = x.reshape(num_items * n, width)
    if n % 2 and num_items > 1:
        even, odd = x[:, 0::2].reshape(-1, width), x[:, 1::2].reshape(-1, width)
    else:
        even, odd = flat[0::2], flat[1::2]  # views: the kernel reads rows in place
    bias = torch.where(blocked[:, 1::2].reshape(-1), -torch.inf, 0.0) if mask is not None or protect else None
    columns = torch.arange(num_items, device=x.device)[:, None]
    if num_odd == 0:
        value, partner = (
            x.new_full((num_items, num_even), -torch.inf, dtype=torch.float32),
            torch.zeros_like(blocked[:, 0::2], dtype=torch.int64),
        )
    else:
        ends = torch.arange(num_items + 1, device=x.device)
        value, partner = torch.ops.mmcompress.similarity_argmax(
            even, odd, ends * num_even, ends * num_odd, True, bias, check_finite
        )
        value, partner = value.reshape(num_items, num_even), partner.reshape(num_items, num_even) * 2 + 1
        if bias is not None:
            value = torch.where(blocked[:, 0::2], -torch.inf, value)
    if r:
        ends = torch.arange(num_items + 1, device=x.device)
        source = torch.ops.mmcompress.top_rows(value.reshape(-1), ends * num_even, ends * r, num_items * r, check_finite)
        source = (source.reshape(num_items, r) - columns * num_even) * 2
    else:
        source = partner.new_empty((num_items, 0))
    stays = torch.ones(num_items, n, dtype=torch.bool, device=x.device).scatter(1, source, False)
    anchor = torch.sort(stays, dim=1, descending=True, stable=True).indices[:, : n - r]
    order = stays.cumsum(1) - 1  # output of every column that stays
    target = partner.gather(1, source // 2)
    assignment = order.scatter(1, source, order.gather(1, target))
    result = Match(anchor, assignment, value, partner, source)
    return result if metric.dim() == 3 else Match(*(t[0] for t in result))
