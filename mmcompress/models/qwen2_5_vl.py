"""Qwen2.5-VL: as Qwen2-VL, with a tower that works on window-permuted patches."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.models.call import Call
from mmcompress.models.qwen2_vl import Qwen2VL
from mmcompress.models.signals import Signal


class Qwen2_5VL(Qwen2VL):
    name = "qwen2_5_vl"

    def tokens_of(self, call: Call, kind: str, one: Signal, values: Tensor) -> Tensor:
        values = super().tokens_of(call, kind, one, values)
        if not one.attention:
            return values
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        vision = self.config.vision_config
        grid = torch.as_tensor(call.argument(kind, f"{kind}_grid_thw"))
        window, _ = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return values[torch.argsort(window).to(values.device)]
