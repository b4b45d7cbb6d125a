"""Tiny random models of every family with inputs that fit them, and the contract that a model has to keep: for this package's
tests, for authors of methods and for owners of a model that the library does not know.

    model, inputs = tiny_model("llava_next"), tiny_inputs("llava_next", batch_size=4)
    with mmcompress.create("k_center", keep_ratio=0.25)(model) as run:
        model.generate(**inputs, max_new_tokens=8)
    print(check_family(model, lambda rows: tiny_inputs("llava_next", 4, rows=rows)))

The weights are random with a fixed seed and large enough that attention is far from flat: a wrong mask or position
shows in the logits.
transformers is imported inside the functions only.
"""

from mmcompress.testing.contract import CHECKS, Report, check_family, check_tiny
from mmcompress.testing.parts import (
    AUDIO,
    BOS,
    END,
    FIRST_WORD,
    IMAGE,
    PAD,
    PLACEHOLDERS,
    START,
    VIDEO,
    VOCAB,
    Family,
    Item,
)  # fmt: skip
from mmcompress.testing.tested import (
    CLIP_FRAMES,
    HIDDEN,
    MEL_BINS,
    MERGE,
    NUM_MEL,
    PATCH,
    PINPOINTS,
    QWEN,
    SIDE,
    TEXT,
    TOWERS,
    VIEW,
    WINDOW,
    anyres_canvas,
    anyres_crops,
)  # fmt: skip
from mmcompress.testing.tiny import FAMILIES, TOLERANCE, assert_close, devices, tiny_inputs, tiny_items, tiny_model

__all__ = [
    "AUDIO",
    "BOS",
    "CHECKS",
    "CLIP_FRAMES",
    "END",
    "FAMILIES",
    "FIRST_WORD",
    "HIDDEN",
    "IMAGE",
    "MEL_BINS",
    "MERGE",
    "NUM_MEL",
    "PAD",
    "PATCH",
    "PINPOINTS",
    "PLACEHOLDERS",
    "QWEN",
    "SIDE",
    "START",
    "TEXT",
    "TOLERANCE",
    "TOWERS",
    "VIDEO",
    "VIEW",
    "VOCAB",
    "WINDOW",
    "Family",
    "Item",
    "Report",
    "anyres_canvas",
    "anyres_crops",
    "assert_close",
    "check_family",
    "check_tiny",
    "devices",
    "tiny_inputs",
    "tiny_items",
    "tiny_model",
]  # fmt: skip
