"""Speech recognition: Whisper tiny.en whole, as it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmcompress.zoo.wheels import part_dir


def asr(cache_dir: str | Path | None, parts: Path | None) -> tuple[Any, Any]:
    """Whisper: English transcripts of mono sound at 16 kHz; a window of 30 s is 1,500 encoder tokens. Nothing is trained."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = part_dir("whisper-tiny-en", cache_dir)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model.eval(), WhisperProcessor.from_pretrained(folder, trust_remote_code=False)
