"""What tells right from wrong without asking the library: the rows that the decoder layers really get, and the stock model with
rows hidden from these layers, or taken out of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.compressor import Selector
from mmcompress.tokens import Tokens


class Direction(Selector):
    """Keeps the K tokens that lie furthest along a fixed random direction."""

    def select(self, tokens: Tokens, K: int) -> Tensor:
        v = torch.randn(tokens.x.shape[-1], generator=torch.Generator().manual_seed(7)).to(tokens.x)
        return (tokens.x @ v).argsort(dim=1, descending=True, stable=True)[:, :K]


class Fails(Direction):
    """Raises in the middle of a forward."""

    def select(self, tokens: Tokens, K: int) -> Tensor:
        raise ZeroDivisionError


@contextlib.contextmanager
def wrapped(modules: Any, make: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """Each module's forward is make(i, forward) for a while."""
    before = [(m, m.__dict__.get("forward")) for m in modules]
    try:
        for i, m in enumerate(modules):
            m.forward = functools.wraps(m.forward)(make(i, m.forward))
        yield
    finally:
        for m, own in before:
            if own is None:
                m.__dict__.pop("forward", None)
            else:
                m.forward = own


def hidden_of(args: tuple, kw: dict[str, Any]) -> Tensor:
    """The hidden states among a layer's arguments."""
    return args[0] if args else kw["hidden_states"]


def as_rows(hidden: Tensor) -> Tensor:
    """Hidden states of one sample as [rows, width]: from [1, rows, D], [1, rows, streams, D] or [streams, 1, rows, D]."""
    if hidden.dim() == 4 and len(hidden) > 1:
        return hidden[:, 0].movedim(0, 1).flatten(1)
    return hidden[0].flatten(1)


@torch.no_grad()
def decoder_layers(model: nn.Module, run: Callable[[], Any]) -> list[nn.Module]:
    """The decoder's layers, seen at work: run() sends a prompt without items through the model, and of all lists of modules the
    one whose first is called first holds them. Raises ValueError where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1 and len({type(x) for x in m}) <= 2]
    called: list[int] = []

    def note(i: int, forward: Callable) -> Callable:
        def run(*args: Any, **kw: Any) -> Any:
            hidden = args[0] if args else kw.get("hidden_states")
            if isinstance(hidden, Tensor) and hidden.dim() > 2 and hidden.is_floating_point():
                called.append(i)
            return forward(*args, **kw)

        return run

    with wrapped([m[0] for m in lists], note):
        run()
    if not called:
        raise ValueError(f"{type(model).__name__} must have a list of decoder layers that a prompt passes through, found none")
    return list(lists[called[0]])


class Rows:
    """The hidden states that each layer got in the last forward with more than one row: `of[layer]` [rows, width]."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        self.of: dict[int, Tensor] = {}

    def watch(self) -> contextlib.AbstractContextManager:
        def make(i: int, forward: Callable) -> Callable:
            def run(*args: Any, **kw: Any) -> Any:
                hidden = as_rows(hidden_of(args, kw))
                if len(hidden) > 1:
                    self.of[i] = hidden.detach().clone()
                return forward(*args, **kw)

            return run

        return wrapped(self.layers, make)


def match(kept: Tensor, full: Tensor, tolerance: float = 1e-4) -> list[int] | None:
    """For each of the rows `kept` the column of `full` that it is, in ascending order; None where one is no row of `full`."""
    scale = full.abs().max().clamp(min=1e-12)
    equal = (torch.cdist(kept.double(), full.double(), p=torch.inf) <= tolerance * scale).tolist()
    columns, at = [], -1
    for line in equal:
        at = next((c for c in range(at + 1, len(line)) if line[c]), -2)
        if at == -2:
            return None
        columns.append(at)
    return columns


class Without:
    """The stock model's decoder without some rows [dropped columns] from layer `cut` on.

    hide: their columns are masked for every row that stays, at every step; the rest of the model is untouched.
    remove: the layers run on the rows that stay, one layer after the other; works for one forward over the whole prompt, and is
    the only way where a layer mixes rows by their distance.
    """

    def __init__(self, layers: list[nn.Module], length: int, dropped: list[int], cut: int):
        self.layers, self.length, self.dropped, self.cut = layers, length, dropped, cut

    def hide(self) -> contextlib.AbstractContextManager:
        return wrapped(self.layers[self.cut :], lambda i, forward: lambda *args, **kw: self._hidden(forward, args, kw))

    def remove(self) -> contextlib.AbstractContextManager:
        return wrapped(self.layers[self.cut :], lambda i, forward: lambda *args, **kw: self._removed(forward, args, kw))

    def _hidden(self, forward: Callable, args: tuple, kw: dict[str, Any]) -> Any:
        n = _num_rows(hidden_of(args, kw), self.length)
        new_args = tuple(self._mask(a, n) if i and isinstance(a, Tensor) and a.dim() == 4 else a for i, a in enumerate(args))
        return forward(*new_args, **{k: self._mask(v, n) if "mask" in k else v for k, v in kw.items()})

    def _mask(self, mask: Any, n: int) -> Any:
        """[batch, 1, n, keys] or [batch, keys]: without the columns, for all rows but those that are dropped themselves."""
        if not isinstance(mask, Tensor) or mask.shape[-1] < self.length or (mask.dim() == 4 and mask.shape[2] != n):
            return mask
        new, none = mask.clone(), 0.0
        if mask.dim() == 2:
            new[:, self.dropped] = none
        elif mask.dim() == 4:
            stay = [r for r in range(n) if n == 1 or r not in set(self.dropped)]
            if mask.is_floating_point():
                none = torch.finfo(mask.dtype).min
            new[:, :, torch.tensor(stay)[:, None], torch.tensor(self.dropped)] = none
        return new

    def _removed(self, forward: Callable, args: tuple, kw: dict[str, Any]) -> Any:
        hidden = hidden_of(args, kw)
        n = _num_rows(hidden, self.length)
        gone = set(self.dropped)
        stay = torch.tensor([c for c in range(n) if c not in gone], device=hidden.device)
        out = forward(*(_take(a, n, stay) for a in args), **{k: _take(v, n, stay) for k, v in kw.items()})
        dim = hidden.shape.index(n)

        def back(x: Any) -> Any:
            return hidden.index_copy(dim, stay, x) if isinstance(x, Tensor) and x.dim() == hidden.dim() else x

        return (back(out[0]), *out[1:]) if isinstance(out, tuple) else back(out)


def _num_rows(hidden: Tensor, length: int) -> int:
    """Rows of hidden states: `length` or more of a whole prompt, 1 of a decode step."""
    if hidden.dim() == 4:
        return hidden.shape[1] if len(hidden) == 1 else hidden.shape[2]
    return hidden.shape[1]


def _take(value: Any, n: int, stay: Tensor) -> Any:
    """A layer's argument for the rows that stay: every dimension of n entries loses the others."""
    if isinstance(value, tuple):
        return tuple(_take(v, n, stay) for v in value)
    if not isinstance(value, Tensor):
        return value
    for dim, size in enumerate(value.shape):
        if size == n:
            value = value.index_select(dim, stay)
    return value
