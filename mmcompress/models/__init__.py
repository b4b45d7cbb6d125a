"""Which models can be compressed: `family(model)` finds the adapter, `families()` lists them. One file per family that
differs."""

from __future__ import annotations

import importlib
from typing import Any

ADAPTERS = {
    "llava": "llava.Llava",
    "llava_next": "llava_next.LlavaNext",
    "llava_onevision": "llava_onevision.LlavaOnevision",
    "qwen2_5_vl": "qwen2_5_vl.Qwen2_5VL",
    "qwen2_vl": "qwen2_vl.Qwen2VL",
    "qwen3_vl": "qwen3_vl.Qwen3VL",
    "qwen2_audio": "qwen2_audio.Qwen2Audio",
    "whisper": "whisper.Whisper",
}
"""config.model_type -> the adapter's place in this package."""


def adapter(model_type: str) -> Any:
    """The adapter class of a model type in ADAPTERS."""
    module, name = ADAPTERS[model_type].split(".")
    return getattr(importlib.import_module(f"mmcompress.models.{module}"), name)


def family(model: Any) -> Any:
    """The adapter for this model. Raises TypeError for what is no transformers model, ValueError for a family that is
    not supported."""
    from torch import nn

    if not isinstance(model, nn.Module) or getattr(model, "config", None) is None:
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    model_type = getattr(model.config, "model_type", None)
    if model_type not in ADAPTERS:
        raise ValueError(
            f"model must be of a supported family ({', '.join(ADAPTERS)}), got {type(model).__name__} of type {model_type!r}"
        )
    if not hasattr(model, "generate"):
        raise ValueError(
            f"model must be the generating class of its family (…ForConditionalGeneration), got {type(model).__name__}"
        )
    return adapter(model_type)(model)


def families() -> list[dict[str, Any]]:
    """Name, modalities, encoder signals and notes of every supported family."""
    return [
        {"name": n, "modalities": list(a.modalities), "signals": list(a.offers), "notes": a.notes}
        for n, a in ((n, adapter(n)) for n in ADAPTERS)
    ]
