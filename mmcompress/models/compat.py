"""All in which versions of transformers differ, asked of signatures and attributes, never of a version number.

| what | until | since | asked by |
|---|---|---|---|
| the cache's argument and output | `past_key_values` | `cache` (5.24) | `create_causal_mask`'s parameters |
| who encodes items in `generate` | forward | before it, handed over as `mm_encoder_outputs` (5.18) | the argument |
| items of a prompt with several answers | mixed up | right (5.19) | not at all: the right order is always written |
| an all-ones `attention_mask` in `generate` | stays | None (5.18) | the mask being None |
| a length given to `Cache.crop` | what stays, deprecated | refused (5.20) | an empty layer's answer |
| cos and sin under m-RoPE | one table an axis [3, B, S, d] (5.16) | composed [B, S, d] | their dimensions |
| hybrid layers' mask builder | a function | a dict of functions | its type |
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

RECURRENT = ("linear_attention", "conv")
"""Layer types whose mask is 2-D: which rows are padding."""


def installed() -> str:
    """'transformers 5.17.0', for sentences."""
    import transformers

    return f"transformers {transformers.__version__}"


@functools.cache
def cache_name() -> str:
    """What this version calls the cache among arguments and outputs."""
    from transformers.masking_utils import create_causal_mask

    return "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among arguments or outputs, under either name."""
    found = arguments.get("cache")
    return found if found is not None else arguments.get("past_key_values")


CACHE_NAMES = ("cache", "past_key_values")


def encoded_ahead(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """kind -> what its encoder gave, where `generate` ran it before this forward."""
    return {kind: out for kind, out in (arguments.get("mm_encoder_outputs") or {}).items() if out is not None}


def rotary_sections(rotary: Any) -> Any:
    """How many frequencies each axis of m-RoPE has, or None for plain RoPE."""
    found = getattr(rotary, "mrope_section", None)
    return found if found is not None else (getattr(rotary.config, "rope_parameters", None) or {}).get("mrope_section")


def composed(table: torch.Tensor, rotary: Any) -> torch.Tensor:
    """cos or sin [B, S, d] of a rotary module's answer: where it gives one table an axis [3, B, S, d], as attention picks
    them."""
    if table.dim() == 3:
        return table
    parts = table.split(list(rotary_sections(rotary)) * 2, -1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], -1)


def feature_lists(output: Any) -> dict[str, Any]:
    """Features of each item as an encoder's output holds them: by field, a list of tensors or a list of such lists."""
    found = {}
    for name in ("pooler_output", "deepstack_features"):
        value = getattr(output, name, None)
        if isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and name == "pooler_output"):
            found[name] = list(value)
    return found


def put_features(output: Any, features: dict[str, Any], order: list[int]) -> None:
    """Give an output the features of these items, in this order. Some versions (5.18) repeat them one by one for several
    answers, which mixes up the items of a prompt."""
    for name, value in features.items():
        if len(value) != max(order) + 1 and name == "pooler_output":
            return  # not one entry an item
        if name == "pooler_output":
            now = [value[i] for i in order]
            output.pooler_output = torch.stack(now) if isinstance(output.pooler_output, torch.Tensor) else now
        elif value and isinstance(value[0], (list, tuple)) and all(len(level) == max(order) + 1 for level in value):
            setattr(output, name, [[level[i] for i in order] for level in value])


def crop_takes(length: int) -> None:
    """Answer as stock caches do to `crop(length)` with a positive length: refuse, or warn and take it for what stays."""
    from transformers.cache_utils import DynamicLayer

    DynamicLayer().crop(length)


def builder(layer_type: str) -> Callable | None:
    """What makes the mask that attention gets in layers of this type; None where there is no such type."""
    from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING as builders

    found: Any = builders.get(layer_type)
    if isinstance(found, dict):  # hybrid layers need several: this is the attention's
        return next(f for name, f in found.items() if name not in RECURRENT)
    return found


def layer_type(config: Any, i: int) -> str:
    """The type of decoder layer i, by which its mask is made."""
    types = getattr(config, "layer_types", None)
    if types:
        return types[i]
    if getattr(config, "sliding_window", None):
        return "sliding_attention"
    return "chunked_attention" if getattr(config, "attention_chunk_size", None) else "full_attention"


def packed_samples(position_ids: Any) -> Any:
    """[B, S] number of the sample that each row of a packed batch belongs to, as stock transformers tells it from restarting
    positions, or None where nothing is packed."""
    from transformers.masking_utils import find_packed_sequence_indices

    return find_packed_sequence_indices(position_ids)


@functools.cache
def stock_expansion() -> Any:
    """What repeats inputs for several answers to a prompt where a model has no way of its own."""
    from transformers import GenerationMixin

    return GenerationMixin._expand_inputs_for_generation


@functools.cache
def stock_generate() -> Any:
    from transformers import GenerationMixin

    return GenerationMixin.generate
