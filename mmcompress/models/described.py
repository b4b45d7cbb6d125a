"""A model that its author describes: remote code, research models, whatever `family` cannot tell from the structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmcompress.models.generic import KINDS, Family
from mmcompress.models.wrap import base_model


@dataclass(frozen=True)
class Description:
    """Where the parts of a model are; made by `describe`."""

    core: str
    text: str
    placeholders: Mapping[str, int]
    inputs: Mapping[str, str] = field(default_factory=dict)


def describe(core: str, text: str, placeholders: Mapping[str, int], inputs: Mapping[str, str] | None = None) -> Description:
    """Describe a model for `compress_(model, compressor, seam=…)`.

    core: the path (of `model.named_modules()`, "" for the model itself) of the module that puts features where the
    placeholder ids stand, and is called with `input_ids` and `attention_mask`. text: the path of the module with decoder
    layers (`layers`) that it calls with `inputs_embeds`. placeholders: kind ("image", "video", "audio") -> the id that stands
    for one row. inputs: kind -> the argument of the core that brings such items, where its name does not tell.
    Raises ValueError for kinds that are none, TypeError for what is no id.
    """
    inputs = dict(inputs or {})
    for name, kinds in (("placeholders", placeholders), ("inputs", inputs)):
        if odd := sorted(set(kinds) - set(KINDS)):
            raise ValueError(f"{name} must be of the kinds {', '.join(KINDS)}, got {', '.join(map(repr, odd))}")
    if not placeholders or any(isinstance(i, bool) or not isinstance(i, int) for i in placeholders.values()):
        raise TypeError(f"placeholders must hold at least one kind with its id, got {dict(placeholders)!r}")
    return Description(core, text, dict(placeholders), inputs)


class Described(Family):
    """The parts of a described model."""

    name = "described"

    def __init__(self, model: Any, description: Description):
        base = base_model(model)
        self.description = description
        self.core, self.text = (self.part(base, name, getattr(description, name)) for name in ("core", "text"))
        self.config = getattr(self.core, "config", None) or base.config
        if not isinstance(getattr(self.text, "layers", None), nn.ModuleList):
            raise ValueError(f"text must be a module with decoder layers in `layers`, got {type(self.text).__name__}")
        self.stack, self.layers = self.text, self.text.layers
        self.modalities = tuple(k for k in KINDS if k in description.placeholders)

    @staticmethod
    def part(base: nn.Module, name: str, path: str) -> Any:
        try:
            return base.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"{name} must be the path of a module of {type(base).__name__}, got {path!r}") from error

    def placeholder(self, kind: str) -> int:
        return self.description.placeholders.get(kind, -1)

    def belongs(self, name: str, kind: str) -> bool:
        return self.description.inputs.get(kind) == name or super().belongs(name, kind)

    def holds_items(self, name: str) -> bool:
        return name in self.description.inputs.values() or super().holds_items(name)

    def signals(self) -> tuple[str, ...]:
        return ()
