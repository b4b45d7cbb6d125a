"""What a method may read beside its tokens. Each signal is declared once, in a file of this folder, and found by its name.

A signal is made only where a stage declares it, from what the taps saw in this very call, in float32, and dropped after the
last stage of the call. A family says how rows of its encoder map to tokens (`Family.tokens_of`).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_known: dict[str, Signal] = {}


@dataclass(frozen=True)
class Signal:
    """One signal. name: as methods declare it. source: where it is made, one of

    - "layout": nothing to make, the item's layout holds it;
    - "text": `make(call, x, words)`, words: for each sample of the batch the columns [T] of its own text -> one tensor a
    sample;
    - "rotary": made by `Rotary.offer`;
    - "encoder": `make(seen, drop)` of an `Encoded` -> [M, ...] over the encoder's rows, `drop` of each view cut off its front;
    - "layer": `make(look)` of a `Look` at the attention of the layer before -> one tensor an item.

    attention: reads q and k of the encoder's last block. projector: reads the projector's inputs. per_token: one value a token,
    which follows the tokens that stay. needs_text: is about the prompt's text, which packed rows do not tell apart.
    """

    name: str
    source: str
    make: Callable[..., Any] | None = None
    attention: bool = False
    projector: bool = False
    per_token: bool = True
    needs_text: bool = False
    needs_cls: bool = False


def signal(name: str, source: str, **facts: Any) -> Callable[[Callable], Callable]:
    """Declare a signal whose values the decorated function makes."""

    def enter(make: Callable) -> Callable:
        declare(Signal(name, source, make, **facts))
        return make

    return enter


def declare(one: Signal) -> None:
    """Enter a signal. Raises ValueError where its name is taken by another file."""
    other = _known.get(one.name)
    if other is not None and (other.source, getattr(other.make, "__module__", "")) != (
        one.source,
        getattr(one.make, "__module__", ""),
    ):
        raise ValueError(f"signal {one.name!r} is declared already, as one of source {other.source!r}")
    _known[one.name] = one


@functools.cache
def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def known() -> dict[str, Signal]:
    """All signals by name."""
    _load()
    return _known


def of_source(*sources: str) -> tuple[str, ...]:
    """Names of the signals that are made there."""
    return tuple(s.name for s in known().values() if s.source in sources)


def cls_logits(q: Any, k: Any, drop: int) -> Any:
    """See `mmcompress.models.signals.encoder.cls_logits`."""
    from mmcompress.models.signals.encoder import cls_logits as compute

    return compute(q, k, drop)
