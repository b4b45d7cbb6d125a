"""LLaVA-NeXT: AnyRes crops. The packed rows of an image are the thumbnail, then the unpadded canvas with one newline
after every row of it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from mmcompress.models.call import Call
from mmcompress.models.generic import Family, ItemSpec
from mmcompress.tokens import Layout


class LlavaNext(Family):
    name = "llava_next"
    offers = ("crops", "cls_logits", "keys", "tower")
    notes = "AnyRes crops, thumbnail, newline columns kept as separators"

    def specs(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec]:
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        out, view = [], 0
        for size in extents(call.argument(kind, "image_sizes")):
            rows, columns = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, vision.image_size)
            spec = anyres(side, rows, columns, tuple(size))
            out.append(
                ItemSpec(
                    kind, spec.num_rows, spec.layout, spec.position, spec.group, spec.rows, spec.source + view * side * side
                )
            )
            view += 1 + rows * columns
        return out


def extents(sizes: Any) -> list[list[int]]:
    """(height, width) of every picture, however they were given."""
    return torch.as_tensor(sizes, device=None if isinstance(sizes, torch.Tensor) else "cpu").tolist()


@functools.lru_cache(maxsize=512)
def anyres(side: int, rows: int, columns: int, image_size: tuple[int, int]) -> ItemSpec:
    """One packed image: `side`² tokens a view, crops in `rows` × `columns`, image_size (H, W) in pixels."""
    H, W = rows * side, columns * side
    top, left = padding(image_size, H, W)
    arange = functools.partial(torch.arange, device="cpu")  # whatever the default device is
    y, x = torch.meshgrid(arange(top, H - top), arange(left, W - left), indexing="ij")
    h, w = (H - 2 * top), (W - 2 * left)
    y, x = y.flatten(), x.flatten()
    crop = y // side * columns + x // side
    thumb = arange(side * side)
    position = torch.cat([torch.stack([thumb * 0, thumb // side, thumb % side], -1), torch.stack([y * 0, y, x], -1)])
    canvas = arange(h * w)
    return ItemSpec(
        kind="image",
        num_rows=side * side + h * (w + 1),
        layout=Layout("image", (1, H, W), (rows, columns), side, image_size),
        position=position,
        group=torch.cat([thumb * 0, 1 + crop]),
        rows=torch.cat([thumb, side * side + canvas + canvas // w]),
        source=torch.cat([thumb, (1 + crop) * side * side + y % side * side + x % side]),
    )


def padding(image_size: tuple[int, int], H: int, W: int) -> tuple[int, int]:
    """Rows and columns that the model cuts on either side of an H × W canvas for an image of (height, width) pixels."""
    height, width = image_size
    if width / height > W / H:
        return (H - int(round(height * (W / width), 7))) // 2, 0
    return 0, (W - int(round(width * (H / height), 7))) // 2
