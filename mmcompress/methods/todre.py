"""ToDRE as its first version's abstract describes it: diversity by k-center before the language model, then relevance inside
it.

Source: Li et al., arXiv 2505.18757, v1 (no released code). `todre_v2` is the variant of the second version, whose tables are
the published ones.
"""

from mmcompress.compressor import Compressor
from mmcompress.registry import create, register


@register
def todre(
    *,
    keep_ratio: float = 0.1,
    first: int | str = "auto",
    metric: str = "cosine",
    seed: int = 0,
    layer: int | float = 7 / 8,
    threshold: float = 0.1,
) -> Compressor:
    """k_center before the language model, then relevance_drop before a late layer; the identity at keep_ratio 1.

    keep_ratio, first, metric, seed: of k_center. layer, threshold: of relevance_drop (which keep_ratio 1 switches off, too).
    """
    stage1 = create("k_center", keep_ratio=keep_ratio, first=first, metric=metric, seed=seed)
    return stage1 | create("relevance_drop", layer=layer, threshold=0 if stage1.is_identity else threshold)
