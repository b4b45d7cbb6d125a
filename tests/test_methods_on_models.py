"""Every registered method on every family that offers what it reads: a left-padded batch gives each sample's own result.

Generation, caches and gradients do not depend on the method: tests/test_seam.py.
"""

import pytest
import torch

from mmcompress import create, list_methods
from mmcompress.registry import get_method
from mmcompress.testing import assert_close, tiny_inputs

FAMILIES = ("llava", "llava_siglip", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen2_audio")
ROWS = 4


def settings(name, family):
    """Fields with which a method decides differently for the samples of a random model's batch; otherwise the defaults."""
    if name == "vq_hash":  # a tiny item has few tokens
        return {"num_codes": 5}
    return {"threshold": 0.9 if family in ("llava_next", "llava_onevision") else 0.7} if name == "relevance_drop" else {}


def refusal(model, name, **fields):
    """Why the model cannot take the method, or None."""
    try:
        with create(name, **fields)(model):
            return None
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [m for m in list_methods() if m != "none"])
def test_batch_is_one_by_one(tiny, family, name):
    model, inputs = tiny(family), tiny_inputs(family, ROWS)
    fields = settings(name, family)
    if why := refusal(model, name, **fields):
        assert why.startswith(name) and ("reads the signal" in why or "models take" in why), why
        return
    with torch.no_grad():
        before = model(**inputs).logits
        with create(name, **fields)(model) as run:
            batch = model(**inputs).logits
            kept = [(item.sample, item.anchor.tolist()) for item in run.items]
            if name == "relevance_drop":
                assert {bool(anchor) for _, anchor in kept} == {True, False}
            for r in range(ROWS):
                one = tiny_inputs(family, ROWS, rows=[r])
                count = int(inputs["attention_mask"][r].sum())
                assert_close(model(**one).logits[0, -count:], batch[r, -count:], 1e-5)
                if any(sample == r for sample, _ in kept):
                    assert [item.anchor.tolist() for item in run.items] == [anchor for sample, anchor in kept if sample == r]
        assert torch.equal(model(**inputs).logits, before), "the model is as it was"
        with create(name, **getattr(get_method(name), "identity_config", {"keep_ratio": 1}))(model):
            assert torch.equal(model(**inputs).logits, before)
