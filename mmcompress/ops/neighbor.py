"""The k most similar other rows of every row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.ops import core


def _fake(x, offsets, k, check=True):
    value = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], k), dtype=value), x.new_empty((x.shape[0], k), dtype=torch.int64)


@core.operator(
    "cosine_top_k(Tensor x, Tensor offsets, SymInt k, bool check=True) -> (Tensor, Tensor)",
    _fake,
    "Tensor x, Tensor offsets, int k, bool check, Tensor(a!) value, Tensor(b!) index, Tensor(c!) bad",
)
def _cosine_top_k(x, offsets, k, check=True):
    x = core.check_rows(x)
    core.check_offsets(offsets, len(x), x.device)
    if x.device.type == "cpu":
        for item, n in enumerate(offsets.diff().tolist()):
            if n and not 1 <= k <= n - 1:
                raise ValueError(f"k must be between 1 and N - 1 = {n - 1} in item {item}, got {k}")
    if (not x.is_cuda or k <= core.CUDA_NEIGHBORS) and (compiled := core.kernel("cosine_top_k", x)):
        (value, index), bad = _fake(x, offsets, k), core.new_flags(x)
        compiled(x, offsets, k, check, value, index, bad)
        if check:
            core.raise_not_finite(bad, "x")
        return value, index
    if check:
        core.check_finite(x)
    value, index = _fake(x, offsets, k)
    for (rows,) in core.items(offsets):
        y = core.wide(x[rows])
        y = y * core.reciprocal_norm(y)[:, None]
        similarity = core.narrow(y @ y.T, x.dtype).fill_diagonal_(-torch.inf)
        best, order = torch.sort(similarity, dim=1, descending=True, stable=True)
        value[rows], index[rows] = best[:, :k], order[:, :k]
    return value, index


def neighbors(
    x: Tensor, k: int, *, offsets: Tensor | Sequence[int] | None = None, check_finite: bool = True
) -> tuple[Tensor, Tensor]:
    """The k largest cosines of every row to the other rows of its item, and their columns: ([B, N, k] float32, [B, N, k]).

    x [N, D], [B, N, D] or ragged [M, D] with offsets (indices local to the item). Values descend; ties go to the lowest column.
    """
    rows, ends, num_items = core.pack(x, offsets)
    if num_items and (k < 1 or (offsets is None and k >= x.shape[-2])):
        raise ValueError(f"k must be between 1 and N - 1{'' if offsets is not None else f' = {x.shape[-2] - 1}'}, got {k}")
    value, index = torch.ops.mmcompress.cosine_top_k(rows.detach(), ends, k, check_finite)
    n = x.shape[-2]
    return core.unpack(value, x, offsets, n, local=False), core.unpack(index, x, offsets, n, local=False)
