"""What counts as a refusal: a ValueError or TypeError of the library, on purpose, in one sentence that names something."""

from __future__ import annotations

import linecache
import re
import traceback
from dataclasses import fields
from functools import cache
from pathlib import Path

import mmcompress
from mmcompress.registry import field_names, get_method, list_methods

PACKAGE = Path(mmcompress.__file__).parent
LONGEST = 500
ARGUMENTS = {
    "model", "models", "input_ids", "attention_mask", "inputs_embeds", "position_ids", "pixel_values", "pixel_values_videos",
    "image_sizes", "image_grid_thw", "video_grid_thw", "input_features", "feature_attention_mask", "past_key_values",
    "labels", "cache", "prefill_chunk_size", "assistant_model", "attn_implementation", "config", "compressor", "chain",
    "folder", "weights", "method", "methods", "placement", "stages", "signal", "signals", "relevance", "positions",
    "query_attention", "cls_logits", "tower", "keys", "text", "json", "safetensors", "mmcompress", "restore_", "compress_",
    "image", "video", "audio", "item", "items", "tokens", "group", "size", "x", "position", "features", "placeholders",
    "command", "prompt", "mask", "format", "version", "parameters", "field", "fields", "layout", "grid", "crops", "step",
    "anchors", "row", "rows",
}  # fmt: skip


class Failure(AssertionError):
    """A case that ended in something else than a right result or one sentence."""


@cache
def vocabulary() -> frozenset[str]:
    names = {n for m in list_methods() for n in field_names(get_method(m))}
    return frozenset({*names, *list_methods(), *ARGUMENTS, *(f.name for f in fields(mmcompress.Compressor))})


def faults_of(message: str) -> list[str]:
    """What is wrong with an error message as one sentence; [] where nothing is."""
    out = []
    if "\n" in message.strip():
        out.append("more than one line")
    if not message.strip():
        out.append("empty")
    if len(message) > LONGEST:
        out.append(f"{len(message)} characters")
    if "Traceback" in message:
        out.append("a traceback")
    if not set(re.findall(r"[A-Za-z_]\w*", message.lower())) & vocabulary():
        out.append("names no argument or field")
    return out


def on_purpose(error: BaseException) -> bool:
    """Whether the innermost frame is a `raise` of the library itself."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    frame = frames[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return Path(frame.filename).is_relative_to(PACKAGE) and line.startswith("raise ")


def refusal(error: BaseException, *, kinds: tuple[type[BaseException], ...] = (ValueError, TypeError)) -> str:
    """The sentence of a refusal. Raises what it is where it is none."""
    if not isinstance(error, kinds) or not on_purpose(error):
        raise error
    message = str(error)
    if wrong := faults_of(message):
        raise Failure(f"a refusal must be one sentence that names something: {', '.join(wrong)}: {message!r}") from error
    return f"refused: {message}"
