"""The state of one call, which lives as long as the call: what a core was given and what its parts made of it.

Threads, nested `generate`, copies and streams see their own only: a `ContextVar` holds the innermost call of a core, another
what `prepare_inputs_for_generation` hands to the forward that follows it. Nothing of a call is kept on the seam or the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NOTE = "_mmcompress"
"""The attribute of an encoder's output that carries what was seen while it was made."""


@dataclass(frozen=True)
class Generation:
    """One run of `generate`: how many columns its prompt has. It travels among the run's own arguments."""

    prompt: int


@dataclass(frozen=True)
class Prepared:
    """What `prepare_inputs_for_generation` of a model made ready for its next forward.

    rows: the tensor of ids or embeddings by which that forward is known again. mask: the 2-D mask over the rows that layer 0
    holds, or None where all are real. extra: candidate tokens behind the prompt.
    """

    owner: Any  # the licence of the seam, which keeps no model alive
    rows: Tensor
    mask: Tensor | None
    extra: int = 0

    def fits(self, owner: Any, rows: Any) -> bool:
        """Whether this is that forward (devices may differ where accelerate moves inputs)."""
        if self.owner is not owner or not isinstance(rows, Tensor) or rows.shape != self.rows.shape:
            return False
        return rows is self.rows or torch.equal(rows.cpu(), self.rows.cpu())


@dataclass
class Encoded:
    """What was seen while the encoder of one kind ran: its arguments, the rows it gave for each item, q and k of tapped
    attention, the projector's inputs, and the signals made of them. ahead: it ran before the call of the core that its output
    went into. by: the licence of the seam that saw it."""

    arguments: dict[str, Any]
    ahead: bool = False
    by: Any = None
    lengths: list[int] | None = None
    attention: list[Any] = field(default_factory=list)
    tower: list[Tensor] = field(default_factory=list)
    values: dict[str, Tensor | None] = field(default_factory=dict)


@dataclass
class Call:
    """One call of the core: its arguments by name, ids [B, S], the 2-D mask over the rows that layer 0 holds (None: all real),
    and what its encoders gave by kind.

    generating: the mask is the one that `generate` prepared. extra: candidate tokens behind the prompt.
    order: for several answers to a prompt, the encoded item that each item of the expanded batch is.
    answered: the text model ran.
    """

    owner: Any
    arguments: dict[str, Any]
    ids: Tensor | None
    mask: Tensor | None
    generating: bool = False
    extra: int = 0
    kind: str | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    order: dict[str, list[int]] = field(default_factory=dict)
    turned: Any = None
    answered: bool = False

    def of(self, kind: str) -> Encoded:
        """What was seen of this kind; made where nothing was."""
        return self.encoded.setdefault(kind, Encoded(self.arguments))

    def argument(self, kind: str, name: str) -> Any:
        """An argument of the core, or of the encoder where it ran ahead of this call."""
        seen = self.encoded.get(kind)
        value = seen.arguments.get(name) if seen is not None and seen.ahead else None
        return self.arguments.get(name) if value is None else value


_current: ContextVar[Call | None] = ContextVar("mmcompress_call", default=None)
_prepared: ContextVar[Prepared | None] = ContextVar("mmcompress_prepared", default=None)
_pending: ContextVar[Any] = ContextVar("mmcompress_pending", default=None)
_listeners: ContextVar[tuple[Callable, ...]] = ContextVar("mmcompress_listeners", default=())


def current(owner: Any) -> Call | None:
    """The call of this seam's core that is running here, or None. A traced region holds none: cores that act are not traced."""
    if torch.compiler.is_compiling():
        return None
    call = _current.get()
    return call if call is not None and call.owner is owner else None


@contextmanager
def running(call: Call) -> Iterator[Call]:
    """Make this the running call."""
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


def prepare(prepared: Prepared | None) -> None:
    """Leave this for the next forward in this thread."""
    _prepared.set(prepared)


def take_prepared(owner: Any, rows: Any) -> Prepared | None:
    """What was left for this forward, once."""
    prepared = _prepared.get()
    _prepared.set(None)
    return prepared if prepared is not None and prepared.fits(owner, rows) else None


def await_features(owner: Any) -> None:
    """Features were made under this seam outside of a call of its core: they must come back with one."""
    _pending.set(owner)


def arrived() -> None:
    """A core was called by ids: whatever was made before belongs to it, or to nobody."""
    _pending.set(None)


def awaits_features(owner: Any) -> bool:
    return not torch.compiler.is_compiling() and _pending.get() is owner


@contextmanager
def listening(hear: Callable[..., None]) -> Iterator[None]:
    """While open, `hear(module, Attention)` is called for every tapped attention of this thread."""
    token = _listeners.set((*_listeners.get(), hear))
    try:
        yield
    finally:
        _listeners.reset(token)


def listeners() -> tuple[Callable, ...]:
    return () if torch.compiler.is_compiling() else _listeners.get()
