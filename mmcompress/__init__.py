"""mmcompress: fewer visual, video and audio tokens for Hugging Face multimodal LLMs.

with mmcompress.create("global_guided", keep_ratio=0.25)(model) as run:
    answer = model.generate(**inputs, max_new_tokens=64)
print(run.ledger)
"""

from mmcompress.compressor import Compressor, Merger, Scorer, Selector, num_kept
from mmcompress.io import apply_from_config, from_pretrained, save_pretrained
from mmcompress.patch import compress_, restore_
from mmcompress.registry import create, list_methods, register
from mmcompress.tokens import Reduction, Tokens

__version__ = "0.1.0"
__all__ = [
    "Compressor", "Merger", "Reduction", "Scorer", "Selector", "Tokens",
    "apply_from_config", "compress_", "create", "from_pretrained", "list_methods", "num_kept", "register", "restore_",
    "save_pretrained",
]  # fmt: skip
