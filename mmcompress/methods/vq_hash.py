"""VQToken: cluster an item's tokens into a small codebook of its own, and remember in a hash which code stands where.

Source: Zhang and Fu, "Neural Discrete Token Representation Learning for Extreme Token Reduction in Video LLMs" (VQToken, arXiv
2503.16980, NeurIPS 2025); released code Hai-chao-Zhang/VQToken @ 019f89f. With the codebook alone (`mapper=False`, all that is
training-free) the paper reports 35.2 % where the trained model has 57.5 %: a baseline, not VQToken. `python -m
mmcompress.train.vq_hash` trains the mapper.

Differences: k-means is seeded and guards zero tokens (released: NaN); a codeword is the mean of the tokens (released: of unit
tokens, which loses the projector's scale); the number of codes is at the bend of the distortion (released: the offset of the
search is forgotten); codes stand in the order of their first token, at its position, and empty ones are left out (released:
renumbered, in the order of the clusters). The paper's MLP of the flattened index map fits one grid only, and the released
attention reads cluster numbers as if they were quantities and is off in the shipped configuration; ours averages over each
code's tokens what a layer makes of their learned places, so it takes any grid and no numbering, and knows a way from the way
back. `mode="official"` covers start, Lloyd, elbow, normalised codebook and labels of the release. Gradients pass through the
codewords' means, 1 / n to each of n tokens, not through labels.
"""

from functools import cache
from numbers import Integral, Real
from typing import ClassVar

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.compressor import Compressor
from mmcompress.methods._vq import Clusters, HashMapper, TokenHash, choose, lloyd, seed_rows, unit
from mmcompress.registry import register
from mmcompress.tokens import Reduction, Tokens

RULES = ("knee", "official", "silhouette")


@register
class VqHash(Compressor):
    """Average an item's tokens into few codewords by k-means; a trained mapper tells each where its tokens stood.

    num_codes: the most codes of an item (codes that stay empty are left out); None: num_kept(N, keep_ratio). Only then may
    keep_ratio be set; at 1 it is the identity whatever num_codes says.
    adaptive: choose the number of codes per item, k_min to k_max, in place of num_codes. An item of at most k_min + 1 tokens
    stays whole.
    k_min: lowest number of codes tried. k_max: highest, at least k_min + 2.
    rule: of the choice: "knee" (sharpest bend of the distortion), "official" (the release's offset), "silhouette".
    codebook: "raw" (mean of the tokens) or "normalised" (mean of the unit tokens).
    mode: "corrected", or "official": rule "official" and codebook "normalised", whatever those fields say, and no mapper.
    max_iter: of k-means; None: 50, adaptive 100. tol: k-means rests where the centroids move by less, in all.
    reseed_empty: an empty code takes the token farthest from its centroid.
    seed: of the k-means++ draws and the mapper's first weights.
    mapper: read the token hash; needs width, and training: untrained it changes nothing.
    width: D of the tokens. place_width: of the mapper's places. num_places: learned along each of t, h and w; a longer grid
    stretches them. num_heads: of the attention over the codes; divides width.
    """

    has_ratio: ClassVar[bool] = False

    num_codes: int | None = 32
    adaptive: bool = False
    k_min: int = 12
    k_max: int = 32
    rule: str = "knee"
    codebook: str = "raw"
    mode: str = "corrected"
    max_iter: int | None = None
    tol: float = 1e-4
    reseed_empty: bool = False
    seed: int = 0
    mapper: bool = False
    width: int | None = None
    place_width: int = 64
    num_places: int = 32
    num_heads: int = 8

    def check(self) -> None:
        for name in ("num_codes", "k_min", "k_max", "max_iter", "width", "place_width", "num_places", "num_heads"):
            value, optional = getattr(self, name), name in ("num_codes", "max_iter", "width")
            if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise ValueError(f"{name} must be {'None or ' if optional else ''}an integer >= 1, got {value!r}")
        for name, known in (("rule", RULES), ("codebook", ("raw", "normalised")), ("mode", ("corrected", "official"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.k_max < self.k_min + 2:
            raise ValueError(f"k_max must be at least k_min + 2 = {self.k_min + 2} to show a bend, got {self.k_max}")
        if isinstance(self.tol, bool) or not isinstance(self.tol, Real) or not 0 <= self.tol < float("inf"):
            raise ValueError(f"tol must be a finite number >= 0, got {self.tol!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or self.seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {self.seed!r}")
        for name in ("adaptive", "reseed_empty", "mapper"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.mode == "official" and (self.mapper or self.reseed_empty):
            raise ValueError("mode 'official' must have mapper and reseed_empty False, got True")
        if self.mapper and (self.width is None or self.width % self.num_heads):
            raise ValueError(f"width must be D of the tokens, a multiple of num_heads = {self.num_heads}, got {self.width}")

    def check_keep_ratio(self) -> None:
        if self.keep_ratio not in (1, type(self).keep_ratio) and (self.adaptive or self.num_codes is not None):
            raise ValueError(f"keep_ratio counts only with num_codes=None and adaptive=False, got keep_ratio={self.keep_ratio}")

    def setup(self) -> None:
        if self.mapper and self.width is not None:
            self.hash_mapper = HashMapper(self.width, self.place_width, self.num_places, self.num_heads, self.seed)

    def num_kept(self, num_tokens: int) -> int:
        """The most that an item of N tokens may keep."""
        if self.is_identity:
            return num_tokens
        if self.adaptive:
            return min(num_tokens, max(12, self.k_max + 1) if self._rule == "official" else self.k_max)
        return super().num_kept(num_tokens) if self.num_codes is None else min(num_tokens, self.num_codes)

    @property
    def _rule(self) -> str:
        return "official" if self.mode == "official" else self.rule

    def compress(self, tokens: Tokens) -> Reduction:
        x = tokens.x
        hashed = TokenHash.of(torch.stack([self.labels(item) for item in x.detach().float()]))
        if self.mode == "official" or self.codebook == "normalised":
            x = unit(x.to(torch.promote_types(x.dtype, torch.float32)))
        x, size = ops.merge(x, hashed.assignment, hashed.anchor.shape[1], tokens.size)
        x = x.to(tokens.x.dtype)
        if self.mapper:
            x = self.hash_mapper(x, hashed, tokens.position, tokens.layout.grid)
        mask = None if bool(hashed.mask.all()) else hashed.mask
        return Reduction(x, hashed.anchor, hashed.assignment, size.to(tokens.size.dtype), mask=mask)

    @torch.compiler.disable  # a loop that ends where the data says so
    @torch.no_grad()
    def labels(self, x: Tensor) -> Tensor:
        """Cluster of every token of one item x [N, D] float32, numbered as k-means left them: [N]."""
        N = len(x)
        most, search = self.num_kept(N), self.adaptive and self.k_min + 2 <= N
        if most == N and not search:
            return torch.arange(N, device=x.device)
        start = unit(x[seed_rows(x, most, self.seed)])
        max_iter = self.max_iter or (100 if self.adaptive else 50)

        @cache
        def run(num_codes: int) -> Clusters:
            return lloyd(x, start[:num_codes], max_iter, self.tol, self.reseed_empty)

        return run(choose(x, self.k_min, min(self.k_max, N), self._rule, run, self.seed) if search else most).labels
