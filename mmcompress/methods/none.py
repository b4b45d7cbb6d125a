"""The uncompressed control: every token stays, bit for bit. It gives comparisons and benchmarks their first row."""

from typing import ClassVar

from mmcompress.compressor import Compressor
from mmcompress.registry import register


@register
class NoCompression(Compressor):
    """Change nothing."""

    name = "none"
    has_ratio: ClassVar[bool] = False
    identity_config: ClassVar[dict] = {}

    @property
    def is_identity(self) -> bool:
        return True

    def num_kept(self, num_tokens: int) -> int:
        return num_tokens
