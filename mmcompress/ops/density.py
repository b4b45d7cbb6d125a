"""Density peaks with k nearest neighbours, the clustering of TCFormer (arXiv 2204.08680), Chat-UniVi (arXiv 2311.08046) and
PPE.

Differences to the released functions: densities are compared as logarithms (exp underflows for wide features, and then every
density ties), and equal densities are ordered by index instead of by random noise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmcompress.ops import core
from mmcompress.ops.rows import ranked_rows


def _fake(x, offsets, k, check=True):
    value = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0],), dtype=value), x.new_empty((x.shape[0],), dtype=value)


@core.operator(
    "dpc_knn(Tensor x, Tensor offsets, SymInt k, bool check=True) -> (Tensor, Tensor)",
    _fake,
    "Tensor x, Tensor offsets, int k, bool check, Tensor(a!) density, Tensor(b!) delta, Tensor(c!) bad",
)
def _dpc_knn(x, offsets, k, check=True):
    """Log density and distance to the nearest denser row.

    Log density = minus the mean of the k smallest squared distances over D, self included.
    """
    x = core.check_rows(x)
    core.check_offsets(offsets, len(x), x.device)
    if x.device.type == "cpu":
        for item, n in enumerate(offsets.diff().tolist()):
            if n and not 1 <= k <= n:
                raise ValueError(f"num_neighbors must be between 1 and N = {n} in item {item}, got {k}")
    if (not x.is_cuda or k <= core.CUDA_NEIGHBORS) and (compiled := core.kernel("dpc_knn", x)):
        (density, delta), bad = _fake(x, offsets, k), core.new_flags(x)
        compiled(x, offsets, k, check, density, delta, bad)
        if check:
            core.raise_not_finite(bad, "x")
        return density, delta
    if check:
        core.check_finite(x)
    density, delta = _fake(x, offsets, k)
    for (rows,) in core.items(offsets):
        if rows.stop > rows.start:
            density[rows], delta[rows] = dpc_knn_reference(x[rows], k)
    return density, delta


def dpc_knn_reference(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    dtype, x = x.dtype, core.wide(x)
    square = x.square().sum(-1)
    limit = square[:, None] + square
    distance = limit - 2 * (x @ x.T)
    distance = core.narrow(torch.where(distance > core.TIE * limit, distance, 0) / x.shape[1], dtype)
    distance = torch.maximum(distance, distance.T).fill_diagonal_(0)
    density = core.narrow(-core.wide(distance.topk(k, largest=False, sorted=True).values).mean(1), dtype)
    column = torch.arange(len(x), device=x.device)
    denser = (density > density[:, None]) | (
        (density == density[:, None]) & (column < column[:, None])
    )  # [i, j]: j is denser than i
    delta = torch.where(denser, distance, torch.inf).amin(1)
    return density, torch.where(delta.isinf(), distance.max(), delta).sqrt()


class DensityPeaks(NamedTuple):
    center: Tensor  # [B, k] columns of the centres, best score first
    assignment: Tensor  # [B, N] rank of the nearest centre
    log_density: Tensor  # [B, N] float32
    delta: Tensor  # [B, N] float32, distance / sqrt(D) to the nearest denser row


def density_peaks(
    x: Tensor,
    k: int | Sequence[int],
    num_neighbors: int = 5,
    *,
    offsets: Tensor | Sequence[int] | None = None,
    check_finite: bool = True,
) -> DensityPeaks:
    """The k rows of largest density times separation, and every row's nearest of them.

    x [N, D], [B, N, D] or ragged [M, D] with offsets (then centres are packed row ids and k may be one integer per item).
    Ties go to the lowest column, in the assignment to the better rank; a centre is assigned to itself.
    """
    rows, ends, num_items = core.pack(x.detach(), offsets)
    out_ends, total = core.pack_counts(k, x, offsets is not None, num_items)
    if num_neighbors < 1 or (offsets is None and num_items and num_neighbors > x.shape[-2]):
        raise ValueError(
            f"num_neighbors must be between 1 and N{'' if offsets is not None else f' = {x.shape[-2]}'}, got {num_neighbors}"
        )
    density, delta = torch.ops.mmcompress.dpc_knn(rows, ends, num_neighbors, check_finite)
    center = ranked_rows(density + delta.log(), ends, out_ends, total)
    chosen = rows[center]
    bias = chosen.to(density.dtype).square().sum(-1) / -2
    _, assignment = torch.ops.mmcompress.similarity_argmax(rows, chosen, ends, out_ends, False, bias, False)
    item = torch.searchsorted(out_ends[1:], torch.arange(total, device=x.device), right=True)
    assignment = assignment.scatter(0, center, torch.arange(total, device=x.device) - out_ends[item])
    dense = [core.unpack(t, x, offsets, x.shape[-2], local=False) for t in (assignment, density, delta)]
    return DensityPeaks(core.unpack(center, x, offsets, k), *dense)
