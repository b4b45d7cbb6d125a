"""Taps on attention: q and k of chosen modules under any fused backend, without eager attention and without a hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

BACKENDS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


class watch:
    """While open, `see(module, q [B, Hq, Tq, d], k [B, Hk, Tk, d], mask, scaling)` is called for attention inside the
    given modules.

    q and k come after projection and rotation. Entries of the attention table keep their names, so the choice of
    backend and mask is unchanged.
    """

    def __init__(self, modules: Iterable[nn.Module], see: Callable[..., None]):
        self.ids = {id(part) for m in modules for part in m.modules()}
        self.see = see

    def __enter__(self) -> watch:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

        self.saved = {name: table._local_mapping.get(name) for name in BACKENDS if name in table}
        for name in self.saved:

            def watched(module, query, key, value, attention_mask=None, *args, _next=table[name], **kwargs):
                if id(module) in self.ids:
                    self.see(module, query, key, attention_mask, kwargs.get("scaling"))
                return _next(module, query, key, value, attention_mask, *args, **kwargs)

            table[name] = watched
        return self

    def __exit__(self, *_: Any) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

        for name, previous in self.saved.items():
            if previous is None:
                del table._local_mapping[name]
            else:
                table[name] = previous


def row_attention(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float | None, row: Tensor) -> Tensor:
    """Attention probabilities [B, Hq, Tk] of one query row per sample (row [B]) in float32; causal where no mask says
    otherwise."""
    B, Hq, Tq, d = q.shape
    Hk, Tk = k.shape[1:3]
    b = torch.arange(B, device=q.device)
    s = torch.einsum("bhgd,bhtd->bhgt", q[b, :, row].view(B, Hk, Hq // Hk, d).float(), k.float()).reshape(B, Hq, Tk)
    s = s * (d**-0.5 if scaling is None else scaling)  # Whisper passes 1.0 and scales q itself
    if mask is not None and mask.ndim == 4:
        m = mask.expand(B, *mask.shape[1:])[b, :, row, :Tk]
        s = s.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else s + m
    elif mask is not None:
        s = s.masked_fill(~mask[:, None, :Tk].bool(), -torch.inf)
    elif Tq > 1:
        s = s.masked_fill(torch.arange(Tk, device=q.device) > (row + Tk - Tq)[:, None, None], -torch.inf)
    return s.softmax(-1)


def cls_logits(q: Tensor, k: Tensor, drop: int) -> Tensor:
    """Head mean of the CLS row's scaled logits before softmax, float32 [B * (T - drop)] (GlobalCom²): q_cls · k_i / (H
    √d_h)."""
    H, d = q.shape[1], q.shape[-1]
    return (torch.einsum("bhd,bhtd->bt", q[:, :, 0].float(), k[:, :, drop:].float()) / (H * d**0.5)).flatten()


def flat_keys(k: Tensor, drop: int = 0) -> Tensor:
    """Keys with heads concatenated [B * (T - drop), H * d_h]."""
    return k[:, :, drop:].transpose(1, 2).flatten(2).flatten(0, 1)


def last_block(tower: nn.Module) -> nn.Module:
    """The last block of an encoder: the end of its longest stack of equal modules."""
    stacks = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len({type(e) for e in m}) == 1]
    if not stacks:
        raise ValueError(f"{type(tower).__name__} has no stack of encoder blocks to read signals from")
    return max(stacks, key=len)[-1]
