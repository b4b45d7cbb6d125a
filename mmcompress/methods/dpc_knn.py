"""Density-peak clustering with k nearest neighbours; every cluster becomes one token at the place of its centre.

Source: the clustering of TCFormer (Zeng et al., arXiv 2204.08680), Chat-UniVi (Jin et al., arXiv 2311.08046) and PPE; their
released functions agree. Differences: ties go to the lower index (released: random noise), densities are compared as
logarithms (in float32 they underflow on wide features), outputs stand in raster order of their centres (released: by
descending score) at the centre's position (released: renumbered). One stage; chain several for more, `dpc_knn | dpc_knn`.
"""

from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.compressor import Merger
from mmcompress.registry import register
from mmcompress.tokens import Reduction, Tokens, identity, merge


@register
class DpcKnn(Merger):
    """Cluster an item's tokens around K density peaks and average each cluster.

    num_neighbors: neighbours in the density estimate, the token itself among them; fewer where K is smaller.
    weights: of the tokens in their cluster's mean, "ones" or "norm" (the feature's length).
    mode: "corrected" (K = num_kept(N, keep_ratio)) or "official" (K = ⌈N·keep_ratio⌉).
    """

    keep_ratio: float = 0.45
    num_neighbors: int = 5
    weights: str = "ones"
    mode: str = "corrected"

    def check(self) -> None:
        if isinstance(self.num_neighbors, bool) or not isinstance(self.num_neighbors, Integral) or self.num_neighbors < 1:
            raise ValueError(f"num_neighbors must be an integer >= 1, got {self.num_neighbors!r}")
        if self.weights not in ("ones", "norm"):
            raise ValueError(f"weights must be 'ones' or 'norm', got {self.weights!r}")
        if self.mode not in ("corrected", "official"):
            raise ValueError(f"mode must be 'corrected' or 'official', got {self.mode!r}")

    def num_kept(self, num_tokens: int) -> int:
        p, q = self._ratio
        return super().num_kept(num_tokens) if self.mode == "corrected" else -(-num_tokens * p // q)

    def peaks(self, tokens: Tokens, K: int) -> ops.DensityPeaks:
        """The K centres, best score first, and every token's nearest."""
        k = self.num_neighbors if self.num_neighbors <= K else min(3, max(K // 2, 1))
        return ops.density_peaks(tokens.x.float(), K, k)

    def assign(self, tokens: Tokens, K: int) -> tuple[Tensor, Tensor]:
        peaks = self.peaks(tokens, K)
        anchor, rank = peaks.center.sort(dim=1)
        return rank.argsort(dim=1).gather(1, peaks.assignment), anchor

    def compress(self, tokens: Tokens) -> Reduction:
        K = self.num_kept(tokens.num_tokens)
        if tokens.num_tokens == K:
            return identity(tokens)
        assignment, anchor = self.assign(tokens, K)
        size = weight = tokens.size
        if self.weights == "norm":
            weight = size * tokens.x.detach().float().norm(dim=-1)
            total = ops.sum_into(weight, assignment, K)
            weight = torch.where(total.gather(1, assignment) > 0, weight, size)  # a cluster of zero tokens: their plain mean
        out = merge(replace(tokens, size=weight), assignment, anchor)
        x = out.x * (out.size / (out.size + 1e-6)).to(out.x.dtype)[..., None]  # the released denominator
        return replace(out, x=x, size=ops.sum_into(size, assignment, K))
