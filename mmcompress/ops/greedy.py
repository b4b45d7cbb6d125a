"""Greedy diversification: farthest-first (k-center) and smallest running similarity sum (max-sum).

Sources: Gonzalez 1985 (farthest-first); with a cosine distance it is the selection of DivPrune (Alvar et al., arXiv 2503.02175)
and of ToDRE (Li et al., arXiv 2505.18757, v1); max-sum is ToDRE v2. Prefixes nest: the result for k is the first k picks of the
result for any larger k.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.ops import core


def _fake(x, offsets, out_offsets, num_out, *_args, **_kwargs):
    return x.new_empty((num_out,), dtype=torch.int64)


def _check(x, offsets, out_offsets, num_out, start):
    x = core.check_rows(x)
    core.check_offsets(offsets, len(x), x.device)
    core.check_offsets(out_offsets, num_out, x.device, "out_offsets")
    core.check_counts(offsets, out_offsets, num_out)
    if start is not None:
        if start.shape != offsets[1:].shape or start.dtype != torch.int64 or start.device != x.device:
            raise ValueError(
                f"start must be int64 of shape [B] = {[len(offsets) - 1]} on x's device, got {start.dtype} {list(start.shape)}"
            )
        if x.device.type == "cpu":
            for item, (n, first) in enumerate(zip(offsets.diff().tolist(), start.tolist(), strict=True)):
                if n and not 0 <= first < n:
                    raise ValueError(f"start must be between 0 and N - 1 = {n - 1} in item {item}, got {first}")
    return x


@core.operator(
    "k_center(Tensor x, Tensor offsets, Tensor out_offsets, SymInt num_out, Tensor? start=None, bool cosine=True,"
    " bool check=True) -> Tensor",
    _fake,
    "Tensor x, Tensor offsets, Tensor out_offsets, Tensor? start, bool cosine, bool check, Tensor(a!) picks, Tensor(b!) bad",
)
def _k_center(x, offsets, out_offsets, num_out, start=None, cosine=True, check=True):
    x = _check(x, offsets, out_offsets, num_out, start)
    if compiled := core.kernel("k_center", x):
        out, bad = _fake(x, offsets, out_offsets, num_out), core.new_flags(x)
        compiled(x, offsets, out_offsets, start, cosine, check, out, bad)
        if check:
            core.raise_not_finite(bad, "x")
        return out
    if check:
        core.check_finite(x)
    out = torch.empty(num_out, dtype=torch.int64, device=x.device)
    for item, (rows, picks) in enumerate(core.items(offsets, out_offsets)):
        k = picks.stop - picks.start
        out[picks] = rows.start + k_center_reference(x[rows], k, 0 if start is None else start[item], cosine)
    return out


def k_center_reference(x: Tensor, k: int, start: int | Tensor = 0, cosine: bool = True) -> Tensor:
    """Picks of one item x [N, D]; distance = |a|²/2 + |b|²/2 − a·b, with unit rows 1 − cos."""
    dtype, x = x.dtype, core.wide(x)
    if cosine:
        x = x * core.reciprocal_norm(x)[:, None]
    half = torch.full_like(x[:, 0], 0.5) if cosine else x.square().sum(-1) / 2  # a zero row has similarity 0, distance 1
    distance = torch.full((len(x),), torch.inf, device=x.device, dtype=core.narrow(x[:0], dtype).dtype)
    picks = torch.empty(k, dtype=torch.int64, device=x.device)
    pick = torch.as_tensor(start, device=x.device)
    for step in range(k):
        picks[step] = pick
        new = half + half[pick] - x @ x[pick]
        distance = torch.minimum(distance, core.narrow(torch.where(new > core.TIE * 2 * half, new, 0), dtype))
        distance[pick] = -1  # never twice, also among duplicates
        pick = distance.argmax()  # the first of equal values
    return picks


@core.operator(
    "max_sum(Tensor x, Tensor offsets, Tensor out_offsets, SymInt num_out, Tensor? start=None, bool check=True) -> Tensor",
    _fake,
    "Tensor x, Tensor offsets, Tensor out_offsets, Tensor? start, bool check, Tensor(a!) picks, Tensor(b!) bad",
)
def _max_sum(x, offsets, out_offsets, num_out, start=None, check=True):
    x = _check(x, offsets, out_offsets, num_out, start)
    if compiled := core.kernel("max_sum", x):
        out, bad = _fake(x, offsets, out_offsets, num_out), core.new_flags(x)
        compiled(x, offsets, out_offsets, start, check, out, bad)
        if check:
            core.raise_not_finite(bad, "x")
        return out
    if check:
        core.check_finite(x)
    out = torch.empty(num_out, dtype=torch.int64, device=x.device)
    for item, (rows, picks) in enumerate(core.items(offsets, out_offsets)):
        k = picks.stop - picks.start
        out[picks] = rows.start + max_sum_reference(x[rows], k, 0 if start is None else start[item])
    return out


def max_sum_reference(x: Tensor, k: int, start: int | Tensor = 0) -> Tensor:
    """Picks of one item x [N, D]: each has the smallest sum of cosines to all earlier picks."""
    dtype, x = x.dtype, core.wide(x)
    x = x * core.reciprocal_norm(x)[:, None]
    total = torch.zeros_like(x[:, 0])
    picks = torch.empty(k, dtype=torch.int64, device=x.device)
    pick = torch.as_tensor(start, device=x.device)
    for step in range(k):
        picks[step] = pick
        similarity = core.narrow(x @ x[pick], dtype).to(
            total.dtype
        )  # rounded first, so that the sums are exact and equal rows tie
        total += torch.where(similarity > 1 - core.TIE, 1, similarity)
        total[pick] = torch.inf
        pick = total.argmin()
    return picks


def _first(first: int | Sequence[int] | Tensor, x: Tensor, offsets, num_items: int) -> Tensor | None:
    if isinstance(first, Tensor):
        return first.to(x.device).reshape(num_items)
    if isinstance(first, Sequence):
        return torch.tensor(list(first), dtype=torch.int64, device=x.device).reshape(num_items)
    if not isinstance(first, (int, torch.SymInt)):
        raise TypeError(f"first must be an integer, or one integer per item, got {type(first).__name__}")
    if first < 0 or (offsets is None and num_items and first >= x.shape[-2]):
        raise ValueError(
            f"first must be between 0 and N - 1{'' if offsets is not None else f' = {x.shape[-2] - 1}'}, got {first}"
        )
    return torch.full((num_items,), first, dtype=torch.int64, device=x.device) if first else None


def k_center(
    x: Tensor,
    k: int | Sequence[int],
    first: int | Sequence[int] | Tensor = 0,
    metric: str = "cosine",
    *,
    offsets: Tensor | Sequence[int] | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Farthest-first picks in order of selection, int64: [N, D] → [k], [B, N, D] → [B, k], ragged → packed row ids [sum of k].

    `first` is the first pick (a column of the item; one per item as a sequence or tensor). metric: "cosine" (1 − cos) or
    "sqeuclidean". Ragged: x [M, D] with offsets [B + 1] (0 to M), k one integer or one per item. Ties go to the lowest index.
    Not differentiable.
    """
    rows, ends, num_items = core.pack(x, offsets)
    out_ends, total = core.pack_counts(k, x, offsets is not None, num_items)
    start, cosine = _first(first, x, offsets, num_items), core.is_cosine(metric)
    picks = torch.ops.mmcompress.k_center(rows.detach(), ends, out_ends, total, start, cosine, check_finite)
    return core.unpack(picks, x, offsets, k)


def max_sum(
    x: Tensor,
    k: int | Sequence[int],
    first: int | Sequence[int] | Tensor = 0,
    *,
    offsets: Tensor | Sequence[int] | None = None,
    check_finite: bool = True,
) -> Tensor:
    """Picks in order of selection, each with the smallest sum of cosines to the earlier ones; arguments as in `k_center`."""
    rows, ends, num_items = core.pack(x, offsets)
    out_ends, total = core.pack_counts(k, x, offsets is not None, num_items)
    start = _first(first, x, offsets, num_items)
    picks = torch.ops.mmcompress.max_sum(rows.detach(), ends, out_ends, total, start, check_finite)
    return core.unpack(picks, x, offsets, k)
