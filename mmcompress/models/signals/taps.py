"""Taps on attention: q and k of chosen modules under any backend, without eager attention, a hook or a process-wide entry.

A tapped module runs its own forward, whose name `ALL_ATTENTION_FUNCTIONS` leads to a table that hands the arguments on to
whoever listens in this thread. Without a listener the stock forward runs.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.models.call import listeners

TABLE = "ALL_ATTENTION_FUNCTIONS"


@dataclass
class Attention:
    """Arguments of one attention: q [B, Hq, Tq, d], k [B, Hk, Tk, d] after projection and rotation, its mask, scaling, window
    (rows that a row sees, itself among them), soft cap and sinks [Hq]."""

    q: Tensor
    k: Tensor
    mask: Any = None
    scaling: float | None = None
    window: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scaling is None else self.scaling  # Whisper passes 1.0 and scales q itself

    def visible(self, b: int, rows: Tensor, first: int, real: Tensor | None = None) -> Tensor:
        """Which keys the query rows [R] of sample b see [R, Tk], where query row 0 is key `first`. real [first + Tq] is asked
        only where the backend's mask does not hold it."""
        Tk, mask = self.k.shape[2], self.mask
        if isinstance(mask, Tensor) and mask.dim() == 4:
            m = mask[b if len(mask) > 1 else 0, 0, rows, :Tk]
            return m if m.dtype == torch.bool else m > torch.finfo(m.dtype).min / 2
        column = torch.arange(Tk, device=self.k.device)
        if hasattr(mask, "mask_mod"):  # a BlockMask of Flex attention
            at = torch.tensor(b if mask.shape[0] > 1 else 0, device=column.device)
            return mask.mask_mod(at, torch.zeros_like(at), rows[:, None], column[None])
        seen = column <= first + rows[:, None]
        if self.window:
            seen = seen & (column > first + rows[:, None] - self.window)
        if isinstance(mask, Tensor) and mask.dim() == 2:  # Flash: the last columns are the keys
            seen = seen & mask[b, -Tk:].bool()
        elif real is not None:
            seen = seen & nn.functional.pad(real.bool(), (0, Tk - len(real)))
        return seen

    def weights(self, b: int, rows: Tensor, first: int, real: Tensor | None = None) -> Tensor:
        """Attention probabilities [Hq, R, Tk] in float32 of query rows [R] of sample b."""
        (Hq, d), (Hk, Tk) = (self.q.shape[1], self.q.shape[-1]), self.k.shape[1:3]
        query = self.q[b, :, rows].float().reshape(Hk, Hq // Hk * len(rows), d)
        score = (query @ self.k[b].float().transpose(1, 2) * self.scale).view(Hq, len(rows), Tk)
        if self.cap:
            score = torch.tanh(score / self.cap) * self.cap
        score = score.masked_fill(~self.visible(b, rows, first, real), -torch.inf)
        if self.sinks is None:
            return score.softmax(-1)
        sink = self.sinks.float().view(Hq, 1, 1).expand(Hq, len(rows), 1)
        return torch.cat([score, sink], -1).softmax(-1)[..., :-1]


class Listening:
    """The attention table as a tapped module sees it."""

    def __init__(self, table: Any):
        self.table = table

    def get_interface(self, name: Any, default: Any = None) -> Callable:
        return heard(self.table.get_interface(name, default))

    def get(self, name: Any, default: Any = None) -> Any:
        return heard(self.table.get(name, default))

    def __getitem__(self, name: Any) -> Any:
        return heard(self.table[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)


def heard(attention: Callable) -> Callable:
    @functools.wraps(attention)
    def run(module, query, key, value, attention_mask=None, *args, **kwargs):
        tell(
            module,
            Attention(
                query, key, attention_mask, kwargs.get("scaling"), kwargs.get("sliding_window"), kwargs.get("softcap"),
                kwargs.get("s_aux"),
            ),
        )  # fmt: skip
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    return run


def tell(module: nn.Module, seen: Attention) -> None:
    """Hand this to whoever listens."""
    for hear in listeners():
        hear(module, seen)


def is_tappable(module: nn.Module) -> bool:
    """Whether this module takes its attention from transformers' table."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and TABLE in code.co_names


def tappable(block: nn.Module) -> list[nn.Module]:
    """The attention modules inside this one that can be tapped."""
    return [m for m in block.modules() if is_tappable(m)]


def _listening_forward(forward: Callable) -> types.FunctionType:
    stock: Any = inspect.unwrap(forward)
    names = {**stock.__globals__, TABLE: Listening(stock.__globals__[TABLE])}
    twin = types.FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    twin.__kwdefaults__ = stock.__kwdefaults__
    return twin


def run_tapped(wrapped: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The handler of a tapped module's forward (`place_of` says under which name it is wrapped)."""
    if not listeners():
        return wrapped.original(*args, **kwargs)
    listening = _listening_forward(type(wrapped.module).forward)
    if wrapped.inherited is None or isinstance(wrapped.inherited, type(wrapped)):
        return listening(wrapped.module, *args, **kwargs)
    with torch.no_grad():  # another library stands here: what it answers counts, q and k are those of the stock forward
        listening(wrapped.module, *args, **kwargs)
    return wrapped.original(*args, **kwargs)


def place_of(module: nn.Module) -> str:
    """The attribute to wrap: where accelerate put its hook, it keeps what it calls in `_old_forward`."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def last_block(tower: nn.Module) -> nn.Module:
    """The last block of an encoder: the end of its longest stack of equal modules."""
    stacks = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len({type(e) for e in m}) == 1]
    if not stacks:
        raise ValueError(f"{type(tower).__name__} has no stack of encoder blocks to read signals from")
    return max(stacks, key=len)[-1]
