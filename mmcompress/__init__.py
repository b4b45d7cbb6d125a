"""mmcompress: fewer visual, video and audio tokens for Hugging Face multimodal LLMs.

with mmcompress.create("global_guided", keep_ratio=0.25)(model) as run:
    answer = model.generate(**inputs, max_new_tokens=64)
print(run.ledger)
"""

from typing import TYPE_CHECKING

from mmcompress.compressor import Compressor, Merger, Scorer, Selector, num_kept
from mmcompress.io import apply_from_config, from_pretrained, save_pretrained
from mmcompress.patch import compress_, restore_
from mmcompress.registry import create, list_methods, register
from mmcompress.tokens import Reduction, Tokens

if TYPE_CHECKING:
    from mmcompress.ledger import of_model as ledger
else:
    from mmcompress import ledger  # a module that can be called: mmcompress.ledger(model)

__version__ = "0.1.0"
__all__ = [
    "Compressor", "Merger", "Reduction", "Scorer", "Selector", "Tokens",
    "apply_from_config", "compress_", "create", "from_pretrained", "ledger", "list_methods", "num_kept", "register", "restore_",
    "save_pretrained",
]  # fmt: skip
