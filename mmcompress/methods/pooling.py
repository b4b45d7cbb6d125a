"""Average pooling of consecutive tokens: the plainest merger, before the language model or (LLaVolta) inside it.

Source: Chen et al., "Efficient Large Multi-modal Models via Visual Context Compression" (LLaVolta, arXiv 2406.20092, NeurIPS
2024), inference part. Differences: the remainder of N / stride is pooled as a short group (released: dropped, `tail="drop"`),
position ids are integers at any length (released: averaged in float16), and an m-RoPE token takes its anchor's own (t, h, w).
"""

from numbers import Integral

import torch
from torch import Tensor

from mmcompress.compressor import Merger
from mmcompress.registry import register
from mmcompress.tokens import Tokens


@register
class Pooling(Merger):
    """Average groups of neighbours in raster order; a group stands at its member ⌊(first + last) / 2⌋.

    stride: tokens per group, an integer >= 1; None: num_kept(N, keep_ratio) groups whose sizes differ by at most 1. It
    overrides keep_ratio.
    tail: what happens to the N mod stride last tokens: "partial" (a short group of their own) or "drop".
    """

    stride: int | None = None
    tail: str = "partial"

    def check(self) -> None:
        if self.stride is not None and (
            isinstance(self.stride, bool) or not isinstance(self.stride, Integral) or self.stride < 1
        ):
            raise ValueError(f"stride must be None or an integer >= 1, got {self.stride!r}")
        if self.tail not in ("partial", "drop"):
            raise ValueError(f"tail must be 'partial' or 'drop', got {self.tail!r}")

    @property
    def is_identity(self) -> bool:
        return self.keep_ratio == 1 or self.stride == 1

    def num_kept(self, num_tokens: int) -> int:
        if self.is_identity:
            return num_tokens
        if self.stride is None:
            return super().num_kept(num_tokens)
        if self.tail == "partial":
            return -(-num_tokens // self.stride)
        if 0 < num_tokens < self.stride:
            raise ValueError(f"stride {self.stride} with tail='drop' would delete an item of {num_tokens} tokens")
        return num_tokens // self.stride

    def assign(self, tokens: Tokens, K: int) -> tuple[Tensor, Tensor]:
        B, N = tokens.x.shape[:2]
        column = torch.arange(N, device=tokens.x.device)
        group = torch.arange(K, device=tokens.x.device)
        if self.stride is None:
            assignment = column * K // N
            first, last = -(-group * N // K), -(-(group + 1) * N // K) - 1
        else:
            assignment = column // self.stride
            assignment = torch.where(assignment < K, assignment, -1)
            first, last = group * self.stride, ((group + 1) * self.stride).clamp(max=N) - 1
        return assignment.expand(B, N), ((first + last) // 2).expand(B, K)
