"""What the frozen tower sees of the training scenes, computed once: features, packing order, and which mark a token shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mmcompress.eval.tasks import Mark

SIDE, PATCH = 16, 14  # tokens per side of a view, pixels per side of a token


@dataclass
class Scene:
    """A picture as the tower sees it.

    `features` [views * 256, D] float16; `order` [S] the packed sequence as rows of features, -1 = newline; `mark` [views * 256]
    the mark that a token shows, -1 = none.
    """

    features: np.ndarray
    order: torch.Tensor
    mark: torch.Tensor
    marks: list[Mark]


def token_boxes(size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Every token's region in pixels of the picture, [views * 256, 4] (left, top, right, bottom); size (width, height), grid
    (rows, columns) of crops."""
    width, height = size
    edge = torch.arange(SIDE) * PATCH
    top, left = (e.flatten() for e in torch.meshgrid(edge, edge, indexing="ij"))
    square = torch.stack([left, top, left + PATCH, top + PATCH], 1).double()
    out = [square * torch.tensor([width, height, width, height]) / (SIDE * PATCH)]  # the thumbnail is stretched to a square
    canvas_h, canvas_w = (g * SIDE * PATCH for g in grid)
    scale = min(canvas_w / width, canvas_h / height)
    pad_x = (canvas_w - min(math.ceil(width * scale), canvas_w)) // 2
    pad_y = (canvas_h - min(math.ceil(height * scale), canvas_h)) // 2
    for row in range(grid[0]):
        for column in range(grid[1]):
            x, y = column * SIDE * PATCH - pad_x, row * SIDE * PATCH - pad_y
            out.append((square + torch.tensor([x, y, x, y])) / scale)
    return torch.cat(out)


def token_marks(boxes: torch.Tensor, marks: list[Mark]) -> torch.Tensor:
    """Index of the mark that covers at least a third of a token, or half of which lies in it; -1 where there is none."""
    best, label = torch.full((len(boxes),), 0.0).double(), torch.full((len(boxes),), -1)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for j, mark in enumerate(marks):
        left, top, right, bottom = mark.box
        w = (boxes[:, 2].clamp(max=right) - boxes[:, 0].clamp(min=left)).clamp(min=0)
        h = (boxes[:, 3].clamp(max=bottom) - boxes[:, 1].clamp(min=top)).clamp(min=0)
        inside = w * h
        shown = torch.maximum(inside / area, inside / ((right - left) * (bottom - top)) * (2 / 3))
        hit = (shown >= 1 / 3) & (shown > best)
        best, label = torch.where(hit, shown, best), torch.where(hit, j, label)
    return label


def layout(config, size: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
    """Packed order of a picture of this size (width, height) [S], as the model packs it, and its grid of crops."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    hw = (size[1], size[0])
    gh, gw = get_anyres_image_grid_shape(hw, config.image_grid_pinpoints, config.vision_config.image_size)
    grid = int(gh), int(gw)
    rows = torch.arange((1 + grid[0] * grid[1]) * SIDE * SIDE)
    canvas = rows[SIDE * SIDE :].view(*grid, SIDE, SIDE).transpose(1, 2).reshape(grid[0] * SIDE, grid[1] * SIDE)
    canvas = unpad_image(canvas[None], hw)[0]
    canvas = torch.cat([canvas, canvas.new_full((len(canvas), 1), -1)], 1)
    return torch.cat([rows[: SIDE * SIDE], canvas.flatten()]), grid


@torch.inference_mode()
def tower_features(model, processor, picture: Image.Image) -> torch.Tensor:
    """The tower's chosen hidden states of every view, without CLS, [views * 256, D]."""
    batch = processor.image_processor(images=picture, return_tensors="pt")
    states = model.model.vision_tower(batch.pixel_values[0].to(model.dtype), output_hidden_states=True).hidden_states
    return torch.cat([states[i] for i in model.config.vision_feature_layer], -1)[:, 1:].flatten(0, 1)


def encode(model, processor, scenes: list[tuple[Image.Image, list[Mark]]], file: Path, desc: str = "") -> list[Scene]:
    """Tower outputs of the scenes, kept in the memory-mapped `file` (float16); a finished file is used again."""
    width = model.config.vision_config.hidden_size * len(model.config.vision_feature_layer)
    plans = [(*layout(model.config, picture.size), picture.size, marks) for picture, marks in scenes]
    counts = [(1 + grid[0] * grid[1]) * SIDE * SIDE for _, grid, _, _ in plans]
    ends = np.cumsum(counts)
    if not file.is_file():
        part = file.with_suffix(".part")
        store = np.memmap(part, np.float16, "w+", shape=(int(ends[-1]), width))
        for (picture, _), end, n in zip(tqdm(scenes, desc=desc, mininterval=10), ends, counts, strict=True):
            store[end - n : end] = tower_features(model, processor, picture).half().numpy()
        store.flush()
        part.rename(file)
    store = np.memmap(file, np.float16, "r", shape=(int(ends[-1]), width))
    return [
        Scene(store[end - n : end], order, token_marks(token_boxes(size, grid), marks), marks)
        for (order, grid, size, marks), end, n in zip(plans, ends, counts, strict=True)
    ]
