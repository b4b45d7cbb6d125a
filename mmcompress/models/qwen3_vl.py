"""Qwen3-VL: as Qwen2-VL, with interleaved m-RoPE, clips whose steps stand apart between time stamps, and DeepStack: features of
earlier encoder layers that are added to the visual rows after the first decoder layers."""

from __future__ import annotations

from mmcompress.models.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"
    notes = f"{Qwen2VL.notes}; DeepStack features are those of the kept rows, and layer must come after them (3 as released)"
