"""PPE's cascade: position_merge before three decoder layers, tokens leaving step by step while their positions are handed on.

Source: Huang et al., PPE (arXiv 2510.22936), the released preset: layers 11, 23 and 35 of 36, 45 % kept each time. 9.1 % of the
tokens are left, 52.6 % are processed on average over the layers. Differences from the release: those of position_merge.
"""

from mmcompress.compressor import Compressor
from mmcompress.registry import create, register

LAYERS = (11 / 36, 23 / 36, 35 / 36)


@register
def position_cascade(
    *,
    keep_ratio: float = 0.45,
    merger: str | dict = "dpc_knn",
    num_positions: int | str = "auto",
    cascade: str = "interleave",
    mode: str = "corrected",
) -> Compressor:
    """position_merge before three decoder layers, at 11, 23 and 35 of 36 of the depth, the same keep_ratio each time.

    keep_ratio, merger, num_positions, cascade, mode: of position_merge.
    """
    fields = {"merger": merger, "num_positions": num_positions, "cascade": cascade, "mode": mode}
    first, second, third = (create("position_merge", keep_ratio=keep_ratio, layer=layer, **fields) for layer in LAYERS)
    return first | second | third
