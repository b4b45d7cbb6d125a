"""k-means with k-means++ seeding (Arthur and Vassilvitskii 2007), spherical or Euclidean."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmcompress.ops import core


@core.operator(
    "kmeans_pp(Tensor x, Tensor uniform, SymInt K, bool cosine=False, float eps=0.0, bool check=True) -> Tensor",
    lambda x, uniform, K, cosine=False, eps=0.0, check=True: x.new_empty((K,), dtype=torch.int64),
    "Tensor x, Tensor uniform, bool cosine, float eps, bool check, Tensor(a!) picks, Tensor(b!) bad",
)
def _kmeans_pp(x, uniform, K, cosine=False, eps=0.0, check=True):
    """Seeds: row floor(uniform_0 N), then inverse-CDF sampling on the running minimum squared distance + eps."""
    x = core.check_rows(x)
    if not 1 <= K <= len(x):
        raise ValueError(f"K must be between 1 and N = {len(x)}, got {K}")
    if uniform.shape != (K,) or not uniform.is_floating_point() or uniform.device != x.device:
        raise ValueError(
            f"uniform must be floating point of shape [K] = {[K]} on x's device, got {uniform.dtype} {list(uniform.shape)}"
        )
    if x.device.type == "cpu" and not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError(f"uniform must be in [0, 1), got {uniform.min():.6g} to {uniform.max():.6g}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    uniform = uniform.double().contiguous()
    if compiled := core.kernel("kmeans_pp", x):
        out, bad = torch.empty(K, dtype=torch.int64, device=x.device), core.new_flags(x)
        compiled(x, uniform, cosine, eps, check, out, bad)
        if check:
            core.raise_not_finite(bad, "x")
        return out
    if check:
        core.check_finite(x)
    dtype, x = x.dtype, core.wide(x)
    if cosine:
        x = x * core.reciprocal_norm(x)[:, None]
    half = torch.full_like(x[:, 0], 0.5) if cosine else x.square().sum(-1) / 2
    minimum = torch.full_like(half, torch.inf)
    picks = torch.empty(K, dtype=torch.int64, device=x.device)
    last = torch.full((), len(x) - 1, device=x.device)
    pick = torch.minimum((uniform[0] * len(x)).long(), last)
    for step in range(K):
        if step:
            weight = minimum + eps
            total = weight.cumsum(0)
            uniform_pick = (uniform[step] * len(x)).long()  # every distance is zero: all rows are alike
            pick = torch.where(total[-1] > 0, torch.searchsorted(total, uniform[step] * total[-1], right=True), uniform_pick)
            pick = torch.minimum(pick, last)
        picks[step] = pick
        limit = half + half[pick]
        distance = limit - x @ x[pick]
        distance = core.narrow(2 * torch.where(distance > core.TIE * limit, distance, 0), dtype)
        minimum = torch.minimum(minimum, distance.to(minimum.dtype))
        minimum[pick] = 0
    return picks


def _fake_lloyd(x, init, offsets, iterations, cosine=True, check=True):
    assignment, size = x.new_empty((x.shape[0],), dtype=torch.int64), x.new_empty((init.shape[0],), dtype=torch.int64)
    return assignment, torch.empty_like(init), size


@core.operator(
    "kmeans_lloyd(Tensor x, Tensor init, Tensor offsets, int iterations, bool cosine=True, bool check=True)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_lloyd,
    "Tensor x, Tensor offsets, int iterations, bool cosine, bool check,"
    " Tensor(a!) centroid, Tensor(b!) assignment, Tensor(c!) size, Tensor(d!) bad",
)
def _kmeans_lloyd(x, init, offsets, iterations, cosine=True, check=True):
    """Assign and update `iterations` times: (assignment [M] local to the item, centroids [B K, D], sizes [B K])."""
    x, init = core.check_rows(x), core.check_rows(init, "init").contiguous()
    core.check_offsets(offsets, len(x), x.device)
    num_items, centroids = len(offsets) - 1, torch.float64 if x.dtype == torch.float64 else torch.float32
    if init.shape[1] != x.shape[1] or init.device != x.device or (len(init) % num_items if num_items else len(init)):
        want = f"[B K, D] with B = {num_items}, D = {x.shape[1]}, on x's device"
        raise ValueError(f"init must have shape {want}, got {list(init.shape)}")
    if init.dtype != centroids:
        raise TypeError(f"init must be {centroids}, got {init.dtype}")
    if len(x) and not len(init):
        raise ValueError("init must have at least one row per item, got none")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if check:
        core.check_finite(init, "init")
    if compiled := core.kernel("kmeans_lloyd", x):
        (assignment, _, size), bad, centroid = _fake_lloyd(x, init, offsets, iterations), core.new_flags(x), init.clone()
        compiled(x, offsets, iterations, cosine, check, centroid, assignment, size, bad)
        if check:
            core.raise_not_finite(bad, "x")
        return assignment, centroid, size
    if check:
        core.check_finite(x)
    k = len(init) // max(num_items, 1)
    out_ends = torch.arange(num_items + 1, device=x.device) * k
    shift = torch.searchsorted(offsets[1:], torch.arange(len(x), device=x.device), right=True) * k
    rows, centroid = x.to(centroids), init
    # the mean of unit rows: weights 1 / norm, then the sum of weights over the count
    weight = core.reciprocal_norm(rows) if cosine else None
    size = torch.zeros(len(init), dtype=torch.int64, device=x.device)
    assignment = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for _ in range(iterations):
        bias = None if cosine else centroid.square().sum(-1) / -2
        _, assignment = torch.ops.mmcompress.similarity_argmax(rows, centroid, offsets, out_ends, cosine, bias, False)
        mean, weights = torch.ops.mmcompress.merge_mean(rows, assignment + shift, len(init), weight, False)
        size = torch.zeros_like(size).index_add(0, assignment + shift, torch.ones_like(assignment))
        if cosine:
            mean = mean * (weights / size.clamp(min=1))[:, None]
        centroid = torch.where(size[:, None] > 0, mean, centroid)
    return assignment, centroid.clone(), size


class KMeans(NamedTuple):
    assignment: Tensor  # [B, N] cluster of every row under the centroids before the last update
    centroid: Tensor  # [B, K, D] float32: mean of the rows, of the unit rows if the metric is cosine
    size: Tensor  # [B, K] int64


def kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    num_iterations: int = 10,
    metric: str = "cosine",
    init: Tensor | None = None,
    generator: torch.Generator | None = None,
    offsets: Tensor | Sequence[int] | None = None,
    check_finite: bool = True,
) -> KMeans:
    """A fixed number of Lloyd iterations from `init` [K, D] or [B, K, D], or from k-means++ seeds drawn with `generator` (a
    fresh one, seed 0).

    x [N, D], [B, N, D] or ragged [M, D] with offsets. An empty cluster keeps its centroid; ties go to the lowest cluster.
    Centroids are float32 whatever x is. Not differentiable.
    """
    cosine = core.is_cosine(metric)
    rows, ends, num_items = core.pack(x.detach(), offsets)
    rows = core.check_rows(rows)
    width = rows.shape[1]
    if num_clusters < 1 or (offsets is None and num_items and num_clusters > x.shape[-2]):
        limit = "" if offsets is not None else f" = {x.shape[-2]}"
        raise ValueError(f"num_clusters must be between 1 and N{limit}, got {num_clusters}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    if init is None:
        generator = generator or torch.Generator(device=x.device).manual_seed(0)
        uniform = torch.rand(num_items, num_clusters, dtype=torch.float64, generator=generator, device=x.device)
        seeds = []
        for item, (part,) in enumerate(core.items(ends)):
            seeds.append(
                part.start + torch.ops.mmcompress.kmeans_pp(rows[part], uniform[item], num_clusters, cosine, 0.0, check_finite)
            )
        init = rows[torch.cat(seeds)] if seeds else rows[:0]
        if cosine:
            init = init * core.reciprocal_norm(core.narrow(init, init.dtype))[:, None]
    elif init.shape != (*((num_items,) if offsets is not None or x.dim() == 3 else ()), num_clusters, width):
        raise ValueError(f"init must have shape [K, D] = {[num_clusters, width]} per item, got {list(init.shape)}")
    start = core.narrow(init.detach().reshape(num_items * num_clusters, width), rows.dtype).to(rows.device)
    assignment, centroid, size = torch.ops.mmcompress.kmeans_lloyd(rows, start, ends, num_iterations, cosine, check_finite)
    if offsets is not None or x.dim() == 3:
        centroid, size = centroid.reshape(num_items, num_clusters, width), size.reshape(num_items, num_clusters)
    return KMeans(core.unpack(assignment, x, offsets, x.shape[-2], local=False), centroid, size)
