"""GlobalCom²: the thumbnail of a high-resolution image guides the pruning of its crops.

Source: Liu et al., "Compression with Global Guidance" (arXiv 2501.05179, AAAI 2026). The thumbnail's CLS logits choose its own
tokens, share the budget among the crops and, together with each crop's own logits, choose the crops' tokens. Logits are those
before the softmax: softmaxed scores are so small that every crop would get the same budget.

`mode="corrected"` keeps exactly num_kept(N, keep_ratio) tokens (released: floor per view, clipped, so that even keep_ratio = 1
loses tokens). `mode="official"` keeps the released sets, at keep_ratio = 1 too. Both emit tokens in ascending order at their
true places and original positions; the released order is `official_emission`.
"""

from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mmcompress.compressor import Compressor
from mmcompress.ops import sum_into
from mmcompress.ops.apportion import apportion, top_per_group
from mmcompress.registry import register
from mmcompress.tokens import Layout, Reduction, Tokens, gather, keep_where

READS = {"cls": "cls_logits", "centroid": "tower", "auto": "cls_logits|tower"}


@register
class GlobalGuided(Compressor):
    """Prune an AnyRes image, thumbnail and crops, by CLS logits.

    mode: "corrected" (exact counts) or "official" (released counts and sets).
    temperature: of the softmax over crops, in units of summed logits.
    alpha: weight of the thumbnail's map in a crop token's score, the rest is its own logit.
    scores: "cls" (logits of the CLS query), "centroid" (−cosine to the view's mean tower feature) or "auto" (CLS where the
    tower has one).
    Clips pass untouched: vidcom2 is its sibling for them.
    """

    kinds: ClassVar[tuple[str, ...]] = ("image",)

    mode: str = "corrected"
    temperature: float = 10.0
    alpha: float = 0.5
    scores: str = "auto"

    def check(self) -> None:
        if self.mode not in ("corrected", "official"):
            raise ValueError(f"mode must be 'corrected' or 'official', got {self.mode!r}")
        if self.scores not in READS:
            raise ValueError(f"scores must be one of {', '.join(READS)}; got {self.scores!r}")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, Real) or not 0 < self.temperature < torch.inf:
            raise ValueError(f"temperature must be a finite number > 0, got {self.temperature!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, Real) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha!r}")

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("crops", READS[self.scores])

    @property
    def is_identity(self) -> bool:
        return self.keep_ratio == 1 and self.mode == "corrected"

    def compress(self, tokens: Tokens) -> Reduction:
        layout, N, views = tokens.layout, tokens.num_tokens, num_views(tokens)
        logits = self.logits(tokens, views)
        if layout.crops is None:
            counts, score = self.counts(N, N, tokens.group[:, :0], logits[:, :0]), logits
        else:
            thumbnail, own = logits[:, : layout.side**2], logits[:, layout.side**2 :]  # type: ignore[operator]
            crop = tokens.group[:, thumbnail.shape[1] :] - 1
            num = torch.zeros_like(crop[:, :1]).repeat(1, views - 1).scatter_add(1, crop, torch.ones_like(crop))
            ratio = crop_ratios(thumbnail, layout.crops, self.temperature, float(self.keep_ratio))
            counts = self.counts(N, thumbnail.shape[1], num, ratio)
            score = torch.cat([thumbnail, crop_scores(thumbnail, own, crop, layout, self.alpha)], 1)
        kept = top_per_group(score, tokens.group, counts)
        return keep_where(tokens, kept, self.num_kept(N) if self.mode == "corrected" else None)

    def logits(self, tokens: Tokens, num_views: int) -> Tensor:
        """The score of every token within its view, [B, N] float32."""
        names, shape = READS[self.scores].split("|"), list(tokens.x.shape[:2])
        name = next((n for n in names if n in tokens.signals), None)
        if name is None:
            raise ValueError(f"global_guided with scores={self.scores!r} reads the signal {' or '.join(names)}, got none of it")
        signal = tokens.signals[name]
        if list(signal.shape[:2]) != shape:
            raise ValueError(f"{name} must have shape [B, N, …] with [B, N] = {shape}, got {list(signal.shape)}")
        if not torch.compiler.is_compiling() and not bool(signal.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {int((~signal.isfinite()).sum())} values that are NaN or infinite")
        return signal.float() if name == "cls_logits" else centroid_scores(signal.float(), tokens.group, num_views)

    def counts(self, N: int, num_thumbnail: int, num: Tensor, ratio: Tensor) -> Tensor:
        """Tokens kept of the thumbnail and of each crop [B, 1 + n], for crops of num [B, n] tokens and ratios [B, n]."""
        if self.mode == "official":
            first, rest = int(num_thumbnail * self.keep_ratio), (num * ratio.double().clamp(max=1)).long()
        else:
            first = min(self.num_kept(N), self.num_kept(num_thumbnail))
            rest = apportion(num * ratio, num, self.num_kept(N) - first) if num.shape[1] else num
        return torch.cat([rest.new_full((len(rest), 1), first), rest], 1)


def num_views(tokens: Tokens) -> int:
    """Thumbnail and crops. Raises ValueError where the layout does not describe the tokens."""
    layout = tokens.layout
    if layout.crops is None:
        return 1
    if layout.side is None or layout.image_size is None:
        raise ValueError(f"an AnyRes item needs crops, side and image_size in its layout, got {layout}")
    unpadded_box(layout, tokens.num_tokens - layout.side**2)
    views = 1 + layout.crops[0] * layout.crops[1]
    if not torch.compiler.is_compiling() and int(tokens.group.max()) >= views:
        raise ValueError(
            f"{layout.crops[0]} × {layout.crops[1]} crops need groups 0…{views - 1}, got {int(tokens.group.max())}"
        )
    return views


def unpadded_box(layout: Layout, num_tokens: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) in tokens of the part of the canvas that shows the image, of `num_tokens` tokens."""
    (rows, columns), side, (h, w) = layout.crops, layout.side, layout.image_size  # type: ignore[misc]
    H, W = rows * side, columns * side  # type: ignore[operator]
    wide = w / h > W / H
    scaled = h * (W / w) if wide else w * (H / h)
    for size in (int(scaled), int(round(scaled, 7))):  # the release truncates, transformers rounds to 7 decimals first
        pad = ((H if wide else W) - size) // 2
        top, left = (pad, 0) if wide else (0, pad)
        if (H - 2 * top) * (W - 2 * left) == num_tokens:
            return top, left, H - 2 * top, W - 2 * left
    expected = (H - 2 * top) * (W - 2 * left)
    raise ValueError(
        f"a picture of {h} × {w} pixels on {rows} × {columns} crops of side {side} "
        f"has {expected} tokens on the unpadded canvas, got {num_tokens}"
    )


def crop_ratios(thumbnail: Tensor, crops: tuple[int, int], temperature: float, keep_ratio: float) -> Tensor:
    """Ratio r_j of each crop [B, n], float64, not clipped: softmax over the crops' shares of the logits [B, s·s]."""
    side = round(thumbnail.shape[1] ** 0.5)
    if side * side != thumbnail.shape[1]:
        raise ValueError(f"the thumbnail must be a square of tokens, got {thumbnail.shape[1]}")
    rows, columns = crops
    patch = torch.arange(side, device=thumbnail.device)
    row = (patch // max(side // rows, 1)).clamp(max=rows - 1)
    column = (patch // max(side // columns, 1)).clamp(max=columns - 1)
    cell = (row[:, None] * columns + column).flatten().expand(thumbnail.shape)
    total = sum_into(thumbnail.double(), cell, rows * columns)
    share = ((total - total.amax(1, keepdim=True)) / temperature).exp()
    share = share / (share.sum(1, keepdim=True) + 1e-8)
    return keep_ratio * (1 + share - share.mean(1, keepdim=True))


def crop_scores(thumbnail: Tensor, own: Tensor, crop: Tensor, layout: Layout, alpha: float) -> Tensor:
    """Score of every canvas token [B, M]: the thumbnail's map at its place and its own logit, each of unit norm in the crop."""
    side: int = layout.side  # type: ignore[assignment]
    _, _, height, width = unpadded_box(layout, own.shape[1])
    if not own.shape[1]:
        return own
    shown = interpolate(thumbnail.view(-1, 1, side, side), (height, width), mode="bilinear").flatten(1)

    def unit(values: Tensor) -> Tensor:
        num_crops = layout.crops[0] * layout.crops[1]  # type: ignore[index]
        square = sum_into(values.square(), crop, num_crops)
        return values / square.sqrt().clamp(min=1e-12).gather(1, crop)

    return alpha * unit(shown) + (1 - alpha) * unit(own)


def centroid_scores(features: Tensor, group: Tensor, num_views: int) -> Tensor:
    """−cosine of each tower feature [B, N, D] to the mean of its view, [B, N]."""
    total = sum_into(features, group, num_views)
    return -torch.cosine_similarity(features, gather(total, group), dim=-1, eps=1e-12)  # a sum points where its mean does


def official_emission(kept: list[list[int]], crops: tuple[int, int], side: int, box: tuple[int, int, int, int]) -> list[int]:
    """The order in which the release emits the crops' kept tokens: crop·side² + cell of the crop, and −1 for each newline.

    kept: per crop the cells kept, 0…side²-1 in the crop's own raster; box: (top, left, height, width) of the image on the
    canvas. The release numbers a crop's tokens within its unpadded part and then reads this number as a cell of the padded
    crop: right tokens, wrong rows.
    """
    rows, columns = crops
    top, left, height, width = box
    placed: dict[tuple[int, int], int] = {}
    for crop, cells in enumerate(kept):
        y, x = crop // columns * side, crop % columns * side
        shown = [
            cell
            for cell in range(side * side)
            if top <= y + cell // side < top + height and left <= x + cell % side < left + width
        ]
        number = {cell: i for i, cell in enumerate(shown)}
        for cell in cells:
            i = number[cell]
            placed[y + i // side, x + i % side] = crop * side * side + cell
    out: list[int] = []
    for r in range(rows * side):
        out += [placed[r, c] for c in range(columns * side) if (r, c) in placed]
        out.append(-1)
    return out
