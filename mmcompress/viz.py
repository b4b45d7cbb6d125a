"""What a method did to an item: the traces of `run.items` as layers at token resolution, and a picture made of them.

A view is a lattice of tokens over a picture: the thumbnail and the canvas of crops of an AnyRes image, a time step of a clip,
a recording's row of tokens over its spectrogram, or simply the image. Dropped tokens are dimmed; tokens that were merged take
the mean colour of their cluster (a recording: its mean spectrum) and its outline, or, where an item became a few codewords, one
colour a codeword; the first picks of a method that picks one after another are numbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcompress.tokens import Layout

if TYPE_CHECKING:
    from PIL import Image

DIM = (44, 51, 68, 206)  # over a dropped token, RGBA
BLEND = 190  # opacity of a merged cluster's mean colour
CODES, CODE_SIZE, CODE_BLEND = 64, 8, 150  # at most so many clusters of so many tokens on average are codewords; their opacity
PICKS = 16  # picks that are numbered
INK, PAPER, MUTED, ACCENT = (240, 242, 247), (15, 17, 23), (150, 157, 172), (255, 196, 84)
HOP, MEL_BINS, DECIBELS = 0.01, 64, 80  # of a spectrogram: seconds a column, rows, range below the loudest
SOUND = ((58, 56, 118), (104, 56, 140), (168, 62, 136), (236, 96, 100), (254, 176, 122), (252, 250, 215))
"""Quiet to loud; no channel is below DIM's, so that whatever is dropped gets darker."""


@dataclass(frozen=True)
class Region:
    """A rectangle of cells (left, top, right, bottom; the last two just outside) and how many of its tokens stayed."""

    box: tuple[int, int, int, int]
    kept: int
    total: int


@dataclass(frozen=True)
class View:
    """A lattice of tokens.

    kind: of the item, "image", "video" or "audio" (then h = 1). output [h, w]: the output that each cell's token went into,
    -1 = dropped. merged [h, w] bool: other tokens of the item, perhaps in other views, went into the same one.
    regions: the whole view, or its crops. picks [h, w]: how many tokens were picked before this one, -1 = not known.
    """

    name: str
    kind: str
    output: np.ndarray
    merged: np.ndarray
    regions: tuple[Region, ...]
    picks: np.ndarray

    @property
    def kept(self) -> int:
        return sum(r.kept for r in self.regions)

    @property
    def total(self) -> int:
        return sum(r.total for r in self.regions)


def views(item: Any) -> list[View]:
    """The views of one trace, one a time step for a clip. Raises ValueError where its tokens do not lie on a lattice."""
    layout = item.layout
    position, group = item.position.cpu().numpy(), item.group.cpu().numpy()
    assignment, anchor = item.assignment.cpu().numpy(), item.anchor.cpu().numpy()
    cell = position[:, 1:]
    everywhere = np.ones(len(position), dtype=bool)
    if layout.kind == "audio":  # time runs to the right
        parts, cell = [("recording", everywhere)], position[:, [1, 0]]
    elif layout.kind == "video":
        parts = [(f"step {t + 1}", position[:, 0] == t) for t in range(layout.grid[0])]
    elif layout.crops:
        parts = [("thumbnail", group == 0), (f"{layout.crops[0]} by {layout.crops[1]} crops", group > 0)]
    else:
        parts = [("image", everywhere)]
    anchored = np.zeros(len(position), dtype=bool)
    anchored[anchor] = True
    merged = np.bincount(assignment + 1, minlength=len(anchor) + 1)[assignment + 1] > 1
    merged &= assignment >= 0
    picks = np.full(len(position), -1)
    if "order" in getattr(item, "signals", {}):
        picks[anchor] = item.signals["order"].cpu().numpy()
    per_token = (cell, group, assignment, merged, anchored, picks)
    return [_view(name, layout.kind, *(v[inside] for v in per_token)) for name, inside in parts if inside.any()]


def _view(
    name: str,
    kind: str,
    cell: np.ndarray,
    group: np.ndarray,
    assignment: np.ndarray,
    merged: np.ndarray,
    anchored: np.ndarray,
    picks: np.ndarray,
) -> View:
    cell = cell - cell.min(0)
    h, w = cell.max(0) + 1
    order = np.argsort(cell[:, 0] * w + cell[:, 1], kind="stable")
    if h * w != len(cell) or (cell[order, 0] * w + cell[order, 1] != np.arange(h * w)).any():
        raise ValueError(f"the tokens of an item must fill a lattice, got {len(cell)} tokens on {h} × {w} cells")
    regions = []
    for g in np.unique(group):
        own = group == g
        (top, left), (bottom, right) = cell[own].min(0), cell[own].max(0) + 1
        regions.append(Region((int(left), int(top), int(right), int(bottom)), int(anchored[own].sum()), int(own.sum())))
    lattice = lambda v: v[order].reshape(h, w)  # noqa: E731
    return View(name, kind, lattice(assignment), lattice(merged), tuple(regions), lattice(picks))


def backdrops(media: Any, layout: Layout, sampling_rate: int = 16000) -> list[Image.Image]:
    """The pictures that lie under the views of an item: one for all, or one a time step of a clip (its first frame).

    media: a picture, a clip's pictures, or a mono waveform at `sampling_rate` Hz, as the model sees or hears it (`ask.seen`).
    """
    if layout.kind == "audio":
        return [spectrogram(media, sampling_rate)]
    return [media] if layout.kind == "image" else list(media[:: frames_per_step(len(media), layout)])


def frames_per_step(num_frames: int, layout: Layout) -> int:
    """How many frames of a clip one time step of its tokens covers."""
    return -(-num_frames // layout.grid[0])


def under(shown: Sequence[View], pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The picture of each view: its own, or the one that all share. Raises ValueError for any other number."""
    if len(pictures) not in (1, len(shown)):
        raise ValueError(f"pictures must be one, or one for each of the {len(shown)} views, got {len(pictures)}")
    return list(pictures) * (len(shown) if len(pictures) == 1 else 1)


def spectrogram(wave: np.ndarray, sampling_rate: int) -> Image.Image:
    """The log-mel spectrogram of a mono waveform [samples]: a column every HOP seconds, MEL_BINS rows, high tones above."""
    from PIL import Image
    from transformers import audio_utils

    hop, window = round(HOP * sampling_rate), round(2.5 * HOP * sampling_rate)
    fft = 1 << (window - 1).bit_length()
    filters = audio_utils.mel_filter_bank(1 + fft // 2, MEL_BINS, 0, sampling_rate / 2, sampling_rate, mel_scale="htk")
    mel = audio_utils.spectrogram(
        np.asarray(wave, dtype=np.float64),
        audio_utils.window_function(window),
        window,
        hop,
        fft,
        power=2,
        pad_mode="constant",
        mel_filters=filters,
        log_mel="dB",
    )
    mel = mel[::-1, : max(1, len(wave) // hop)]
    loudness = np.clip(1 + (mel - mel.max()) / DECIBELS, 0, 1)
    steps = np.linspace(0, 1, len(SOUND))
    pixels = np.stack([np.interp(loudness, steps, channel) for channel in zip(*SOUND, strict=True)], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def ticks(seconds: float, most: int = 9) -> list[float]:
    """Round times from 0 on for the axis of a recording, at most `most` of them."""
    step = next(s * 10**e for e in range(-3, 6) for s in (1, 2, 5) if seconds / (s * 10**e) <= most - 1)
    return [round(i * step, 3) for i in range(int(seconds / step + 1e-9) + 1)]


def layers(shown: Sequence[View], pictures: Sequence[Image.Image]) -> list[np.ndarray]:
    """What lies over the pictures of an item's views, each RGBA [h, w, 4], one pixel a token.

    Over a spectrogram it has a row per mel bin, so that merged tokens take their mean spectrum. A cluster has one colour in all
    views.
    """
    sound = shown[0].kind == "audio"
    shapes = [(p.height if sound else len(v.output), v.output.shape[1]) for v, p in zip(shown, pictures, strict=True)]
    stack = lambda values: np.concatenate([np.broadcast_to(v, s).ravel() for v, s in zip(values, shapes, strict=True)])  # noqa: E731
    output, merged = stack([v.output for v in shown]), stack([v.merged for v in shown])
    row = stack([sound * np.arange(h)[:, None] for h, _ in shapes])
    colour = np.concatenate(
        [
            np.asarray(p.convert("RGB").resize((w, h), 4), dtype=np.float64).reshape(-1, 3)  # 4: box filter, a cell's mean
            for p, (h, w) in zip(pictures, shapes, strict=True)
        ]
    )
    _, index, size = np.unique(output * (row.max() + 1) + row, return_inverse=True, return_counts=True)
    mean = np.stack([np.bincount(index, channel) for channel in colour.T], -1) / size[:, None]
    out = np.zeros((len(output), 4), dtype=np.uint8)
    if merged.any() and _coded(shown):
        out[merged, :3], out[merged, 3] = palette(output.max() + 1)[output[merged]], CODE_BLEND
    else:
        out[merged, :3], out[merged, 3] = mean[index][merged].round(), BLEND
    out[output < 0] = DIM
    ends = np.cumsum([h * w for h, w in shapes])[:-1]
    return [part.reshape(*shape, 4) for part, shape in zip(np.split(out, ends), shapes, strict=True)]


def palette(n: int) -> np.ndarray:
    """[n, 3] colours of which neighbours differ: hues a golden angle apart, in three depths."""
    import colorsys

    return np.array(
        [
            [round(255 * c) for c in colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.6, 0.75)[i % 3], (0.95, 1, 0.7)[i % 3])]
            for i in range(n)
        ],
        dtype=np.uint8,
    )


def outlines(view: View) -> list[tuple[int, int, int, int]]:
    """Segments (x0, y0, x1, y1), in cells: around what was dropped; where any merged, between clusters."""
    out = view.output if view.merged.any() else view.output >= 0
    y, x = np.nonzero(out[:, 1:] != out[:, :-1])
    segments = [(int(b) + 1, int(a), int(b) + 1, int(a) + 1) for a, b in zip(y, x, strict=True)]
    y, x = np.nonzero(out[1:] != out[:-1])
    return segments + [(int(b), int(a) + 1, int(b) + 1, int(a) + 1) for a, b in zip(y, x, strict=True)]


def panel(view: View, picture: Image.Image, layer: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The picture at `size` (width, height) under the view's layer, with crop borders and each crop's budget."""
    from PIL import Image, ImageDraw

    h, w = view.output.shape
    base = picture.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    top = Image.fromarray(layer, "RGBA").resize(size, Image.Resampling.NEAREST)
    base = Image.alpha_composite(base, top)
    ink = Image.new("RGBA", size)
    draw = ImageDraw.Draw(ink)
    sx, sy = size[0] / w, size[1] / h
    for fill, width in (((0, 0, 0, 70), 3), ((255, 255, 255, 130), 1)):  # to be seen on dark and on light
        for x0, y0, x1, y1 in outlines(view):
            draw.line([(x0 * sx, y0 * sy), (x1 * sx, y1 * sy)], fill, width)
    if len(view.regions) > 1:
        for r in view.regions:
            left, up, right, down = (r.box[0] * sx, r.box[1] * sy, r.box[2] * sx, r.box[3] * sy)
            draw.rectangle([left, up, right - 1, down - 1], outline=(*ACCENT, 235), width=2)
        for r in view.regions:
            _pill(draw, (r.box[0] * sx + 8, r.box[1] * sy + 8), f"{r.kept}/{r.total}", size=max(13, size[1] // 30))
    for y, x in zip(*np.nonzero((view.picks >= 0) & (view.picks < PICKS)), strict=True):
        _pill(draw, ((x + 0.15) * sx, (y + 0.1) * sy), str(view.picks[y, x] + 1), size=int(np.clip(0.6 * sy, 10, 22)))
    return Image.alpha_composite(base, ink).convert("RGB")


STRIP = 8  # frames beside each other


def legend(shown: Sequence[View]) -> str:
    """What can be seen in the views."""
    dropped, merged, picked = (
        any(v.any() for v in part) for part in zip(*((v.output < 0, v.merged, v.picks >= 0) for v in shown), strict=True)
    )
    kept = any((v.output >= 0).any() for v in shown)
    words = "one colour a codeword" if merged and _coded(shown) else "averaged, outlined"
    told = [
        (dropped, "dimmed: dropped"),
        (merged, f"{words}: merged"),
        (kept, "as it is: kept"),
        (picked, "numbers: the first picks"),
    ]
    return "   ·   ".join(text for is_there, text in told if is_there)


def _coded(shown: Sequence[View]) -> bool:
    """Whether the item became a few codewords, which get a colour each."""
    codes, cells = 1 + max(int(v.output.max()) for v in shown), sum(v.output.size for v in shown)
    return shown[0].kind != "audio" and codes <= CODES and cells >= CODE_SIZE * codes


def picture_of(item: Any, pictures: Sequence[Image.Image], title: str, subtitle: str = "", height: int = 640) -> Image.Image:
    """The whole trace of one item: title, every view over its picture (`backdrops`), captions, legend.

    height: of the tallest view of an image in pixels; the frames of a clip and a spectrogram are lower.
    """
    from PIL import Image, ImageDraw

    shown = views(item)
    pictures = under(shown, pictures)
    big, ratio = _size(shown[-1], pictures[0], height), pictures[0].width / pictures[0].height
    sizes = [_fit(ratio, big[1] * 0.5, big[0] * 0.75) if view.name == "thumbnail" else big for view in shown]
    over = layers(shown, pictures)
    margin, gap, head, foot, line = 32, 24 if len(shown) < 3 else 10, 104, 44, 16
    rows = [range(i, min(i + STRIP, len(shown))) for i in range(0, len(shown), STRIP)]
    title_font, font, small = (_font(s) for s in (28, 17, 16))
    wide = max(sum(sizes[i][0] for i in row) + gap * (len(row) - 1) for row in rows)
    width = int(max(wide, title_font.getlength(title), font.getlength(subtitle), small.getlength(legend(shown)))) + 2 * margin
    axis = 30 if item.layout.kind == "audio" else 0
    row_height = max(h for _, h in sizes) + axis + foot
    sheet = Image.new("RGB", (width, head + len(rows) * row_height + line + 28), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 24), title, INK, title_font)
    draw.text((margin, 60), subtitle, MUTED, font)
    for n, row in enumerate(rows):
        x, y = margin, head + n * row_height
        for i in row:
            view, size, below = shown[i], sizes[i], y + sizes[i][1] + axis + 12
            sheet.paste(panel(view, pictures[i], over[i], size), (x, y))
            if axis:
                _axis(draw, (x, y + size[1]), size[0], HOP * pictures[i].width)
            text = f"{view.name}: {view.kept} of {view.total}"
            if small.getlength(text) > size[0]:
                text = f"{view.kept} of {view.total}"
            draw.text((x, below), text, MUTED, small)
            x += size[0] + gap
    draw.text((margin, sheet.height - line - 20), legend(shown), MUTED, small)
    return sheet


def _size(view: View, picture: Image.Image, height: int) -> tuple[int, int]:
    """Width and height of a view on the sheet; whole pixels a token but for a frame."""
    h, w = view.output.shape
    if view.kind == "video":
        return _fit(picture.width / picture.height, 0.4 * height, 0.4 * height)
    if view.kind == "audio":
        return w * max(1, round(1.6 * height / w)), max(1, height // 2)
    scale = max(1, round(height / max(h, w / 1.6)))
    return w * scale, h * scale


def _axis(draw: Any, at: tuple[float, float], width: int, seconds: float) -> None:
    """Seconds under a spectrogram."""
    font = _font(14)
    for t in ticks(seconds):
        x = at[0] + width * t / seconds
        draw.line([(x, at[1]), (x, at[1] + 6)], fill=MUTED)
        label = f"{t:g} s"
        draw.text((min(x, at[0] + width - font.getlength(label)), at[1] + 9), label, MUTED, font)


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
