"""k-means with k-means++ seeding (Arthur and Vassilvitskii 2007), spherical or Euclidean."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmcompress.ops import core


@core.operator(
    "kmeans_pp(Tensor x, Tensor uniform, SymInt K, bool cosine=False, float eps=0.0, bool check=True) -> Tensor",
    lambda x, uniform, K, cosine=False, eps=0.0, check=True: x.new_empty((K,), dtype=torch.int64),
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
    uniform = uniform.double()
    if compiled := core.kernel("kmeans_pp", x):
        out, bad = compiled(x, uniform, K, cosine, eps, check)
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


class KMeans(NamedTuple):
    assignment: Tensor  # [B, N] cluster of every row under the centroids before the last update
    centroid: Tensor  # [B, K, D] in x's dtype: mean of the rows, of the unit rows if the metric is cosine
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
    Centroids are kept in x's dtype. Not differentiable.
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
        centroid = rows[torch.cat(seeds)] if seeds else rows[:0]
    else:
        if init.shape != (*((num_items,) if offsets is not None or x.dim() == 3 else ()), num_clusters, width):
            raise ValueError(f"init must have shape [K, D] = {[num_clusters, width]} per item, got {list(init.shape)}")
        centroid = init.detach().to(rows.dtype).reshape(num_items * num_clusters, width)
        if check_finite:
            core.check_finite(centroid, "init")
    total = num_items * num_clusters
    out_ends = torch.arange(num_items + 1, device=x.device) * num_clusters
    shift = 0
    if num_items != 1:
        item = torch.searchsorted(ends[1:], torch.arange(len(rows), device=x.device), right=True)
        shift = item * num_clusters
    value = torch.float64 if rows.dtype == torch.float64 else torch.float32
    # the mean of unit rows, without a normalised copy: weights 1 / norm, and at the end the sum of weights over the count
    weight = core.reciprocal_norm(rows.to(value)) if cosine else None
    for step in range(num_iterations):
        bias = None if cosine else centroid.to(value).square().sum(-1) / -2
        _, local = torch.ops.mmcompress.similarity_argmax(
            rows, centroid, ends, out_ends, cosine, bias, check_finite and step == 0
        )
        assignment = local + shift
        mean, weights = torch.ops.mmcompress.merge_mean(rows, assignment, total, weight, False)
        count = torch.zeros(total, dtype=torch.int64, device=x.device).index_add(0, assignment, torch.ones_like(assignment))
        if cosine:
            mean = (mean * (weights / count.clamp(min=1))[:, None]).to(rows.dtype)
        centroid = torch.where(count[:, None] > 0, mean, centroid)
    if offsets is not None or x.dim() == 3:
        centroid, count = centroid.reshape(num_items, num_clusters, width), count.reshape(num_items, num_clusters)
    return KMeans(core.unpack(local, x, offsets, local=False), centroid, count)
