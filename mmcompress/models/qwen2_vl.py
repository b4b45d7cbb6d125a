"""Qwen2-VL: images and video on a (t, h, w) grid, m-RoPE; the merger turns squares of patches into tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.models import signals
from mmcompress.models.generic import Call, Family, ItemSpec


class Qwen2VL(Family):
    name = "qwen2_vl"
    modalities = ("image", "video")
    per_item = {}  # the model's own expansion repeats per sample
    offers = ("keys", "tower")
    notes = "m-RoPE positions kept; manual decode loops must pass position_ids (stock transformers)"

    def specs(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec]:
        merge, out, start = self.config.vision_config.spatial_merge_size, [], 0
        for t, h, w in call.arguments[f"{kind}_grid_thw"].tolist():
            out.append(ItemSpec.lattice(kind, (t, h // merge, w // merge), start))
            start += out[-1].num_rows
        return out

    def signal(self, call: Call, kind: str, name: str) -> Tensor:
        if name == "tower":  # the merger's output is what the language model gets
            return torch.cat(list(call.features[kind].pooler_output))
        keys = torch.cat([signals.flat_keys(k) for _, k in call.attention[kind]])
        return keys.unflatten(0, (-1, self.config.vision_config.spatial_merge_size**2)).mean(1)  # one per token
