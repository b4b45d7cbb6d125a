"""The generic adapter: what every family shares. A family that differs overrides a few methods in a file of its own."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmcompress.models import signals
from mmcompress.models.call import Call
from mmcompress.models.signals import Signal
from mmcompress.models.signals.taps import last_block, tappable
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
    @functools.lru_cache(maxsize=512)
    def lattice(cls, kind: str, grid: tuple[int, int, int], start: int | None = None) -> ItemSpec:
        """An item whose rows are exactly the raster of (t, h, w), at `start` in the encoder's output."""
        t, h, w = grid
        n = torch.arange(t * h * w, device="cpu")  # whatever the default device is
        position = torch.stack([n // (h * w), n // w % h, n % w], -1)
        group = position[:, 0] if kind == "video" else torch.zeros_like(n)
        return cls(kind, len(n), Layout(kind, grid), position, group, n, None if start is None else n + start)


class Family:
    """One model family: where its parts are, which rows are items, which signals its encoder offers.

    The base class serves every model whose core owns `get_*_features` and a text child, and whose items are runs of a
    placeholder id.
    """

    name: str = "generic"
    modalities: tuple[str, ...] = ()
    """Kinds of items that the model takes; found by its structure where a class names none."""
    offers: tuple[str, ...] = ()
    """Signals that the encoder may offer; all of its source where a class names none."""
    notes: ClassVar[str] = ""
    per_sample: ClassVar[bool] = False
    """Whether pixels come as [samples, items, ...]."""

    def __init__(self, model: Any):
        base = base_model(model)
        children = (getattr(base, "model", None), getattr(base, "thinker", None), base)
        core: Any = next((c for c in children if isinstance(c, nn.Module) and is_core(c)), None)
        if core is None:
            raise ValueError(
                f"model must have a core that makes features (get_{{{','.join(KINDS)}}}_features) and hands them to a text "
                "model "
                f"(language_model, text_model or model), got {type(base).__name__} without one"
            )
        self.core: Any = core
        self.config: Any = core.config
        self.text: Any = stack_of(text_child(core))
        if self.text is None:
            raise ValueError(
                f"model must have a text model with a list of decoder layers, got {type(base).__name__} without one"
            )
        self.stack: Any = self.text
        self.layers: Any = self.stack.layers
        self.describe(str(getattr(base.config, "model_type", "generic")))

    def describe(self, model_type: str) -> None:
        """Fill in what the class does not say: the name, the kinds of items, the signals."""
        if type(self).name == "generic":
            self.name = model_type
        takes = inspect.signature(type(self.core).forward).parameters
        if not self.modalities:
            self.modalities = tuple(
                k
                for k in KINDS
                if self.placeholder(k) >= 0
                and (hasattr(self.core, f"get_{k}_features") or any(self.belongs(n, k) and self.holds_items(n) for n in takes))
            )
        if not self.modalities:
            raise ValueError(
                f"model must name an id that stands for its items ({', '.join(f'{k}_token_id' for k in KINDS)}), got a "
                f"{type(self.core).__name__} whose configuration names none"
            )
        if not type(self).offers:
            self.offers = signals.of_source("encoder")

    @property
    def seam(self) -> Any:
        """The class of the seam that fits these models."""
        from mmcompress.models.seam import Seam

        return Seam

    # parts

    @property
    def first_cut(self) -> int:
        """The first decoder layer before which rows may leave."""
        return max(1, len(getattr(getattr(self.config, "vision_config", None), "deepstack_visual_indexes", None) or ()))

    @property
    def axes(self) -> int:
        """Rows of position ids: 3 with m-RoPE, else 1."""
        rope = getattr(self.stack.config, "rope_parameters", None) or getattr(self.stack.config, "rope_scaling", None) or {}
        return 3 if "mrope_section" in rope else 1

    def placeholder(self, kind: str) -> int:
        """The id that stands for one row of this kind, or -1."""
        for config in (self.config, getattr(self.config, "vision_config", None), getattr(self.config, "audio_config", None)):
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                value = getattr(config, name, None)
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
        """Names of the signals that the encoder and the items' layout offer."""
        tower = self.tower(self.core, self.modalities[0])
        has_cls = tower is not None and any(n.endswith(("class_embedding", "cls_token")) for n, _ in tower.named_parameters())
        known, own = signals.known(), bool(type(self).offers)
        tapped = own or (tower is not None and has_blocks(tower))
        return tuple(s for s in self.offers if (has_cls or not known[s].needs_cls) and (tapped or not known[s].attention))

    def dropped_columns(self, call: Call, kind: str) -> int:
        """Columns that the feature selection cuts from the front of a view: 1 for the CLS token under "default"."""
        strategy = call.argument(kind, "vision_feature_select_strategy") or getattr(
            self.config, "vision_feature_select_strategy", "full"
        )
        return int(strategy == "default")

    def signal(self, call: Call, kind: str, one: Signal) -> Tensor | None:
        """A signal over the flattened encoder output [M, …] that `ItemSpec.source` points into; None where nothing was seen."""
        seen = call.of(kind)
        if one.name not in seen.values:
            if (one.attention and not seen.attention) or (one.projector and not seen.tower):
                return None
            values: Tensor = one.make(seen, self.dropped_columns(call, kind))  # type: ignore[misc]
            seen.values[one.name] = self.tokens_of(call, kind, one, values.detach())
        return seen.values[one.name]

    def tokens_of(self, call: Call, kind: str, one: Signal, values: Tensor) -> Tensor | None:
        """Values over the encoder's rows [M, …] as values over the rows that the language model gets, where they differ; None
        where it cannot be told which is which."""
        lengths = call.of(kind).lengths
        return values if type(self).offers or (lengths is not None and sum(lengths) == len(values)) else None

    # items

    def belongs(self, name: str, kind: str) -> bool:
        """Whether an argument holds pixels or sound of this kind, or describes them."""
        return belongs(name, kind)

    def holds_items(self, name: str) -> bool:
        """Whether an argument holds pixels or sound itself."""
        return holds_items(name)

    def kinds(self, call: Call) -> list[str]:
        """The kinds for which this call brings features, or could."""
        given = [n for n, v in call.arguments.items() if isinstance(v, Tensor) or (isinstance(v, list) and v)]
        return [k for k in KINDS if self.placeholder(k) >= 0 and (k in call.encoded or any(self.belongs(n, k) for n in given))]

    def brought(self, inputs: Iterable[str]) -> list[str]:
        """The kinds of items that these arguments hold."""
        names = [n for n in inputs if self.holds_items(n)]
        return [k for k in KINDS if k in self.modalities and any(self.belongs(n, k) for n in names)]

    def specs(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec] | None:
        """The items of one kind in the order of their features, or None: each run of placeholder ids is one item of
        unknown structure."""
        if (specs := self.lattices(call, kind, num_rows)) is not None:
            return specs
        lengths = call.encoded[kind].lengths if kind in call.encoded else None
        if lengths is None or sum(lengths) != num_rows:
            return None
        return self.squares(kind, lengths)

    def lattices(self, call: Call, kind: str, num_rows: int) -> list[ItemSpec] | None:
        """Items of a packed encoder, from its (t, h, w) patch grids: the rows are the grids with m × m patches merged, and
        r frames where the model pools over time."""
        grids = call.argument(kind, f"{kind}_grid_thw")
        grids = grids.tolist() if isinstance(grids, Tensor) else grids
        if not grids or not num_rows or any(len(g) != 3 for g in grids):
            return None
        patches = sum(t * h * w for t, h, w in grids)
        if patches % num_rows:
            return None
        ratio = patches // num_rows
        for m in (m for m in range(math.isqrt(ratio), 0, -1) if ratio % m**2 == 0):
            r = ratio // m**2
            if all(h % m == 0 and w % m == 0 and t % r == 0 for t, h, w in grids):
                out, start = [], 0
                for t, h, w in grids:
                    out.append(ItemSpec.lattice(kind, (t // r, h // m, w // m), start))
                    start += out[-1].num_rows
                return out
        return None

    def squares(self, kind: str, lengths: Iterable[int]) -> list[ItemSpec]:
        """Items of n rows each: a square grid where n is a square number, else a line."""
        out, start = [], 0
        for n in lengths:
            s = math.isqrt(n)
            out.append(ItemSpec.lattice(kind, (1, s, s) if s * s == n and kind == "image" else (n, 1, 1), start))
            start += n
        return out


class PerSample(Family):
    """Pixels come as [samples, items, …], so that nothing is to be put in order for several answers to a prompt."""

    per_sample = True


def has_blocks(tower: nn.Module) -> bool:
    """Whether the encoder has a last block whose attention can be tapped."""
    try:
        return bool(tappable(last_block(tower)))
    except ValueError:
        return False


def feature_lengths(output: Any) -> list[int] | None:
    """Rows per item of what `get_*_features` returned; None where the output does not say."""
    features = getattr(output, "pooler_output", output)
    features = getattr(output, "last_hidden_state", None) if features is None else features
    if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) and f.dim() == 2 for f in features):
        return [len(f) for f in features]
    if isinstance(features, Tensor) and features.dim() == 3:
        return [features.shape[1]] * len(features)
    return None


def feature_rows(output: Any) -> list[Tensor]:
    """What `get_*_features` returned as a list of [rows, D]; [] where its form is another."""
    features = getattr(output, "pooler_output", output)
    if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) and f.dim() == 2 for f in features):
        return list(features)
    return list(features) if isinstance(features, Tensor) and features.dim() == 3 else []


def makes_features(module: nn.Module) -> bool:
    """Whether a module makes features of pixels or sound."""
    return any(hasattr(module, f"get_{k}_features") for k in KINDS) or hasattr(module, "audio_tower")


def text_child(core: nn.Module) -> Any:
    """The child that reads the merged embeddings, or None."""
    children = (getattr(core, n, None) for n in ("language_model", "text_model", "model"))
    return next((c for c in children if isinstance(c, nn.Module) and not makes_features(c)), None)


def is_core(module: nn.Module) -> bool:
    """Whether a module makes features and has a text child."""
    return makes_features(module) and text_child(module) is not None


def stack_of(text: Any) -> Any:
    """The module that holds the decoder layers: the text model itself, or inside a causal language model; None without one."""
    while text is not None and not isinstance(getattr(text, "layers", None), nn.ModuleList):
        text = next((c for n in ("model", "decoder") if isinstance(c := getattr(text, n, None), nn.Module)), None)
    return text


PARTS = {
    "video": ("video",),
    "audio": ("audio", "input_features", "feature_attention", "input_values"),
    "image": ("pixel", "image", "spatial_shapes", "target_sizes", "patches"),
}
"""Parts of the names of arguments that hold pixels or sound, or describe them; the first kind that fits has it."""
DESCRIBES = ("size", "grid", "mask", "shape", "len", "position", "num", "_id", "index", "type")
"""Parts of the names of those that only describe them."""


def belongs(name: str, kind: str) -> bool:
    """Whether an argument holds pixels or sound of this kind, or describes them."""
    return next((k for k, parts in PARTS.items() if any(p in name for p in parts)), None) == kind


def holds_items(name: str) -> bool:
    """Whether an argument holds pixels or sound itself."""
    return any(belongs(name, k) for k in KINDS) and not any(p in name for p in DESCRIBES)
