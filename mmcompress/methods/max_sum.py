"""Diversity by greedy max-sum: each pick is the token with the smallest sum of cosines to all earlier picks.

Source: Li et al., ToDRE (arXiv 2505.18757, v2, stage 1; no released code). It favours extremes: of clusters on an arc it picks
the two ends, where `k_center` covers all. Decided here: ascending output, original positions, lowest index on ties, guarded
norms.
"""

from torch import Tensor

from mmcompress import ops
from mmcompress.methods._diversity import Diversity
from mmcompress.registry import register
from mmcompress.tokens import Tokens


@register
class MaxSum(Diversity):
    """Keep tokens that are least similar, in sum, to those already kept."""

    def select(self, tokens: Tokens, K: int) -> Tensor:
        return ops.max_sum(tokens.x, K, first=self.first_pick(tokens))
