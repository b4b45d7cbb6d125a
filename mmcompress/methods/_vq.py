"""The parts of `vq_hash`: spherical k-means until it rests, the number of codes, the token hash, the hash mapper.

Source: Zhang and Fu, VQToken (arXiv 2503.16980); the method's own docstring says where we differ. Everything up to the hash
works on one item x [N, D] at a time and passes no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmcompress import ops

EPS = 1e-12  # guards the norm of a token
SEEDING_EPS = 1e-6  # of the release: a token that is a centre already is drawn with this weight
SILHOUETTE_TOKENS = 1024


class Clusters(NamedTuple):
    labels: Tensor  # [N] nearest centroid
    centroid: Tensor  # [K, D] float32: mean of the members' unit tokens, up to tol
    num_iterations: int


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero."""
    return F.normalize(x, dim=-1, eps=EPS)


def seed_rows(x: Tensor, num_codes: int, seed: int) -> Tensor:
    """k-means++ on the unit tokens of x [N, D]: rows [K]. The first k of them are the rows for k codes and the same seed."""
    draws = torch.rand(num_codes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.ops.mmcompress.kmeans_pp(x, draws.to(x.device), num_codes, True, SEEDING_EPS)


def lloyd(x: Tensor, init: Tensor, max_iter: int, tol: float, reseed_empty: bool = False) -> Clusters:
    """Spherical k-means of x [N, D] float32 from the centroids `init` [K, D], until they move by less than `tol` in all.

    Labels go by cosine, ties to the lowest code; an empty code keeps its centroid, or with `reseed_empty` takes the token that
    is farthest from its own. Raises ValueError for x that is not finite and for `init` of another shape.
    """
    N, D = x.shape
    if init.dim() != 2 or init.shape[1] != D or not 1 <= len(init) <= N:
        raise ValueError(f"init must have shape [K, D] with 1 <= K <= N = {N} and D = {D}, got {list(init.shape)}")
    ends = torch.tensor([0, N], device=x.device)
    centroid = init.float()
    for step in range(1, max_iter + 1):
        labels, new, size = torch.ops.mmcompress.kmeans_lloyd(x, centroid, ends, 1, True, step == 1)
        if reseed_empty:
            new = reseed(x, labels, new, size)
        if (new - centroid).norm() < tol:
            break
        centroid = new
    return Clusters(labels, centroid, step)


def reseed(x: Tensor, labels: Tensor, centroid: Tensor, size: Tensor) -> Tensor:
    """The centroids with the j-th empty code on the unit token that is j-th farthest from its own; tokens on theirs stay."""
    u = unit(x)
    distance = (u * (u - unit(centroid)[labels])).sum(-1)  # 1 - cos, and 0 for a zero token, which no centroid can be near
    empty = (size == 0).nonzero()[:, 0]
    row = distance.argsort(descending=True, stable=True)[: len(empty)]
    row = row[distance[row] > 1e-6]
    return centroid.index_copy(0, empty[: len(row)], u[row])


def distortion(u: Tensor, clusters: Clusters) -> float:
    """Σ‖u − c‖² over the unit tokens u [N, D] and their centroids c."""
    return float((u - clusters.centroid[clusters.labels]).square().sum(-1).double().sum())


def elbow(distortions: list[float], k_min: int, rule: str = "knee") -> int:
    """The number of codes at the sharpest bend of the distortions of k_min, k_min + 1, …; the first of equal bends.

    rule: "knee", or "official", which forgets k_min and adds 2. Raises ValueError for fewer than 3 distortions.
    """
    if len(distortions) < 3:
        raise ValueError(f"distortions must be at least 3 for a second difference, got {len(distortions)}")
    bend = torch.tensor(distortions, dtype=torch.float64).diff(n=2)
    a = int(bend.argmax())
    return max(12, a + 4) if rule == "official" else k_min + 1 + a


def silhouette(x: Tensor, labels: Tensor, seed: int = 0) -> float:
    """Mean of (b − a) / max(a, b): mean cosine distances to the other tokens of the own code, a, and to those of the nearest
    other code, b, on at most 1,024 drawn tokens. A token alone in its code counts 0, and so does a single code."""
    if len(x) > SILHOUETTE_TOKENS:
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:SILHOUETTE_TOKENS].to(x.device)
        x, labels = x[rows], labels[rows]
    code, label, size = labels.unique(return_inverse=True, return_counts=True)
    if len(code) == 1:
        return 0.0
    u = unit(x)
    total = (1 - u @ u.T).fill_diagonal_(0).clamp(min=0) @ F.one_hot(label, len(code)).to(u)  # [n, codes]
    own = size[label]
    a = total.gather(1, label[:, None])[:, 0] / (own - 1).clamp(min=1)
    b = (total / size).scatter(1, label[:, None], torch.inf).amin(1)
    score = torch.where(own > 1, (b - a) / torch.maximum(a, b).clamp(min=EPS), 0)
    return float(score.mean())


def choose(x: Tensor, k_min: int, k_max: int, rule: str, run: Callable[[int], Clusters], seed: int = 0) -> int:
    """The number of codes for x [N, D]; `run(k)` gives the clusters of k codes."""
    tried = [run(k) for k in range(k_min, k_max + 1)]
    if rule == "silhouette":
        return k_min + int(torch.tensor([silhouette(x, c.labels, seed) for c in tried]).argmax())
    u = unit(x)
    return min(elbow([distortion(u, c) for c in tried], k_min, rule), len(x))


class TokenHash(NamedTuple):
    """Which code stands where. Codes are numbered by their first token, so the numbering of the clusters does not matter."""

    assignment: Tensor  # [B, N] code of every token, in raster order the index map M [T, H, W]
    anchor: Tensor  # [B, K] first token of every code, ascending
    size: Tensor  # [B, K] tokens of every code
    mask: Tensor  # [B, K] False behind an item's last code

    @classmethod
    def of(cls, labels: Tensor) -> TokenHash:
        """The hash of labels [B, N], any integers >= 0. K is the largest number of different labels of an item."""
        B, N = labels.shape
        column = torch.arange(N, device=labels.device).expand(B, N)
        num_labels = int(labels.max()) + 1
        first = torch.full((B, num_labels), N, device=labels.device).scatter_reduce(1, labels, column, "amin")
        anchor, order = first.sort(dim=1, stable=True)
        assignment = order.argsort(dim=1).gather(1, labels)
        K = int(assignment.max()) + 1
        anchor, mask = anchor[:, :K], anchor[:, :K] < N
        size = torch.zeros_like(anchor).scatter_add(1, assignment, torch.ones_like(assignment))
        return cls(assignment, anchor.clamp(max=N - 1), size, mask)


def place_summary(
    hashed: TokenHash, position: Tensor, tables: list[Tensor], of: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Mean over each code's tokens of `of`(e_t + e_h + e_w), [B, K, F]; position [B, N, 3], tables [T, F], [H, F], [W, F]."""
    places: Tensor = sum(table[position[..., axis]] for axis, table in enumerate(tables))  # type: ignore[assignment]
    return ops.merge(of(places), hashed.assignment, hashed.anchor.shape[1])[0]


def stretch(table: Tensor, length: int) -> Tensor:
    """The first `length` rows of a table [P, F], or where it is too short, its rows stretched linearly over that length."""
    if length <= len(table):
        return table[:length]
    return F.interpolate(table.T[None], size=length, mode="linear", align_corners=True)[0].T


class HashMapper(nn.Module):
    """Lets every codeword know where its tokens stand and what stands beside it: mapper, then attention over the codes.

    The mean over a code's tokens is taken behind the mapper's first layer: before it, a shape that crosses the picture to the
    left and one that crosses it to the right would have the same mean place.
    The output projection starts at zero, so that an untrained module gives back the codebook bit for bit.
    """

    def __init__(self, width: int, place_width: int, num_places: int, num_heads: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.places = nn.ParameterList([torch.randn(num_places, place_width) for _ in range(3)])
            self.mlp = nn.Sequential(nn.Linear(place_width, width), nn.GELU(), nn.Linear(width, width))
            self.attention = nn.MultiheadAttention(width, num_heads, bias=False, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, codebook: Tensor, hashed: TokenHash, position: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """codebook [B, K, D], position [B, N, 3] on the grid -> [B, K, D] in the codebook's dtype.

        Raises ValueError where the codebook has another width or a token lies outside the grid.
        """
        table = self.places[0]
        if codebook.shape[-1] != self.attention.embed_dim:
            raise ValueError(f"width must be that of the tokens, {codebook.shape[-1]}, got {self.attention.embed_dim}")
        if bool((position >= torch.tensor(grid, device=position.device)).any()):
            raise ValueError(f"position must lie on the item's grid {grid}, got {position.flatten(0, 1).amax(0).tolist()}")
        tables = [stretch(p, length) for p, length in zip(self.places, grid, strict=True)]
        places = self.mlp[2](place_summary(hashed, position, tables, self.mlp[:2]))  # [B, K, D]
        codes = codebook.to(table.dtype)
        attended, _ = self.attention(codes, codes, places, key_padding_mask=~hashed.mask, need_weights=False)
        return (codes + attended).to(codebook.dtype)
