"""LLaVA-OneVision: AnyRes pictures as in LLaVA-NeXT, several pictures of a prompt as one view each, and clips whose frames the
model pools 2 × 2. A clip and a single view end with one newline row, a separator."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmcompress.models.call import Call
from mmcompress.models.generic import Family, ItemSpec
from mmcompress.models.llava_next import anyres, extents, padding
from mmcompress.models.signals import Signal


class LlavaOnevision(Family):
    name = "llava_onevision"
    modalities = ("image", "video")
    offers = ("crops", "cls_logits", "keys", "tower")
    notes = "AnyRes pictures and pooled clips, newlines kept as separators; more than nine crops' worth of tokens: no signals"

    @property
    def side(self) -> int:
        """Patches along the edge of a view."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def specs(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec]:
        side = self.side
        if kind == "video":
            clips, frames = call.argument(kind, "pixel_values_videos").shape[:2]
            pooled = math.ceil(side / 2)
            return [with_newline(kind, (frames, pooled, pooled), i * frames * pooled**2) for i in range(clips)]
        from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape

        sizes, counts = extents(call.argument(kind, "image_sizes")), call.argument(kind, "batch_num_images")
        in_crops = [True] * len(sizes) if counts is None else [int(n) == 1 for n in counts for _ in range(int(n))]
        out: list[ItemSpec] = []
        view = 0
        for size, cropped in zip(sizes, in_crops, strict=True):
            start = view * side**2
            view += 1
            if not cropped:
                out.append(with_newline(kind, (1, side, side), start))
                continue
            rows, columns = get_anyres_image_grid_shape(
                size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
            )
            view += rows * columns
            top, left = padding(tuple(size), rows * side, columns * side)
            h, w = rows * side - 2 * top, columns * side - 2 * left
            ratio = math.sqrt(h * w / (int(self.config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2))
            if ratio > 1.1:
                out.append(shrunk(side, int(h // ratio), int(w // ratio)))
            else:
                spec = anyres(side, rows, columns, tuple(size))
                assert spec.source is not None
                out.append(replace(spec, source=spec.source + start))
        return out

    def tokens_of(self, call: Call, kind: str, one: Signal, values: Tensor) -> Tensor:
        if kind != "video":
            return values
        side, pooled = self.side, math.ceil(self.side / 2)
        frames = values.float().reshape(-1, side, side, values[0].numel()).movedim(-1, 1)
        frames = nn.functional.interpolate(frames, size=[pooled, pooled], mode="bilinear")  # as the model pools the features
        return frames.movedim(1, -1).reshape(-1, *values.shape[1:]).to(values)


def with_newline(kind: str, grid: tuple[int, int, int], start: int) -> ItemSpec:
    """A raster of (t, h, w) tokens and one separator behind it."""
    spec = ItemSpec.lattice(kind, grid, start)
    return replace(spec, num_rows=spec.num_rows + 1)


def shrunk(side: int, h: int, w: int) -> ItemSpec:
    """A picture whose canvas the model interpolated to h × w: a thumbnail and rows of unknown crops, as a line of tokens."""
    canvas = torch.arange(h * w, device="cpu")
    rows = torch.cat([torch.arange(side * side, device="cpu"), side * side + canvas + canvas // w])
    spec = ItemSpec.lattice("image", (len(rows), 1, 1))
    return replace(spec, num_rows=side * side + h * (w + 1), rows=rows, source=None)
