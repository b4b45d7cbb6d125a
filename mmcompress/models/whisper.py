"""Whisper: the encoder's rows of a window of sound are one item; the decoder reads what is left of them by cross-attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmcompress.models.call import Call
from mmcompress.models.generic import Family
from mmcompress.models.wrap import base_model


class Whisper(Family):
    name = "whisper"
    modalities = ("audio",)
    offers = ("keys",)
    notes = "encoder-decoder: cross-attention reads the reduced sequence; before the decoder only"

    def __init__(self, model: Any):
        self.core = getattr(base_model(model), "model", None)
        if not isinstance(getattr(self.core, "encoder", None), nn.Module):
            raise ValueError(f"model must be a Whisper with its encoder, got {type(model).__name__}")
        self.config = self.core.config
        self.text = self.stack = self.core.decoder
        self.layers = self.text.layers

    @property
    def seam(self) -> Any:
        from mmcompress.models.encoder_decoder import EncoderDecoderSeam

        return EncoderDecoderSeam

    def tower(self, core: nn.Module, kind: str) -> nn.Module | None:
        return core.encoder  # type: ignore[return-value]

    def dropped_columns(self, call: Call, kind: str) -> int:
        return 0
