"""Share an integer budget among groups in proportion to targets, never above a group's cap (largest remainder with caps)."""

import torch
from torch import Tensor


def apportion(target: Tensor, cap: Tensor, total: int | Tensor) -> Tensor:
    """Counts [..., G] int64 with sum `total` and count <= cap, as near to proportional to `target` [..., G] as these allow.

    Groups that would exceed their cap get the cap and the others share the rest; zero targets receive tokens only once every
    positive target is capped, in proportion to their caps. Shares are rounded to 6 decimals; what the floors leave goes one
    each to the largest fractions, ties to the lowest index. Expects finite targets >= 0 and 0 <= total <= cap.sum(-1).
    """
    target, cap = target.double(), cap.double().expand_as(target)
    target = torch.where(cap > 0, target, 0)
    target = torch.where(target.sum(-1, keepdim=True) > 0, target, cap)
    total = torch.as_tensor(total, device=target.device).double().expand(target.shape[:-1])[..., None]

    # share = min(λ·target, cap). Σ share is concave in λ and bounded by each line "the m groups that fill first are capped":
    # the λ that spends the total is the largest of the lines' solutions.
    order = torch.where(target > 0, cap / target, torch.inf).argsort(dim=-1, stable=True)
    b, c = target.gather(-1, order), cap.gather(-1, order)
    weight = b.flip(-1).cumsum(-1).flip(-1)
    line = torch.where(b > 0, (total - (c.cumsum(-1) - c)) / weight, 0).amax(-1, keepdim=True)
    share = (line * target).minimum(cap)
    idle = torch.where(target > 0, 0, cap)
    share = share + (total - share.sum(-1, keepdim=True)).clamp(min=0) * idle / idle.sum(-1, keepdim=True).clamp(min=1)

    share = share.round(decimals=6)
    count = share.floor()
    fraction = torch.where(count < cap, (share - count).round(decimals=6), -1.0)
    rank = fraction.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (count + (rank < total - count.sum(-1, keepdim=True))).long()


def top_per_group(score: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Whether a token is among the `counts` [B, G] of highest score [B, N] in its group [B, N]: bool [B, N]; ties to the
    lowest index."""
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))  # group by group, best first
    member = torch.zeros_like(counts).scatter_add(1, group, torch.ones_like(group, dtype=counts.dtype))
    owner = group.gather(1, order)
    rank = torch.arange(score.shape[1], device=score.device) - (member.cumsum(1) - member).gather(1, owner)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, rank < counts.gather(1, owner))
