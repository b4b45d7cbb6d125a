"""What a method did to a picture: the traces of `run.items` as layers at token resolution, and a picture made of them.

A view is a lattice of tokens over a picture: the thumbnail and the canvas of crops of an AnyRes image, a frame of a clip, or
simply the image. Dropped tokens are dimmed; tokens that were merged take the mean colour of their cluster and its outline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

DIM = (44, 51, 68, 206)  # over a dropped token, RGBA
BLEND = 190  # opacity of a merged cluster's mean colour
INK, PAPER, MUTED, ACCENT = (240, 242, 247), (15, 17, 23), (150, 157, 172), (255, 196, 84)


@dataclass(frozen=True)
class Region:
    """A rectangle of cells (left, top, right, bottom; the last two just outside) and how many of its tokens stayed."""

    box: tuple[int, int, int, int]
    kept: int
    total: int


@dataclass(frozen=True)
class View:
    """output [h, w]: the output that each cell's token went into, -1 = dropped; regions: the whole view, or its crops."""

    name: str
    output: np.ndarray
    regions: tuple[Region, ...]

    @property
    def kept(self) -> int:
        return sum(r.kept for r in self.regions)

    @property
    def total(self) -> int:
        return sum(r.total for r in self.regions)


def views(item: Any) -> list[View]:
    """The views of one trace (an image or a clip). Raises ValueError where its tokens do not lie on a lattice."""
    layout = item.layout
    if layout.kind == "audio":
        raise ValueError("only images and clips can be drawn, got audio")
    position, group = item.position.cpu().numpy(), item.group.cpu().numpy()
    assignment, anchor = item.assignment.cpu().numpy(), item.anchor.cpu().numpy()
    if layout.crops:
        parts = [("thumbnail", group == 0), (f"{layout.crops[0]} by {layout.crops[1]} crops", group > 0)]
    else:
        frames = np.unique(position[:, 0])
        parts = [("image" if len(frames) == 1 else f"step {t + 1}", position[:, 0] == t) for t in frames]
    anchored = np.zeros(len(position), dtype=bool)
    anchored[anchor] = True
    out = []
    for name, inside in parts:
        if inside.any():
            out.append(_view(name, position[inside, 1:], group[inside], assignment[inside], anchored[inside]))
    return out


def _view(name: str, cell: np.ndarray, group: np.ndarray, assignment: np.ndarray, anchored: np.ndarray) -> View:
    cell = cell - cell.min(0)
    h, w = cell.max(0) + 1
    if h * w != len(cell) or len(np.unique(cell[:, 0] * w + cell[:, 1])) != len(cell):
        raise ValueError(f"the tokens of an image must fill a lattice, got {len(cell)} tokens on {h} × {w} cells")
    output = np.empty((h, w), dtype=np.int64)
    output[cell[:, 0], cell[:, 1]] = assignment
    regions = []
    for g in np.unique(group):
        own = group == g
        (top, left), (bottom, right) = cell[own].min(0), cell[own].max(0) + 1
        regions.append(Region((int(left), int(top), int(right), int(bottom)), int(anchored[own].sum()), int(own.sum())))
    return View(name, output, tuple(regions))


def layer(view: View, picture: Image.Image) -> np.ndarray:
    """What lies over the picture, RGBA [h, w, 4], one pixel a token."""
    h, w = view.output.shape
    out = np.zeros((h, w, 4), dtype=np.uint8)
    out[view.output < 0] = DIM
    colour = np.asarray(picture.convert("RGB").resize((w, h), 4), dtype=np.float64)  # 4: box filter, the mean of each cell
    labels, index, size = np.unique(view.output, return_inverse=True, return_counts=True)
    index = index.reshape(h, w)
    mean = np.stack([np.bincount(index.ravel(), colour[..., c].ravel(), len(labels)) for c in range(3)], -1) / size[:, None]
    merged = (size[index] > 1) & (view.output >= 0)
    out[merged, :3] = mean[index][merged].round()
    out[merged, 3] = BLEND
    return out


def outlines(view: View) -> list[tuple[int, int, int, int]]:
    """Segments (x0, y0, x1, y1), in cells: around what was dropped; where any merged, between clusters."""
    out, kept = view.output, view.output[view.output >= 0]
    if not len(kept) or np.bincount(kept).max() < 2:
        out = out >= 0
    y, x = np.nonzero(out[:, 1:] != out[:, :-1])
    segments = [(int(b) + 1, int(a), int(b) + 1, int(a) + 1) for a, b in zip(y, x, strict=True)]
    y, x = np.nonzero(out[1:] != out[:-1])
    return segments + [(int(b), int(a) + 1, int(b) + 1, int(a) + 1) for a, b in zip(y, x, strict=True)]


def panel(view: View, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at `size` (width, height) under the view's layer, with crop borders and each crop's budget."""
    from PIL import Image, ImageDraw

    h, w = view.output.shape
    base = picture.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    top = Image.fromarray(layer(view, picture), "RGBA").resize(size, Image.Resampling.NEAREST)
    base = Image.alpha_composite(base, top)
    ink = Image.new("RGBA", size)
    draw = ImageDraw.Draw(ink)
    sx, sy = size[0] / w, size[1] / h
    for x0, y0, x1, y1 in outlines(view):
        draw.line([(x0 * sx, y0 * sy), (x1 * sx, y1 * sy)], fill=(255, 255, 255, 90), width=1)
    if len(view.regions) > 1:
        for r in view.regions:
            left, up, right, down = (r.box[0] * sx, r.box[1] * sy, r.box[2] * sx, r.box[3] * sy)
            draw.rectangle([left, up, right - 1, down - 1], outline=(*ACCENT, 235), width=2)
        for r in view.regions:
            _pill(draw, (r.box[0] * sx + 8, r.box[1] * sy + 8), f"{r.kept}/{r.total}", size=max(13, size[1] // 30))
    return Image.alpha_composite(base, ink).convert("RGB")


def picture_of(item: Any, picture: Image.Image, title: str, subtitle: str = "", height: int = 640) -> Image.Image:
    """The whole trace of one image: title line, every view side by side, captions. `height` of the tallest view in pixels."""
    from PIL import Image, ImageDraw

    shown = views(item)
    ratio = picture.width / picture.height
    main = shown[-1]
    scale = max(1, round(height / max(main.output.shape[0], main.output.shape[1] / 1.6)))
    big = (main.output.shape[1] * scale, main.output.shape[0] * scale)
    sizes = [big if v is main else _fit(ratio, big[1] * 0.5, big[0] * 0.75) for v in shown]
    margin, gap, head, foot = 32, 24, 104, 44
    title_font, font, small = (_font(s) for s in (28, 17, 16))
    need = max(title_font.getlength(title), font.getlength(subtitle))
    width = int(max(sum(w for w, _ in sizes) + gap * (len(sizes) - 1), need)) + 2 * margin
    sheet = Image.new("RGB", (width, head + big[1] + foot + 12), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 24), title, INK, title_font)
    draw.text((margin, 60), subtitle, MUTED, font)
    x = margin
    for view, size in zip(shown, sizes, strict=True):
        sheet.paste(panel(view, picture, size), (x, head))
        draw.text((x, head + size[1] + 12), f"{view.name}  {view.kept} of {view.total}", MUTED, small)
        x += size[0] + gap
    return sheet


def describe(item: Any) -> str:
    """'306 of 1,225 tokens (25.0 %), 35 separators beside them'."""
    kept, total = len(item.anchor), len(item.assignment)
    separators = item.count.separators
    tail = f", {separators} separators beside them" if separators else ""
    return f"{kept:,} of {total:,} tokens ({100 * kept / max(total, 1):.1f} %){tail}"


def _fit(ratio: float, height: float, width: float) -> tuple[int, int]:
    height = min(height, width / ratio)
    return max(1, round(height * ratio)), max(1, round(height))


def _pill(draw: Any, at: tuple[float, float], text: str, size: int) -> None:
    font = _font(size)
    left, up, right, down = font.getbbox(text)
    x, y, pad = at[0], at[1], size * 0.45
    box = [x, y, x + right - left + 2 * pad, y + down - up + 1.5 * pad]
    draw.rounded_rectangle(box, radius=(box[3] - box[1]) / 2, fill=(10, 12, 18, 225))
    draw.text((x + pad - left, y + 0.75 * pad - up), text, (*ACCENT, 255), font)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
