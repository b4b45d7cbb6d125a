"""Keep evenly spaced tokens: the plain control without randomness.

Output j takes column ⌊(2j + 1)·N / 2K⌋, the middle of the j-th of K equal bins, in integer arithmetic.
"""

import torch
from torch import Tensor

from mmcompress.compressor import Selector
from mmcompress.registry import register
from mmcompress.tokens import Tokens


@register
class UniformKeep(Selector):
    """Keep K of N tokens, evenly spread over the item's raster order."""

    def select(self, tokens: Tokens, K: int) -> Tensor:
        B, N = tokens.x.shape[:2]
        return ((2 * torch.arange(K, device=tokens.x.device) + 1) * N // (2 * K)).expand(B, K)
