"""Where a compressor may stand. A door is one file of this folder: it places stages, offers signals, wraps what it must, and
acts in the calls of the text model in the order of `order`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmcompress.compressor import Compressor
from mmcompress.ledger import SampleCount
from mmcompress.models.cache import PromptState
from mmcompress.models.call import Call
from mmcompress.models.items import Item, Placed
from mmcompress.models.masks import Pattern

STEP = "mmcompress_step"
"""The argument that carries the state of a call to its decoder layers; an argument, so that a checkpoint's recomputation finds
it."""


@dataclass
class Frame:
    """One call of the text model in which rows leave: its arguments, the rows x [B, S, D] that come in, their items, and what
    is left of them.

    past, seen: rows that layer 0 holds, tokens that it stands for. keep [B, S]: columns that stay. index [B, P], real [B, P]:
    the rows that go on and which of them are no padding. source [B, S]: the row that each column's output is. keys
    [B, past + P]: real rows among all that layer 0 holds. left: padding stands on the left. states: what the cache goes
    through. contexts: open while the text model runs.
    """

    call: Call
    kw: dict[str, Any]
    x: Tensor
    items: list[Item]
    samples: dict[int, SampleCount]
    cache: Any
    past: int
    seen: int
    position: Tensor
    pattern: Pattern
    left: bool
    keep: Tensor
    held: Tensor
    turn: Any = None
    index: Tensor = field(default_factory=lambda: torch.empty(0))
    real: Tensor = field(default_factory=lambda: torch.empty(0))
    source: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    states: list[PromptState] = field(default_factory=list)
    step: Any = None
    contexts: ExitStack = field(default_factory=ExitStack)


class Door:
    """The stages that stand at one kind of place in one model."""

    name: ClassVar[str] = ""
    order: ClassVar[int] = 0
    sources: ClassVar[tuple[str, ...]] = ()
    """Sources of the signals that this door adds to those of the encoder, the prompt and the rotary embedding."""

    def __init__(self, seam: Any):
        self.seam = seam
        self.stages: dict[int, list[Placed]] = {}

    def at(self, stage: Compressor) -> int:
        """The number of the place that a stage asks for. Raises ValueError where the model has none."""
        return 0

    def put(self, at: int, placed: Placed) -> None:
        self.stages.setdefault(at, []).append(placed)

    def wanted(self, at: int) -> set[str]:
        """Names of the signals that the stages at this place read."""
        return {name for placed in self.stages.get(at, ()) for names, _ in placed.reads for name in names}

    def everything_wanted(self) -> set[str]:
        return set().union(*(self.wanted(at) for at in self.stages)) if self.stages else set()

    def wrap(self) -> None:
        """Put the door's own wrappers on the model."""

    def before(self, frame: Frame) -> None:
        """Act on the rows before they are packed: may change `frame.x` and `frame.keep`."""

    def enter(self, frame: Frame) -> None:
        """Add what the text model's call needs to `frame.kw`."""

    def later(self, kw: dict[str, Any], cache: Any, mask: Tensor) -> None:
        """Add what a call needs in which nothing is decided, on a cache that was reduced; mask [B, past + S]."""

    def leave(self, frame: Frame, out: Any) -> Any:
        """What came out, with as many rows as went in at `enter`."""
        return out


@functools.cache
def doors() -> dict[str, type[Door]]:
    """All doors by name, in the order in which rows pass them."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Door) and value.name:
                found[value.name] = value
    return dict(sorted(found.items(), key=lambda pair: pair[1].order))
