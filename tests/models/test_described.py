"""A model that its author describes: the example, and what is said to a wrong description."""

import importlib.util
from pathlib import Path

import pytest
import torch

import mmcompress
from mmcompress.models import describe
from mmcompress.testing import check_family

RIGHT = {"core": "reader", "text": "reader.words", "placeholders": {"image": 3}, "inputs": {"image": "pictures"}}


@pytest.fixture(scope="module")
def own():
    file = Path(__file__).parents[2] / "examples" / "own_model.py"
    spec = importlib.util.spec_from_file_location("own_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_keeps_the_contract(own):
    items = [[own.NUM_PATCHES] * 2, [own.NUM_PATCHES], [own.NUM_PATCHES]]
    checks = ("install", "identity", "batch", "beams", "items", "layer batch")
    report = check_family(own.build(), own.inputs, items=items, placeholders=[own.PATCH], seam=describe(**RIGHT), checks=checks)
    assert set(report.verdicts.values()) == {"pass"}, str(report)


@torch.no_grad()
def test_an_argument_that_nobody_named_is_no_silence(own):
    model, rows = own.build(), own.inputs([0, 1])
    with pytest.raises(ValueError, match="must have a core that makes features"):
        mmcompress.compress_(model, mmcompress.create("k_center"))
    mmcompress.compress_(model, mmcompress.create("k_center"), seam=describe(**{**RIGHT, "inputs": {}}))
    with pytest.raises(ValueError, match=r"got no pixels, sound or features"):
        model(**rows)
    mmcompress.restore_(model)
    assert "forward" not in model.reader.__dict__


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"core": "leser"}, ValueError, "core must be the path of a module of ReaderForAnswers, got 'leser'"),
        ({"text": "head"}, ValueError, "text must be a module with decoder layers"),
        ({"placeholders": {"picture": 3}}, ValueError, "must be of the kinds image, video, audio, got 'picture'"),
        ({"placeholders": {"image": "3"}}, TypeError, "must hold at least one kind with its id"),
        ({"placeholders": {}}, TypeError, "must hold at least one kind with its id"),
    ],
)
def test_wrong_descriptions(own, change, error, says):
    with pytest.raises(error, match=says):
        mmcompress.compress_(own.build(), mmcompress.create("k_center"), seam=describe(**{**RIGHT, **change}))


def test_what_is_no_description(own):
    with pytest.raises(TypeError, match=r"must be what mmcompress\.models\.describe gives"):
        mmcompress.compress_(own.build(), mmcompress.create("k_center"), seam={"core": "reader"})
