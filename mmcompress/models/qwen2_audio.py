"""Qwen2-Audio: clips of different lengths; the encoder pools pairs of its steps, and there is no `get_audio_features`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmcompress.models.call import Call
from mmcompress.models.generic import Family, ItemSpec
from mmcompress.models.signals import Signal


class Qwen2Audio(Family):
    name = "qwen2_audio"
    modalities = ("audio",)
    offers = ("keys", "tower")
    notes = "the processor must expand <|AUDIO|> to one id per token"

    def specs(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec]:
        mask = call.argument(kind, "feature_attention_mask")
        _, lengths = self.encoder._get_feat_extract_output_lengths(mask.sum(-1))
        out = [ItemSpec.lattice(kind, (n, 1, 1), clip * self.steps) for clip, n in enumerate(lengths.tolist())]
        if num_rows < sum(s.num_rows for s in out):
            raise ValueError("input_ids must hold one audio id per token (the processor's expanded form), got the legacy form")
        return out

    @property
    def encoder(self) -> Any:
        return self.core.audio_tower  # type: ignore[return-value]

    @property
    def steps(self) -> int:
        """Tokens that the encoder gives for a full window."""
        return self.config.audio_config.max_source_positions // 2

    def tokens_of(self, call: Call, kind: str, one: Signal, values: Tensor) -> Tensor:
        if not one.attention:
            return values
        T = call.of(kind).attention[0].k.shape[2]
        return values.unflatten(0, (-1, T))[:, : 2 * self.steps].unflatten(1, (-1, 2)).mean(2).flatten(0, 1)
