"""Whisper: the encoder's rows of a window of sound are one item; the decoder reads what is left of them by cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.models import signals
from mmcompress.models.generic import Call, Family


class Whisper(Family):
    name = "whisper"
    modalities = ("audio",)
    offers = ("keys",)
    notes = "encoder-decoder: cross-attention reads the reduced sequence; before the decoder only"

    def __init__(self, model: Any):
        super().__init__(model)
        if not isinstance(getattr(self.core, "encoder", None), nn.Module):
            raise ValueError(f"model must be a Whisper with its encoder, got {type(model).__name__}")
        self.text = self.core.decoder
        self.layers = self.text.layers

    @property
    def seam(self) -> Any:
        from mmcompress.models.encoder_decoder import EncoderDecoderSeam

        return EncoderDecoderSeam

    def tower(self, core: nn.Module, kind: str) -> nn.Module | None:
        return core.encoder  # type: ignore[return-value]

    def signal(self, call: Call, kind: str, name: str) -> Tensor:
        return torch.cat([signals.flat_keys(k) for _, k in call.attention[kind]])
