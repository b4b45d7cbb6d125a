"""Losses beside the language model's own, for methods with parameters or under a projector that learns."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mmcompress import ops


def commitment_loss(x: Tensor, assignment: Tensor) -> Tensor:
    """Mean of ‖u − stop(c)‖² over tokens: u their unit vectors, c the mean of those in the token's code. A scalar.

    x [B, N, D] and assignment [B, N] of a Reduction; dropped tokens (−1) do not count, and with none left the loss is 0. The
    gradient draws tokens to their codes, and reaches them through u alone. An addition of ours to VQToken (arXiv 2503.16980),
    which trains on the language model's loss alone; of use only where x itself is trained.
    """
    if x.dim() != 3 or assignment.shape != x.shape[:2]:
        want = "x must have shape [B, N, D] and assignment [B, N]"
        raise ValueError(f"{want}, got {list(x.shape)} and {list(assignment.shape)}")
    kept = assignment >= 0
    if not bool(kept.any()):
        return x.sum() * 0
    u = F.normalize(x if x.dtype.itemsize > 2 else x.float(), dim=-1, eps=1e-12)
    codes, _ = ops.merge(u.detach(), assignment, int(assignment.max()) + 1)
    c = codes.gather(1, assignment.clamp(min=0)[..., None].expand_as(u))
    return ((u - c).square().sum(-1) * kept).sum() / kept.sum()
