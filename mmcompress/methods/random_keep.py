"""Keep tokens at random: the control that every method has to beat.

All items of N tokens lose the same columns for one seed, so a result does not depend on batch mates or on the device.
"""

from numbers import Integral

import torch
from torch import Tensor

from mmcompress.compressor import Selector
from mmcompress.registry import register
from mmcompress.tokens import Tokens


@register
class RandomKeep(Selector):
    """Keep K of N tokens, uniformly drawn without replacement.

    seed: an integer >= 0; the draw is a function of (seed, N) alone, made on the CPU.
    """

    seed: int = 0

    def check(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer in 0…2**63 - 1, got {self.seed!r}")

    def select(self, tokens: Tokens, K: int) -> Tensor:
        B, N = tokens.x.shape[:2]
        return permutation(N, self.seed)[:K].to(tokens.x.device).expand(B, K)


@torch.compiler.disable  # generators cannot be traced
def permutation(N: int, seed: int) -> Tensor:
    """0…N-1 in an order that depends on (N, seed) alone, on the CPU."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))
