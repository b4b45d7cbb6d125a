"""k-means merger: K clusters of an item's tokens, each averaged to one token at the place of its most central member.

Source: Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii, SODA 2007). Ours: exactly K tokens come out. A cluster
that stays empty takes the token that lies farthest from its centroid and stands for no cluster yet. The plain base for
position_merge; vq_hash chooses the number of clusters and tells where its members stood.
"""

from numbers import Integral

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.compressor import Merger
from mmcompress.registry import register
from mmcompress.tokens import Tokens, gather

TIE = 1e-3
"""Distances from the centroid that differ by less, relatively, are equal: those of two members alone always are."""


@register
class Kmeans(Merger):
    """Cluster an item's tokens by k-means and average each cluster at the place of the member nearest to its centroid.

    num_iterations: of Lloyd's algorithm, an integer >= 1. seed: of the k-means++ draws.
    """

    num_iterations: int = 10
    seed: int = 0

    def check(self) -> None:
        for name, least in (("num_iterations", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

    def assign(self, tokens: Tokens, K: int) -> tuple[Tensor, Tensor]:
        x = tokens.x.detach().float()
        B, N = x.shape[:2]
        column = torch.arange(N, device=x.device).expand(B, N)
        if K == N:
            return column, column
        label, centroid = self.clusters(x, K)
        distance = (x - gather(centroid, label)).square().sum(-1)
        nearest = torch.full((B, K), torch.inf, device=x.device).scatter_reduce(1, label, distance, "amin")
        central = distance <= nearest.gather(1, label) * (1 + TIE)
        center = torch.full_like(label[:, :K], N).scatter_reduce(1, label, torch.where(central, column, N), "amin")
        empty = center == N
        center = center.clamp(max=N - 1)  # of an empty cluster: rubbish
        taken = torch.zeros(B, N, device=x.device).scatter_add(1, center, (~empty).float()) > 0
        far = distance.masked_fill(taken, -1).argsort(dim=1, descending=True, stable=True)
        center = torch.where(empty, far.gather(1, (empty.cumsum(1) - 1).clamp(min=0)), center)
        anchor, cluster = center.sort(dim=1)
        slot = cluster.argsort(dim=1).gather(1, label)
        return slot.scatter(1, anchor, column[:, :K]), anchor

    @torch.compiler.disable
    def clusters(self, x: Tensor, K: int) -> tuple[Tensor, Tensor]:
        """Labels [B, N] and centroids [B, K, D] of every item by itself, each from the same draws."""
        uniform = torch.rand(K, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed)).to(x.device)
        seeds = torch.stack([item[torch.ops.mmcompress.kmeans_pp(item, uniform, K)] for item in x])
        out = ops.kmeans(x, K, num_iterations=self.num_iterations, metric="sqeuclidean", init=seeds)
        return out.assignment, out.centroid
