"""What `k_center` and `max_sum` share: the first pick (ToDRE, arXiv 2505.18757, Table on pivots; "maxmin" is DivPrune's
rule)."""

from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.compressor import Selector
from mmcompress.tokens import Reduction, Tokens, keep

STARTS = ("auto", "cls", "center", "farthest", "maxmin", "random")


class Diversity(Selector):
    """first: the column of the first pick, or how it is found:
    "cls" (largest CLS logit; over the thumbnail where there are crops), "center" and "farthest" (largest and smallest cosine
    to the mean token), "maxmin" (largest distance to the nearest other token), "random" (drawn from `seed`), "auto" ("cls"
    where the tower has a CLS token, else "center").
    seed: for first="random".
    """

    keep_ratio: float = 0.1
    first: int | str = "auto"
    seed: int = 0

    def check(self) -> None:
        known = self.first in STARTS if isinstance(self.first, str) else isinstance(self.first, Integral) and self.first >= 0
        if isinstance(self.first, bool) or not known:
            raise ValueError(f"first must be a column >= 0 or one of {', '.join(STARTS)}; got {self.first!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer in 0…2**63 - 1, got {self.seed!r}")

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return {"cls": ("cls_logits",), "auto": ("cls_logits|",)}.get(str(self.first), ())

    def compress(self, tokens: Tokens) -> Reduction:
        picks = self.select(tokens, self.num_kept(tokens.num_tokens))
        return replace(keep(tokens, picks), order=picks.argsort(dim=1))

    def first_pick(self, tokens: Tokens) -> int | Tensor:
        """The column of the first pick, per item where it depends on the item."""
        B, N = tokens.x.shape[:2]
        if not isinstance(self.first, str):
            if self.first >= N:
                raise ValueError(f"first must be a column of the item, 0…{N - 1}, got {self.first}")
            return int(self.first)
        if self.first == "random":
            return int(torch.randint(N, (), generator=torch.Generator().manual_seed(self.seed)))
        logits = tokens.signals.get("cls_logits") if self.first in ("cls", "auto") else None
        if logits is None and self.first == "cls":
            raise ValueError("first='cls' reads the signal cls_logits, got none")
        if logits is not None:
            if logits.shape != (B, N):
                raise ValueError(f"cls_logits must have shape [B, N] = {[B, N]}, got {list(logits.shape)}")
            outside = tokens.group != 0 if tokens.layout.crops else torch.zeros_like(tokens.group, dtype=torch.bool)
            return logits.masked_fill(outside, -torch.inf).argmax(1)
        if self.first == "maxmin":
            return ops.neighbors(tokens.x, 1)[0][..., 0].argmin(1) if N > 1 else 0
        x = tokens.x.detach().float()
        norm = 1 / x.norm(dim=-1).clamp(min=1e-12)
        cosine = (x @ x.mean(1)[..., None]).squeeze(-1) * norm  # the mean's own norm changes no order
        return cosine.argmin(1) if self.first == "farthest" else cosine.argmax(1)
