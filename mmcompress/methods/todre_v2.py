"""ToDRE as its second version describes it: diversity by max-sum before the language model, then relevance inside it.

Source: Li et al., arXiv 2505.18757, v2 (no released code); the published tables are of this variant.
"""

from mmcompress.compressor import Compressor
from mmcompress.registry import create, register


@register
def todre_v2(
    *,
    keep_ratio: float = 0.1,
    first: int | str = "auto",
    seed: int = 0,
    layer: int | float = 7 / 8,
    threshold: float = 0.1,
) -> Compressor:
    """max_sum before the language model, then relevance_drop before a late layer; the identity at keep_ratio 1.

    keep_ratio, first, seed: of max_sum. layer, threshold: of relevance_drop (which keep_ratio 1 switches off, too).
    """
    stage1 = create("max_sum", keep_ratio=keep_ratio, first=first, seed=seed)
    return stage1 | create("relevance_drop", layer=layer, threshold=0 if stage1.is_identity else threshold)
