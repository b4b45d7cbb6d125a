"""What the tables of tiny models are made of: special ids, items, a family's entry, small configurations that many share."""

# ruff: noqa: C408
from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCAB, PAD, BOS, IMAGE, VIDEO, AUDIO, START, END, FIRST_WORD = 99, 0, 1, 3, 4, 5, 6, 7, 10
PLACEHOLDERS = (IMAGE, VIDEO, AUDIO)
BREAK, STOP = 8, 9
"""Ids of the newer families: the end of a line of an image; the end of a clip or recording that begins with BREAK."""


@dataclass(frozen=True)
class Item:
    """One image, clip or recording: its ids in the prompt and its share of the model's inputs, which a batch concatenates."""

    ids: list[int]
    tensors: dict[str, Tensor]
    num_separators: int = 0


@dataclass(frozen=True)
class Family:
    """config(**overrides) -> the model's configuration; item(size, generator) -> Item; `tiny_inputs` cycles through sizes.

    model: the class in transformers ("" -> the one that its Auto classes name). batch_tensors: what follows from the ids.
    kinds: of the items. placeholders: the ids that stand for rows of items. suppress: ids that `generate` never gives.
    slots: pixels come as [rows, items of the row, …], filled up with zeros. most: items that a prompt may hold.
    text_row: whether a row without items may stand in a batch with items. setting: what has to hold while the model is built.
    gain: what a matrix's standard deviation is multiplied with.
    """

    config: Callable[..., Any]
    item: Callable[[Any, torch.Generator], Item]
    sizes: tuple[Any, ...]
    batch_tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    model: str = ""
    kinds: tuple[str, ...] = ("image",)
    placeholders: tuple[int, ...] = PLACEHOLDERS
    suppress: tuple[int, ...] = PLACEHOLDERS
    slots: bool = False
    most: int | None = None
    text_row: bool = True
    setting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    gain: float = 1.0


def stock(name: str) -> Any:
    """A class of transformers by its name, or by its place below `transformers.`; ValueError where this version lacks it."""
    import transformers

    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"transformers.{module}") if module else transformers, last)
    except (AttributeError, ImportError) as error:
        raise ValueError(f"transformers must have {last} for this family, got version {transformers.__version__}") from error


def entry(model: str, item: Callable, sizes: Any = (0, 1, 2), kinds: Any = "image", **rest: Any) -> Family:
    """A family by its class in transformers. What `Family` does not name goes to the model's configuration."""
    known = {k: rest.pop(k) for k in list(rest) if k in Family.__dataclass_fields__}
    suppress = tuple(range(2, FIRST_WORD))

    def config(text: Mapping | None = None, vision: Mapping | None = None, **changes: Any) -> Any:
        fields = {**rest, **changes}
        for name, change in (("text_config", text), ("vision_config", vision)):
            if change:
                fields[name] = {**fields[name], **change}
        return stock(model).config_class(**fields)

    kinds = (kinds,) if isinstance(kinds, str) else kinds
    return Family(config, item, sizes, **{"model": model, "kinds": kinds, "suppress": suppress, **known})


# text models

WIDTH, LAYERS = 32, 4
ROPE = {"rope_type": "default", "rope_theta": 100.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
BARE: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None,
    rope_parameters=ROPE,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
ALTERNATE = ["sliding_attention", "full_attention"] * 2
HYBRID = dict(
    head_dim=8, layer_types=["linear_attention", "full_attention"] * 2, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4, partial_rotary_factor=1.0,
)  # fmt: skip


def text(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {**BARE, "model_type": model_type, **changes}


def mistral(**changes: Any) -> dict[str, Any]:
    return text("mistral", head_dim=8, sliding_window=None, **changes)


def cohere() -> dict[str, Any]:
    return text("cohere2", head_dim=8, sliding_window=256, layer_types=ALTERNATE)


def gemma(**changes: Any) -> dict[str, Any]:
    rest = {k: v for k, v in BARE.items() if k not in ("rope_parameters", "bos_token_id")}
    return {**rest, "head_dim": 8, "sliding_window": 256, **changes}


def mrope(**changes: Any) -> dict[str, Any]:
    return {**BARE, "rope_parameters": MROPE, **changes}


# towers

SIDE = 32
"""Pixels along an edge of a view."""
VISION = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE)


def tower(model_type: str, patch_size: int = 8, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **VISION, "patch_size": patch_size, **changes}


def clip() -> dict[str, Any]:
    return tower("clip_vision_model", projection_dim=WIDTH)


def siglip(**changes: Any) -> dict[str, Any]:
    return tower("siglip_vision_model", vision_use_head=False, **changes)


def qwen_tower(**changes: Any) -> dict[str, Any]:
    sizes = dict(patch_size=4, temporal_patch_size=2, spatial_merge_size=2, in_channels=3)
    return {"depth": 2, "hidden_size": WIDTH, "num_heads": 4, **sizes, **changes}


def qformer(**changes: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, encoder_hidden_size=WIDTH)
    return {**sizes, "vocab_size": VOCAB, **changes}


# items


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def marked(n: int, token: int = IMAGE, first: int = START, last: int = END) -> list[int]:
    """n rows between the marks that the family's processor writes around them."""
    return [first, *[token] * n, last]


def view(n: int, edge: int = SIDE, name: str = "pixel_values", marks: bool = False, shape: tuple[int, ...] = ()) -> Callable:
    """Pictures of one view, n rows each."""

    def item(size: Any, generator: torch.Generator) -> Item:
        ids = marked(n) if marks else [IMAGE] * n
        return Item(ids, {name: noise(generator, 1, *shape, 3, edge, edge)})

    return item


def frames(n: int, count: int, ids: list[int] | None = None) -> Callable:
    """Clips of `count` frames, n rows each."""

    def item(size: Any, generator: torch.Generator) -> Item:
        return Item(ids or [VIDEO] * n, {"pixel_values_videos": noise(generator, 1, count, 3, SIDE, SIDE)})

    return item


GRIDS = ((1, 8, 8), (1, 4, 12), (1, 8, 4))
CLIPS = ((3, 4, 8), (2, 4, 4), (2, 8, 4))


def grid(width: int = 3 * 2 * 4 * 4, kind: str = "image", ids: Callable | None = None, more: Mapping | None = None) -> Callable:
    """Packed patches [t·h·w, width] with their (t, h, w), one row for each 2 x 2 of them.

    ids(t, rows of a step) -> the ids. more: name -> a value for each item.
    """
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    token = IMAGE if kind == "image" else VIDEO

    def item(size: tuple[int, int, int], generator: torch.Generator) -> Item:
        t, h, w = size
        tensors = dict(zip(names, (noise(generator, t * h * w, width), torch.tensor([size])), strict=True))
        tensors |= {k: torch.tensor([v]) for k, v in (more or {}).items()}
        return Item(ids(t, h * w // 4) if ids else marked(t * h * w // 4, token), tensors)

    return item


def stamped(t: int, n: int) -> list[int]:
    """A clip whose steps of n rows stand apart, each after a time stamp of two words."""
    return [i for s in range(t) for i in (FIRST_WORD + s, FIRST_WORD + 10 + s, *marked(n, VIDEO))]


def mel(columns: int, rows: Callable[[int], int], mask: str = "", bins: int = 16, ids: Callable | None = None) -> Callable:
    """Recordings of `size` of `columns` spectrogram columns [1, bins, columns], rows(size) rows each."""

    def item(size: int, generator: torch.Generator) -> Item:
        real = torch.arange(columns) < size
        tensors = {"input_features": noise(generator, 1, bins, columns) * real}
        if mask:
            tensors[mask] = real.long()[None]
        return Item((ids or sound)(rows(size)), tensors)

    return item


def mel_last(columns: int, rows: Callable[[int], int], ids: Callable | None = None) -> Callable:
    """The same with the columns first [1, columns, 16], and a bool mask."""

    def item(size: int, generator: torch.Generator) -> Item:
        real = torch.arange(columns) < size
        spectrum = noise(generator, 1, columns, 16) * real[:, None]
        return Item((ids or sound)(rows(size)), {"input_features": spectrum, "input_features_mask": real[None]})

    return item


def sound(n: int) -> list[int]:
    return marked(n, AUDIO, BREAK, STOP)


# what follows from the ids


def item_types(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def token_types(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def zero_types(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


def words(count: int, generator: torch.Generator) -> list[int]:
    """`count` ids of words."""
    return torch.randint(FIRST_WORD, VOCAB, (count,), generator=generator).tolist()
