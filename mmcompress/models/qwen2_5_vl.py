"""Qwen2.5-VL: as Qwen2-VL, with a tower that works on window-permuted patches."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.models.generic import Call
from mmcompress.models.qwen2_vl import Qwen2VL


class Qwen2_5VL(Qwen2VL):
    name = "qwen2_5_vl"

    def signal(self, call: Call, kind: str, name: str) -> Tensor:
        values = super().signal(call, kind, name)
        if name == "tower":
            return values
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        vision = self.config.vision_config
        window, _ = get_vision_window_index(
            call.arguments[f"{kind}_grid_thw"], vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        return values[torch.argsort(window).to(values.device)]
