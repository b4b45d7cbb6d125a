"""Diversity by greedy k-center: each pick is the token farthest from its nearest earlier pick.

Source: Li et al., ToDRE (arXiv 2505.18757, v1, stage 1); with `first="maxmin"` it is DivPrune (Alvar et al., arXiv
2503.02175). No code was released for ToDRE; decided here: ascending output, original positions, lowest index on ties, guarded
norms.
"""

from torch import Tensor

from mmcompress import ops
from mmcompress.methods._diversity import Diversity
from mmcompress.registry import register
from mmcompress.tokens import Tokens


@register
class KCenter(Diversity):
    """Farthest-first traversal on the item's features.

    metric: "cosine" (1 − cos) or "sqeuclidean".
    """

    metric: str = "cosine"

    def check(self) -> None:
        super().check()
        if self.metric not in ("cosine", "sqeuclidean"):
            raise ValueError(f"metric must be 'cosine' or 'sqeuclidean', got {self.metric!r}")

    def select(self, tokens: Tokens, K: int) -> Tensor:
        return ops.k_center(tokens.x, K, first=self.first_pick(tokens), metric=self.metric)
