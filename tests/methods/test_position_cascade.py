"""The cascade's depth profile, by its closed form and by the ledger of a model of 36 layers. The merging itself, and its golden
values: test_position_merge.py; on whole models: tests/models/test_rotary.py.
"""

import pytest
import torch

from mmcompress import create
from mmcompress.testing import tiny_inputs, tiny_model
from mmcompress.tokens import Tokens


def test_it_is_three_stages():
    chain = create("position_cascade", keep_ratio=0.5, num_positions=2, cascade="inherit")
    assert [s.config()["method"] for s in chain.stages] == ["position_merge"] * 3
    assert all((s.keep_ratio, s.num_positions, s.cascade) == (0.5, 2, "inherit") for s in chain.stages)
    out = chain(Tokens.of(torch.randn(2, 64, 4)))
    assert out.positions.shape == (2, 8, 2, 3)
    assert create("position_cascade", keep_ratio=1).is_identity


@torch.no_grad()
def test_processed_tokens_by_depth():
    """The ledger of a 36-layer model: all tokens up to layer 11, then 45 % three times; 52.6 % processed on average."""
    model = tiny_model("llava", text={"num_hidden_layers": 36}, vision={"image_size": 80})
    inputs = tiny_inputs("llava", 1, items=[[0]])
    ids = inputs["input_ids"][0]
    place = int((ids == 3).nonzero()[0])
    words = ids[ids != 3]
    inputs["input_ids"] = torch.cat([words[:place], torch.full((400,), 3), words[place:]])[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["pixel_values"] = torch.randn(1, 3, 80, 80)
    with create("position_cascade")(model) as run:
        model(**inputs)
    (item,) = run.ledger.items
    assert item.kept(36) == [400] * 11 + [180] * 12 + [81] * 12 + [36]
    assert run.ledger.kept_ratio == pytest.approx((11 + 12 * 0.45 + 12 * 0.2025 + 0.09) / 36)
    closed = (11 + 12 * 0.45 + 12 * 0.2025 + 0.091125) / 36
    assert round(100 * closed, 1) == 52.6 == round(100 * run.ledger.kept_ratio, 1)
    assert closed > 0.45, "more than one cut before the language model would process"
