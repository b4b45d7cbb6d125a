"""Tiny random models of every family, and padded batches of items that fit them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.testing.grids import GRIDDED
from mmcompress.testing.more import MORE
from mmcompress.testing.parts import BOS, PAD, PLACEHOLDERS, Family, Item, stock, words
from mmcompress.testing.sounds import SOUNDS
from mmcompress.testing.tested import CLIPS_ONLY, TESTED
from mmcompress.testing.views import VIEWS

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error of a logit that counts as equal, by dtype."""

FAMILIES: dict[str, Family] = {**TESTED, **CLIPS_ONLY, **VIEWS, **GRIDDED, **SOUNDS, **MORE}
"""The names that `tiny_model` and `tiny_inputs` take. A family of several kinds of items has an entry for each, or one that
mixes them."""


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {name!r}")
    return FAMILIES[name]


def tiny_model(family: str, seed: int = 0, gain: float = 1.0, **overrides: Any) -> Any:
    """A random model of the family in float32 and eval mode, without an end token, that never generates placeholders.

    overrides: `text` and `vision` are dicts of changes to the text and tower configuration, `tower` is clip, siglip or dinov2
    (LLaVA families), anything else goes to the model's configuration.
    gain: the standard deviation of a matrix is gain / sqrt(fan in).
    Raises ValueError for an unknown name, and where the installed transformers lacks the family.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, GenerationConfig, Qwen2AudioForConditionalGeneration

    spec = _family(family)
    config = spec.config(**overrides)
    if not spec.model:
        config.eos_token_id = None
    families: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    by_type: Any = Qwen2AudioForConditionalGeneration if family == "qwen2_audio" else None
    build: Any = stock(spec.model) if spec.model else by_type or families[type(config)]
    with torch.random.fork_rng(devices=[]), spec.setting():
        torch.manual_seed(seed)
        model = build(config)
    fill(model, torch.Generator().manual_seed(seed), gain * spec.gain)
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None, suppress_tokens=list(spec.suppress)
    )
    return model.float().eval()


@torch.no_grad()
def fill(model: nn.Module, generator: torch.Generator, gain: float = 1.0) -> None:
    """Random weights under which attention is far from flat: unit gain, norms near what they begin with."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            noise = torch.randn(p.shape, generator=generator)
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and p.dim() > 1:
                p.copy_(noise * gain / math.sqrt(p[0].numel()))
            elif p.dim() == 1 and name in ("weight", "lambda1"):  # norms (of which some add the one themselves), layer scales
                p.copy_(p + 0.1 * noise)
            elif p.dim() in (2, 3) and len(p) > 1 and not isinstance(module, nn.Embedding):  # routers, and experts one by one
                p.copy_(noise * gain / math.sqrt(p.shape[-1]))
            else:
                p.copy_(noise * (0.1 if name == "bias" else 0.5))


def tiny_inputs(
    family: str,
    batch_size: int = 2,
    seed: int = 0,
    items: Sequence[Sequence[int]] | None = None,
    padding_side: str = "left",
    rows: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """A padded batch of prompts, ready for `model(**inputs)` and `model.generate(**inputs)`.

    items: for each row the sizes of its items, as indices into `FAMILIES[family].sizes`; by default row 0 has two items (one
    where the family takes no more), the others one of another size each, and from batch_size 4 on the last row is text only
    (where a batch of the family may hold such a row).
    rows: make only these rows of that batch, padded among themselves: a row's content follows from the seed and its own number,
    so `rows=[2]` is sample 2 alone.
    """
    spec = _family(family)
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be left or right, got {padding_side!r}")
    made = [_row(spec, r, seed, own) for r, own in _rows(spec, batch_size, items, rows)]
    prompts = [prompt for prompt, _ in made]
    length = max(map(len, prompts))
    pad = [[0] * (length - len(p)) for p in prompts]
    left = padding_side == "left"
    input_ids = torch.tensor([z + p if left else p + z for z, p in zip(pad, prompts, strict=True)])
    mask = torch.tensor([z + [1] * len(p) if left else [1] * len(p) + z for z, p in zip(pad, prompts, strict=True)])
    inputs: dict[str, Tensor] = {"input_ids": input_ids, "attention_mask": mask, **_tensors(spec, [own for _, own in made])}
    return {**inputs, **spec.batch_tensors(inputs)} if spec.batch_tensors else inputs


def tiny_items(
    family: str,
    batch_size: int = 2,
    items: Sequence[Sequence[int]] | None = None,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """For each row of `tiny_inputs` how many placeholder rows each of its items has."""
    spec = _family(family)
    made = (_row(spec, r, 0, own)[1] for r, own in _rows(spec, batch_size, items, rows))
    return [[sum(i in spec.placeholders for i in item.ids) for item in own] for own in made]


def _rows(spec: Family, batch_size: int, items: Any, rows: Any) -> list[tuple[int, list[int]]]:
    """(number, sizes of its items) of the rows that are wanted."""
    if items is None:
        items = [[0, 1], *([(r + 1) % len(spec.sizes)] for r in range(1, batch_size))][:batch_size]
        items = [own[: spec.most] for own in items]
        if batch_size >= 4 and spec.text_row:
            items[-1] = []
    if len(items) != batch_size:
        raise ValueError(f"items must list {batch_size} rows (batch_size), got {len(items)}")
    return [(r, list(items[r])) for r in (range(batch_size) if rows is None else rows)]


def _row(spec: Family, r: int, seed: int, sizes: list[int]) -> tuple[list[int], list[Item]]:
    """The prompt and the items of row r."""
    generator = torch.Generator().manual_seed(1000 * seed + r)
    ids, made = [BOS, *words(2 + r % 3, generator)], []
    for i, index in enumerate(sizes):
        item = spec.item(spec.sizes[index % len(spec.sizes)], generator)
        # items 0 and 1 touch where the family has no marks around them
        ids += item.ids if i % 2 else [*words(1, generator), *item.ids]
        made.append(item)
    return ids + words(4 + (2 * r) % 5, generator), made


def _tensors(spec: Family, rows: list[list[Item]]) -> dict[str, Tensor]:
    """The items' tensors one after the other, or with `slots` one line of them for every row of the batch."""
    every = [item for row in rows for item in row]
    if not every:
        return {}
    if not spec.slots:
        names = dict.fromkeys(name for item in every for name in item.tensors)
        return {name: torch.cat([i.tensors[name] for i in every if name in i.tensors]) for name in names}
    most = max(map(len, rows))
    out = {}
    for name, like in every[0].tensors.items():
        empty = torch.zeros_like(like)
        out[name] = torch.stack([torch.cat([*(i.tensors[name] for i in row), *[empty] * (most - len(row))]) for row in rows])
    return out


def devices() -> list[torch.device]:
    """The CPU, and the first CUDA device where there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """AssertionError unless shapes agree and no element differs by more than `tolerance` (default: TOLERANCE by dtype)."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = (actual.double() - expected.double()).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"largest difference {error:.3g} exceeds {tolerance:.3g}")


__all__ = [
    "FAMILIES",
    "PLACEHOLDERS",
    "TOLERANCE",
    "assert_close",
    "devices",
    "fill",
    "tiny_inputs",
    "tiny_items",
    "tiny_model",
]
