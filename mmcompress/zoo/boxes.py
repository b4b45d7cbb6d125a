"""Where the tokens of a view lie in its picture, which mark each shows, and in what order a model packs its views."""

from __future__ import annotations

import math

import torch

from mmcompress.eval.evidence import SHOWS, shown
from mmcompress.eval.tasks.base import Mark

SIDE, PATCH = 16, 14  # tokens per side of a view, pixels per side of a token


def token_boxes(size: tuple[int, int], grid: tuple[int, int] | None) -> torch.Tensor:
    """Every token's region in pixels of the picture, [views * 256, 4] (left, top, right, bottom); size (width, height), grid
    (rows, columns) of crops, None: the thumbnail alone."""
    width, height = size
    edge = torch.arange(SIDE) * PATCH
    top, left = (e.flatten() for e in torch.meshgrid(edge, edge, indexing="ij"))
    square = torch.stack([left, top, left + PATCH, top + PATCH], 1).double()
    out = [square * torch.tensor([width, height, width, height]) / (SIDE * PATCH)]  # the thumbnail is stretched to a square
    if grid is None:
        return out[0]
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
    for j, mark in enumerate(marks):
        share = shown(boxes, mark.box)
        hit = (share >= SHOWS) & (share > best)
        best, label = torch.where(hit, share, best), torch.where(hit, j, label)
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
