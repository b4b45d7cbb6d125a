"""The preset of ToDRE v1: its stages have golden values in test_k_center.py and test_relevance_drop.py. Averages:
closed_form_anchors.json."""

import inspect

import pytest
import torch

from mmcompress import create
from mmcompress.registry import field_names, get_method
from mmcompress.tokens import Tokens


def tokens_with(share, N=40):
    generator = torch.Generator().manual_seed(0)
    return Tokens.of(torch.randn(1, N, 8, generator=generator), relevance=torch.tensor(share).expand(1, N, 2))


@pytest.mark.parametrize(("preset", "stage"), [("todre", "k_center"), ("todre_v2", "max_sum")])
def test_stages(preset, stage):
    method = create(preset, keep_ratio=0.25, first=3)
    first, second = method.stages
    assert (type(first).name, type(second).name) == (stage, "relevance_drop")
    assert (first.keep_ratio, first.first, first.placement) == (0.25, 3, "prefill")
    assert (second.layer, second.threshold, second.placement) == (7 / 8, 0.1, "layer")
    assert method.reads == ("relevance",)
    relevant, irrelevant = method(tokens_with((0.4, 0.0))), method(tokens_with((0.02, 0.0)))
    assert torch.equal(relevant.anchor, create(stage, keep_ratio=0.25, first=3)(tokens_with((0.4, 0.0))).anchor)
    assert irrelevant.num_kept == 0 and (irrelevant.assignment == -1).all()


@pytest.mark.parametrize(("preset", "stage"), [("todre", "k_center"), ("todre_v2", "max_sum")])
def test_fields_are_those_of_the_stages(preset, stage):
    own = set(field_names(get_method(preset)))
    assert own == set(field_names(get_method(stage))) - {"placement"} | {"layer", "threshold"}
    defaults = {k: p.default for k, p in inspect.signature(get_method(preset)).parameters.items()}
    for name in (stage, "relevance_drop"):
        for key, value in create(name).config().items():
            if key in own and (key, name) not in (("layer", stage), ("keep_ratio", "relevance_drop")):
                assert defaults[key] == value


def test_keep_ratio_one_switches_both_stages_off():
    for preset in ("todre", "todre_v2"):
        method = create(preset, keep_ratio=1)
        tokens = tokens_with((0.0, 0.0))
        assert method.is_identity and method(tokens).x is tokens.x
