"""The generic adapter: what every family shares. A family that differs overrides a few methods in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmcompress.models import signals
from mmcompress.models.wrap import base_model
from mmcompress.tokens import Layout

KINDS = ("image", "video", "audio")


@dataclass
class ItemSpec:
    """How one item lies in its run of placeholder rows.

    num_rows: rows of the run. layout, position [N, 3], group [N]: as in `Tokens`. rows [N]: which rows of the run are
    tokens (the others are separators).
    source [N]: the tokens' places in the flattened output of the encoder call(s) of this kind, or None.
    """

    kind: str
    num_rows: int
    layout: Layout
    position: Tensor
    group: Tensor
    rows: Tensor
    source: Tensor | None = None

    @classmethod
    def lattice(cls, kind: str, grid: tuple[int, int, int], start: int | None = None) -> ItemSpec:
        """An item whose rows are exactly the raster of (t, h, w), at `start` in the encoder's output."""
        t, h, w = grid
        n = torch.arange(t * h * w)
        position = torch.stack([n // (h * w), n // w % h, n % w], -1)
        group = position[:, 0] if kind == "video" else torch.zeros_like(n)
        return cls(kind, len(n), Layout(kind, grid), position, group, n, None if start is None else n + start)


@dataclass
class Call:
    """What is noted of one call of the core: its arguments, ids on the host [B, S], 2-D mask, what the taps saw per kind, and
    the rotary `Turned` of tokens that carry several positions."""

    arguments: dict[str, Any]
    ids: Tensor | None
    mask: Tensor | None
    kind: str | None = None
    attention: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    tower: dict[str, list[Tensor]] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    turned: Any = None


class Family:
    """One model family: where its parts are, which rows are items, which signals its encoder offers.

    The base class serves every model whose core owns `get_*_features` and a text child, and whose items are runs of a
    placeholder id.
    """

    name: ClassVar[str] = "generic"
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    inputs: ClassVar[dict[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
    per_item: ClassVar[dict[str, tuple[str, ...]]] = {
        "image": ("pixel_values", "image_sizes"),
        "video": ("pixel_values_videos",),
        "audio": ("input_features", "feature_attention_mask"),
    }
    """Arguments of each kind with one entry per item, which transformers' own expansion for beams repeats per item instead of
    per sample."""
    offers: ClassVar[tuple[str, ...]] = ()
    notes: ClassVar[str] = ""

    def __init__(self, model: Any):
        base = base_model(model)
        children = (getattr(base, "model", None), getattr(base, "thinker", None))
        self.core: Any = next((c for c in children if isinstance(c, nn.Module)), base)
        self.config: Any = self.core.config
        names = ("language_model", "text_model", "model")
        self.text: Any = next((c for n in names if isinstance(c := getattr(self.core, n, None), nn.Module)), None)
        self.layers: Any = getattr(self.text, "layers", None)

    @property
    def seam(self) -> Any:
        """The class of the seam that fits these models."""
        from mmcompress.models.seam import Seam

        return Seam

    # parts

    @property
    def first_cut(self) -> int:
        """The first decoder layer before which rows may leave."""
        return 1

    def placeholder(self, kind: str) -> int:
        """The id that stands for one row of this kind, or -1."""
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            value = getattr(self.config, name, None)
            if isinstance(value, int):
                return value
        return -1

    def tower(self, core: nn.Module, kind: str) -> nn.Module | None:
        """The encoder of this kind inside `core` (which may be a deep copy)."""
        names = ("audio_tower",) if kind == "audio" else ("vision_tower", "vision_model", "visual")
        return next((t for n in names if isinstance(t := getattr(core, n, None), nn.Module)), None)

    def projector(self, core: nn.Module, kind: str) -> nn.Module | None:
        """The module whose input is the encoder's output."""
        return getattr(core, "multi_modal_projector", None)

    # signals

    def signals(self) -> tuple[str, ...]:
        """Names of the signals that the encoder offers, apart from "text" (always) and "query_attention" (before a
        decoder layer)."""
        tower = self.tower(self.core, self.modalities[0])
        has_cls = tower is not None and any(n.endswith(("class_embedding", "cls_token")) for n, _ in tower.named_parameters())
        return tuple(s for s in self.offers if s != "cls_logits" or has_cls)

    def dropped_columns(self, call: Call) -> int:
        """Columns that the feature selection cuts from the front of a view: 1 for the CLS token under "default"."""
        strategy = call.arguments.get("vision_feature_select_strategy") or getattr(
            self.config, "vision_feature_select_strategy", "full"
        )
        return int(strategy == "default")

    def signal(self, call: Call, kind: str, name: str) -> Tensor:
        """A signal over the flattened encoder output [M, …] that `ItemSpec.source` points into."""
        if name == "tower":
            return torch.cat([t.flatten(0, -2) for t in call.tower[kind]])
        drop = self.dropped_columns(call)
        parts = [
            signals.cls_logits(q, k, drop) if name == "cls_logits" else signals.flat_keys(k, drop)
            for q, k in call.attention[kind]
        ]
        return torch.cat(parts)

    # items

    def kinds(self, call: Call) -> list[str]:
        """The kinds for which this call brings features."""
        return [k for k in KINDS if call.arguments.get(self.inputs[k]) is not None and self.placeholder(k) >= 0]

    def specs(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec] | None:
        """The items of one kind in the order of their features, or None: each run of placeholder ids is one item of
        unknown structure."""
        lengths = feature_lengths(call.features.get(kind))
        if lengths is None or sum(lengths) != num_rows:
            return None
        return self.squares(kind, lengths)

    def squares(self, kind: str, lengths: Iterable[int]) -> list[ItemSpec]:
        """Items of n rows each: a square grid where n is a square number, else a line."""
        out, start = [], 0
        for n in lengths:
            s = math.isqrt(n)
            out.append(ItemSpec.lattice(kind, (1, s, s) if s * s == n and kind == "image" else (n, 1, 1), start))
            start += n
        return out


def feature_lengths(output: Any) -> list[int] | None:
    """Rows per item of what `get_*_features` returned; None where the output does not say."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) and f.dim() == 2 for f in features):
        return [len(f) for f in features]
    if isinstance(features, Tensor) and features.dim() == 3:
        return [features.shape[1]] * len(features)
    return None
