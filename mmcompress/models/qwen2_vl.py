"""Qwen2-VL: images and video on a (t, h, w) grid, m-RoPE; the merger turns squares of patches into tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.models.call import Call
from mmcompress.models.generic import Family, ItemSpec
from mmcompress.models.signals import Signal


class Qwen2VL(Family):
    name = "qwen2_vl"
    modalities = ("image", "video")
    offers = ("keys", "tower")
    notes = "m-RoPE positions kept; manual decode loops must pass position_ids (stock transformers)"

    def specs(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec]:
        merge, out, start = self.config.vision_config.spatial_merge_size, [], 0
        for t, h, w in torch.as_tensor(call.argument(kind, f"{kind}_grid_thw")).tolist():
            out.append(ItemSpec.lattice(kind, (t, h // merge, w // merge), start))
            start += out[-1].num_rows
        return out

    def tokens_of(self, call: Call, kind: str, one: Signal, values: Tensor) -> Tensor:
        """The merger turns squares of patches into tokens, which is what the language model gets."""
        return values.unflatten(0, (-1, self.config.vision_config.spatial_merge_size**2)).mean(1) if one.attention else values
