"""Drop all visual tokens of a sample before a late decoder layer, if text and picture hardly attend to each other any more.

Source: Li et al., ToDRE (arXiv 2505.18757, v2, stage 2; no released code). All or nothing, decided per sample, once per
prompt. Layers before `layer` keep their full cache. In the usual order, text after the picture, the causal mask makes the
visual-to-text share 0, and the text-to-visual share alone decides.

Signal `relevance` [B, N, 2]: the shares (text to visual, visual to text) of `mmcompress.ops.relevance.relevance` in the
attention of layer `layer` − 1 during prefill, made once per *sample* over all its visual columns (separators included) and
repeated for every token of all its items.
"""

from numbers import Real
from typing import ClassVar

import torch

from mmcompress.compressor import Compressor
from mmcompress.registry import register
from mmcompress.tokens import Reduction, Tokens, keep_where


@register
class RelevanceDrop(Compressor):
    """Drop a sample's visual tokens before a decoder layer if both attention shares between text and picture are small.

    threshold: the share below which a direction counts as irrelevant, in [0, 1]; 0 never drops.
    layer: the decoder layer it stands before, at least 1; 7/8 of the depth by default.
    """

    reads: ClassVar[tuple[str, ...]] = ("relevance",)
    has_ratio: ClassVar[bool] = False
    identity_config: ClassVar[dict] = {"threshold": 0}

    layer: int | float | None = 7 / 8
    threshold: float = 0.1

    def check(self) -> None:
        if self.layer is None or self.layer == 0:
            raise ValueError(f"layer of relevance_drop must be an int >= 1 or a float in (0, 1), got {self.layer!r}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, Real) or not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold!r}")

    @property
    def is_identity(self) -> bool:
        return self.threshold == 0

    def num_kept(self, num_tokens: int) -> int:
        """All, or none: what a sample keeps is known only in prefill."""
        return num_tokens

    def compress(self, tokens: Tokens) -> Reduction:
        share = tokens.signals.get("relevance")
        B, N = tokens.x.shape[:2]
        if share is None or share.shape != (B, N, 2):
            got = "none" if share is None else list(share.shape)
            raise ValueError(f"relevance_drop reads the signal relevance of shape [B, N, 2] = {[B, N, 2]}, got {got}")
        if not torch.compiler.is_compiling() and not bool(share.isfinite().all()):
            raise ValueError("relevance must be finite, got NaN or infinite values")
        return keep_where(tokens, (share >= self.threshold).any(-1))
