"""Signals of the vision or audio encoder: from attention of its last block, and what it hands to the projector."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.models.call import Encoded
from mmcompress.models.signals import signal


def cls_logits(q: Tensor, k: Tensor, drop: int) -> Tensor:
    """Head mean of the CLS row's scaled logits before softmax, float32 [B * (T - drop)] (GlobalCom²): q_cls · k_i / (H
    √d_h)."""
    H, d = q.shape[1], q.shape[-1]
    return (torch.einsum("bhd,bhtd->bt", q[:, :, 0].float(), k[:, :, drop:].float()) / (H * d**0.5)).flatten()


def flat_keys(k: Tensor, drop: int = 0) -> Tensor:
    """Keys with heads concatenated [B * (T - drop), H * d_h]."""
    return k[:, :, drop:].transpose(1, 2).flatten(2).flatten(0, 1)


@signal("cls_logits", "encoder", attention=True, needs_cls=True)
def of_cls(seen: Encoded, drop: int) -> Tensor:
    return torch.cat([cls_logits(a.q, a.k, drop) for a in seen.attention])


@signal("keys", "encoder", attention=True)
def keys(seen: Encoded, drop: int) -> Tensor:
    return torch.cat([flat_keys(a.k, drop) for a in seen.attention])


@signal("tower", "encoder", projector=True)
def tower(seen: Encoded, drop: int) -> Tensor:
    """What the projector reads: one row a token."""
    return torch.cat([t.flatten(0, -2) for t in seen.tower])
