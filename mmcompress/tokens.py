"""The two values that travel between a model's seam and a method: `Tokens` in, `Reduction` out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmcompress import ops


@dataclass(frozen=True)
class Layout:
    """What an item is and how its tokens lie: equal layouts may share a batch.

    kind: "image", "video" or "audio".
    grid: (t, h, w) of the token lattice; an AnyRes image gives the grid of its padded canvas, a clip of sound (t, 1, 1).
    crops: (rows, columns) of the high-resolution crops, or None where the item has a single view.
    side: tokens along one edge of a view (AnyRes only).
    image_size: (H, W) of the picture in pixels where the model knows it.
    """

    kind: str = "image"
    grid: tuple[int, int, int] = (1, 1, 1)
    crops: tuple[int, int] | None = None
    side: int | None = None
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Tokens:
    """A dense batch of items of one layout.

    x [B, N, D]; position [B, N, 3] (t, h, w on the item's grid); group [B, N] (crop, frame or window; an AnyRes
    thumbnail is 0);
    size [B, N] (how many inputs a token stands for); signals: name -> [B, N, ...] (or [B, T, D] for "text", padded with
    `text_mask`). The signal "positions" [B, N, P, 3] holds the language model's position ids of every token; after a merge that
    carries several, "num_positions" [B, N] tells how many of them are no repeats.
    """

    x: Tensor
    position: Tensor
    group: Tensor
    size: Tensor
    layout: Layout = field(default_factory=Layout)
    signals: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, x: Tensor, layout: Layout | None = None, **signals: Tensor) -> Tokens:
        """Wrap features [B, N, D] (or [N, D]) as single-view items: positions raster over the layout's grid where it
        has N cells, else 0…N-1 in t."""
        x = x[None] if x.dim() == 2 else x
        B, N = x.shape[:2]
        layout = layout or Layout(grid=(N, 1, 1))
        t, h, w = layout.grid
        column = torch.arange(N, device=x.device)
        if t * h * w == N:
            position = torch.stack([column // (h * w), column // w % h, column % w], -1)
        else:
            position = torch.stack([column, torch.zeros_like(column), torch.zeros_like(column)], -1)
        group = position[:, 0] if layout.kind == "video" else torch.zeros_like(column)
        ones = torch.ones(B, N, device=x.device)
        return cls(x, position.expand(B, N, 3), group.expand(B, N), ones, layout, signals)

    @property
    def num_tokens(self) -> int:
        return self.x.shape[1]

    def take(self, reduction: Reduction) -> Tokens:
        """The tokens after a reduction: position, group and signals are those of the anchors, carried positions its own."""
        index = reduction.anchor
        signals = {k: v if k.startswith("text") else gather(v, index) for k, v in self.signals.items() if v is not None}
        signals |= reduction.carried()
        return replace(
            self,
            x=reduction.x,
            position=gather(self.position, index),
            group=gather(self.group, index),
            size=reduction.size,
            signals=signals,
        )


@dataclass(frozen=True)
class Reduction:
    """What a method made of `Tokens`.

    x [B, K, D]; anchor [B, K] (ascending input columns whose place in the sequence the outputs take);
    assignment [B, N] (the output each input went into, -1 = dropped); size [B, K];
    positions [B, K, P, 3] (several original positions carried by one token, in the units of the signal "positions") and
    num_positions [B, K] (how many of them are no repeats), or None;
    mask [B, K] (False = no output here; only where K differs between items, real outputs first) or None.
    order [B, K]: which output was picked first (0), second (1), …, by methods that pick one after another, or None.
    """

    x: Tensor
    anchor: Tensor
    assignment: Tensor
    size: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None
    num_positions: Tensor | None = None
    order: Tensor | None = None

    def carried(self) -> dict[str, Tensor]:
        """Carried positions and order of picks as signals of the tokens that come out, {} where there are none."""
        out = {} if self.order is None else {"order": self.order}
        if self.positions is not None and self.num_positions is not None:
            out |= {"positions": self.positions, "num_positions": self.num_positions}
        return out

    @property
    def num_kept(self) -> int:
        return self.x.shape[1]


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, K] of x [B, N, ...]."""
    view = index.view(*index.shape, *[1] * (x.dim() - 2))
    return x.gather(1, view.expand(*index.shape, *x.shape[2:]))


def identity(tokens: Tokens) -> Reduction:
    """Everything stays: the very tensor that came in."""
    B, N = tokens.x.shape[:2]
    column = torch.arange(N, device=tokens.x.device).expand(B, N)
    return Reduction(tokens.x, column, column, tokens.size)


def keep(tokens: Tokens, index: Tensor) -> Reduction:
    """Keep the columns `index` [B, K] (any order, no duplicates), drop the others."""
    anchor = index.sort(dim=1).values
    B, K = anchor.shape
    slot = torch.arange(K, device=anchor.device).expand(B, K)
    assignment = torch.full_like(tokens.group, -1).scatter(1, anchor, slot)
    return Reduction(gather(tokens.x, anchor), anchor, assignment, gather(tokens.size, anchor))


def keep_where(tokens: Tokens, kept: Tensor, num_kept: int | None = None) -> Reduction:
    """Keep the columns where `kept` [B, N] is true, drop the others.

    `num_kept` is the number of kept columns of every item, where the caller knows it (no host synchronisation then).
    Without it the counts may differ between items; the result then has a mask.
    """
    counts = kept.sum(1, keepdim=True)
    K = (int(counts.max()) if counts.numel() else 0) if num_kept is None else num_kept
    anchor = (~kept).int().argsort(dim=1, stable=True)[:, :K]  # kept columns first, ascending
    assignment = torch.where(kept, kept.cumsum(1) - 1, -1)
    real = torch.arange(K, device=kept.device) < counts
    mask = None if num_kept is not None or bool(real.all()) else real
    size = gather(tokens.size, anchor)
    return Reduction(gather(tokens.x, anchor), anchor, assignment, size if mask is None else size * mask, mask=mask)


def merge(tokens: Tokens, assignment: Tensor, anchor: Tensor) -> Reduction:
    """Average, weighted by size, the inputs that share an output: assignment [B, N] in 0…K-1 (-1 = dropped), anchor [B,
    K] ascending.

    Sums run in float32 and are rounded once to the input's dtype. An output that nothing was assigned to is a
    ValueError of the method's making: it stays 0.
    """
    K = anchor.shape[1]
    if tokens.x.is_cuda:  # scatter_add adds in no fixed order there
        x, size = ops.merge(tokens.x, assignment, K, tokens.size, check_finite=False)
        return Reduction(x, anchor, assignment, size.to(tokens.size.dtype))
    weight = torch.where(assignment >= 0, tokens.size, 0)
    slot = assignment.clamp(min=0)
    size = ops.sum_into(weight, slot, K)
    total = ops.sum_into(tokens.x.float() * weight[..., None], slot, K)
    x = total / size.clamp(min=torch.finfo(size.dtype).tiny)[..., None]
    return Reduction(x.to(tokens.x.dtype), anchor, assignment, size)


FAULTS = (
    "mask must have its real outputs first",
    "anchors must be columns 0…{last} of the item",
    "anchors must ascend without repeats",
    "assignment must hold the number of a real output, or -1",
    "every anchor must be assigned to its own output",
    "x must be finite where the tokens were",
)


def fault(out: Reduction, given: Sequence[Tensor], swaps_places: bool = False) -> str | None:
    """What is wrong with a reduction of the items `given` (x [N, D] each), in a sentence with the value, or None.

    Looks at real outputs only. `swaps_places`: an output may stand at another output's anchor. One host read where all is
    right. Expects fitting shapes: x [B, K, D], anchor [B, K], assignment [B, N].
    """
    anchor, assignment = out.anchor, out.assignment
    K, N = anchor.shape[1], assignment.shape[1]
    real = torch.ones_like(anchor, dtype=torch.bool) if out.mask is None else out.mask.bool()
    count = real.sum(1, keepdim=True)
    at = assignment.gather(1, anchor.clamp(0, max(N - 1, 0)))
    if swaps_places:
        at = at.masked_fill(~real, N).sort(dim=1).values
    bad = (
        real[:, 1:] & ~real[:, :-1],
        real & ((anchor < 0) | (anchor >= N)),
        real[:, 1:] & (anchor[:, 1:] <= anchor[:, :-1]),
        (assignment < -1) | (assignment >= count),
        real & (at != torch.arange(K, device=at.device)),
        real & ~out.x.isfinite().all(-1),
    )
    for which, found in enumerate(torch.stack([b.any() for b in bad]).tolist()):
        items = bad[which].any(1).nonzero()[:, 0].tolist() if found else []
        if which == len(FAULTS) - 1:
            items = [i for i in items if bool(given[i].isfinite().all())]
        if items:
            i = items[0]
            shown = {0: real, 3: assignment}.get(which, anchor)[i].tolist()
            if which == 4:
                shown = [assignment[i, a].item() for a in shown[: int(count[i])]]
            if which == 5:
                shown = out.x[i, bad[5][i]][0].tolist()
            text = f"[{', '.join(map(str, shown[:16]))}{', …' if len(shown) > 16 else ''}]"
            return f"{FAULTS[which].format(last=N - 1)}; got {text} in item {i}"
    return None
