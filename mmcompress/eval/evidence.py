"""Evidence recall: of the tokens that show what a question asks about, the share that a method kept.

It needs no answer of a model: a task says where its answers can be seen or heard, a trace (`run.items[i]`) which tokens stayed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmcompress.eval.tasks.base import Evidence, Sample

if TYPE_CHECKING:
    from mmcompress.models.items import Item

SHOWS = 1 / 3
"""A token shows a box from this `shown` on: a third of the token lies in the box, or half of the box in the token."""


def shown(boxes: Tensor, box: Sequence[float]) -> Tensor:
    """How well tokens that cover `boxes` [N, 4] (left, top, right, bottom) show `box`, [N] from 0 on; SHOWS is enough.

    The share of the token that lies in the box, or two thirds of the share of the box that lies in the token if that is more.
    """
    left, top, right, bottom = box
    w = (boxes[:, 2].clamp(max=right) - boxes[:, 0].clamp(min=left)).clamp(min=0)
    h = (boxes[:, 3].clamp(max=bottom) - boxes[:, 1].clamp(min=top)).clamp(min=0)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return torch.maximum(w * h / area, w * h / ((right - left) * (bottom - top)) * (2 / 3))


def evidence_recall(
    item: Item,
    sample: Sample,
    size: int | tuple[int, int],
    sampling_rate: int = 16000,
    corner: tuple[float, float] = (0, 0),
) -> float:
    """Share of the evidence's tokens that stayed or were merged into one that did, in 0..1.

    item: the trace of the sample's item. size: (width, height) in pixels of the part of the picture or of the clip's frames, or
    the number of samples of the recording at `sampling_rate` Hz, over the whole of which its tokens lie; corner: (left, top) of
    that part.
    nan where the evidence is not known, was cut away, or the tokens do not lie on a grid.
    """
    if not sample.evidence:
        return math.nan
    places = _places(item, size, len(sample.item) if item.layout.kind == "video" else 1, sampling_rate)
    if places is None:
        return math.nan
    boxes, first, last = places
    wanted = torch.zeros(len(boxes), dtype=torch.bool)
    for evidence in sample.evidence:
        wanted |= _showing(boxes, first, last, evidence, corner)
    kept = item.kept.cpu() & wanted
    return float(kept.sum() / wanted.sum()) if wanted.any() else math.nan


def _showing(boxes: Tensor, first: Tensor, last: Tensor, evidence: Evidence, corner: tuple[float, float]) -> Tensor:
    """[N] bool: the tokens that show it; where none shows it well, those that show most of it."""
    if evidence.seconds is not None:
        share = shown(boxes, (evidence.seconds[0], 0, evidence.seconds[1], 1))
    elif evidence.box is not None:
        share = shown(boxes, [edge - start for edge, start in zip(evidence.box, corner * 2, strict=True)])
    else:
        share = torch.ones(len(boxes), dtype=torch.float64)
    start, end = evidence.frames or (0, math.inf)
    share = share * ((first < end) & (last > start) & (last > first))
    return (share > 0) & (share >= min(SHOWS, float(share.max())))


def _places(item: Item, size: int | tuple[int, int], frames: int, sampling_rate: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Where each token lies: its box [N, 4] in pixels (of a recording: seconds, and 0 to 1), and the frames that it stands for,
    `first` and behind the `last` one [N]."""
    layout, position = item.layout, item.position.cpu().double()
    t, h, w = layout.grid
    first, last = torch.zeros(len(position)), torch.ones(len(position))
    y, x = position[:, 1], position[:, 2]
    if layout.kind == "audio":
        step = int(size) / sampling_rate / t  # type: ignore[arg-type]
        start, one = position[:, 0] * step, torch.ones(len(position), dtype=torch.float64)
        return torch.stack([start, 0 * one, start + step, one], 1), first, last
    width, height = size  # type: ignore[misc]
    if layout.crops is not None and layout.side is not None:
        thumbnail = item.group.cpu() == 0
        scale = min(w / width, h / height)  # tokens a pixel; the canvas is padded on both sides of one axis
        pad_x, pad_y = (w - width * scale) / 2, (h - height * scale) / 2
        left = torch.where(thumbnail, x * width / layout.side, (x - pad_x) / scale)
        top = torch.where(thumbnail, y * height / layout.side, (y - pad_y) / scale)
        wide = torch.where(thumbnail, width / layout.side, 1 / scale)
        high = torch.where(thumbnail, height / layout.side, 1 / scale)
        return torch.stack([left, top, left + wide, top + high], 1), first, last
    time = position[:, 0]
    if h * w == 1:  # rows without a grid: square frames, and perhaps a newline at the end
        side = math.isqrt(t // frames)
        if t - frames * side * side not in (0, 1) or side < 2:
            return None
        y, x, time = time // side % side, time % side, time // side**2
        h, w, t = side, side, frames
    step = -(-frames // t)  # frames that one time step stands for
    first = time * step
    last = torch.where(time < t, first + step, first)  # the newline stands for none
    box = torch.stack([x * width / w, y * height / h, (x + 1) * width / w, (y + 1) * height / h], 1)
    return box.double(), first, last
