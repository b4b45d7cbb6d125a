"""Which models can be compressed: `family(model)` finds a model's parts by its structure, or by a listed adapter where a family
differs; `families()` lists those."""

from __future__ import annotations

import importlib
import warnings
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
"""config.model_type -> the adapter's place in this package, for families with signals or items of their own."""

KIN = {
    "vipllava": "llava.Llava",
    "qwen3_vl_moe": "qwen3_vl.Qwen3VL",
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm", "granite_docling"), "generic.PerSample"),
}
"""Model types that an adapter of another family, or a variant of the generic one, serves."""

REASONS = {
    "its generate hands a few Q-Former rows to the text model's own": ("blip-2", "instructblip", "instructblipvideo"),
    "its text model reads items by cross-attention": ("mllama", "idefics", "florence2", "t5gemma2", "evolla"),
    "its items enter inside the text model, by a mask or as a prefix": ("kosmos-2", "kosmos-2.5", "git"),
    "its sound is added to the text rows frame by frame": ("voxtral_realtime", "kyutai_speech_to_text"),
}
REFUSED = {model_type: reason for reason, types in REASONS.items() for model_type in types}
"""Model types that cannot be compressed before the language model, and why."""


def adapter(model_type: str) -> Any:
    """The adapter class of a model type in ADAPTERS or KIN."""
    module, name = {**KIN, **ADAPTERS}[model_type].split(".")
    return getattr(importlib.import_module(f"mmcompress.models.{module}"), name)


def describe(core: str, text: str, placeholders: Any, inputs: Any = None) -> Any:
    """Where the parts of a model of your own are, for `compress_(model, compressor, seam=…)`; see `described.describe`."""
    from mmcompress.models.described import describe as make

    return make(core, text, placeholders, inputs)


def family(model: Any, description: Any = None) -> Any:
    """The adapter for this model. Raises TypeError for what is no transformers model, ValueError for one that is no multimodal
    LLM or whose structure is not understood. A type that only fits by structure is served with a warning."""
    from torch import nn

    from mmcompress.models.described import Described, Description
    from mmcompress.models.generic import Family
    from mmcompress.models.tested import MODEL_TYPES

    if not isinstance(model, nn.Module) or getattr(model, "config", None) is None:
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if description is not None:
        if not isinstance(description, Description):
            raise TypeError(f"seam must be what mmcompress.models.describe gives, got {description!r}")
        return Described(model, description)
    model_type = str(getattr(model.config, "model_type", None))
    if model_type in REFUSED:
        raise ValueError(
            f"model must be of a supported family, got {type(model).__name__} of type {model_type!r}: {REFUSED[model_type]}"
        )
    if not hasattr(model, "generate"):
        raise ValueError(
            f"model must be the generating class of its family (…ForConditionalGeneration), got {type(model).__name__}"
        )
    if model_type in ADAPTERS or model_type in KIN:
        return adapter(model_type)(model)
    found = Family(model)
    if model_type not in MODEL_TYPES:
        warnings.warn(
            f"{type(model).__name__} of type {model_type!r} fits by its structure, but mmcompress was not tested with it: "
            f"`mmcompress check` shows what holds for it",
            stacklevel=5,
        )
    return found


def families() -> list[dict[str, Any]]:
    """Name, modalities, encoder signals and notes of every family that has an adapter of its own."""
    return [
        {"name": n, "modalities": list(a.modalities), "signals": list(a.offers), "notes": a.notes}
        for n, a in ((n, adapter(n)) for n in ADAPTERS)
    ]
