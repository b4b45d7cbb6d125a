"""ToMe's bipartite soft matching as a merger of any token set: similar tokens become their size-weighted mean.

Source: Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), steps 1 to 6. Differences from the released
code: outputs stand in raster order at their anchors (released: unmerged tokens first, then destinations), ties go to the
lowest index, a zero token is similar to nothing (released: NaN), and a keep_ratio below one half repeats the matching
(released: clamped at half). Inside an encoder ToMe also adds log sizes to the attention; before or inside a language model
this merger leaves the attention as it is.
"""

from numbers import Integral

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.compressor import Merger
from mmcompress.registry import register
from mmcompress.tokens import Tokens, gather


@register
class Tome(Merger):
    """Merge the most similar pairs of an even and an odd token, in rounds, until K are left.

    r: None, or how many tokens one round of matching removes (at most half); it overrides keep_ratio, and 0 removes none.
    metric: what similarity is measured on, "x" (the features) or "keys" (those of the tower's last layer).
    """

    r: int | None = None
    metric: str = "x"

    def check(self) -> None:
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, Integral) or self.r < 0):
            raise ValueError(f"r must be None or an integer >= 0, got {self.r!r}")
        if self.metric not in ("x", "keys"):
            raise ValueError(f"metric must be 'x' or 'keys', got {self.metric!r}")

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("keys",) if self.metric == "keys" else ()

    @property
    def is_identity(self) -> bool:
        return self.keep_ratio == 1 or self.r == 0

    def num_kept(self, num_tokens: int) -> int:
        if self.is_identity:
            return num_tokens
        return super().num_kept(num_tokens) if self.r is None else num_tokens - min(self.r, num_tokens // 2)

    def features(self, tokens: Tokens) -> Tensor:
        """What similarity is measured on [B, N, ·], float32."""
        B, N = tokens.x.shape[:2]
        if self.metric == "keys" and "keys" not in tokens.signals:
            raise ValueError("tome with metric='keys' reads the signal keys, got none")
        features = (tokens.x if self.metric == "x" else tokens.signals["keys"]).detach().float()
        if features.shape[:2] != (B, N):
            raise ValueError(f"keys must have shape [B, N, …] with [B, N] = {[B, N]}, got {list(features.shape)}")
        return features

    def distance(self, tokens: Tokens, other: Tensor) -> Tensor:
        """One minus the cosine; a zero token is similar to nothing."""
        x = self.features(tokens)
        length = x.norm(dim=-1)
        return 1 - (x * gather(x, other)).sum(-1) / (length * length.gather(1, other)).clamp(min=torch.finfo(x.dtype).tiny)

    def assign(self, tokens: Tokens, K: int) -> tuple[Tensor, Tensor]:
        B, N = tokens.x.shape[:2]
        metric, size = self.features(tokens), tokens.size
        assignment = anchor = torch.arange(N, device=tokens.x.device).expand(B, N)
        while N > K:
            r = min(N - K, N // 2)
            match = ops.bipartite_match(metric, r)
            metric, size = ops.merge(metric, match.assignment, N - r, size)
            assignment, anchor = match.assignment.gather(1, assignment), anchor.gather(1, match.anchor)
            N -= r
        return assignment, anchor
