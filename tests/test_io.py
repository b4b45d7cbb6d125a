"""Saving and loading compressors, alone and inside a model's own config."""

import json

import pytest
import torch

import mmcompress as mmc
from mmcompress.compressor import Chain, from_config
from mmcompress.io import WEIGHTS
from mmcompress.testing import tiny_inputs, tiny_model


@pytest.fixture
def learned():
    """A method with a parameter, registered for one test."""
    from mmcompress import registry

    class LearnedKeep(mmc.Scorer):
        width: int = 4

        def setup(self):
            self.weight = torch.nn.Parameter(torch.randn(self.width, generator=torch.Generator().manual_seed(0)))

        def score(self, tokens):
            return tokens.x.float() @ self.weight

    mmc.register(LearnedKeep)
    yield LearnedKeep
    del registry._methods["learned_keep"]


def test_round_trip_with_parameters(tmp_path, learned):
    one = mmc.create("learned_keep", keep_ratio=0.5)
    with torch.no_grad():
        one.weight += 1
    mmc.save_pretrained(one, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mmcompress.json", WEIGHTS]
    two = mmc.from_pretrained(tmp_path)
    assert two.config() == one.config() and torch.equal(two.weight, one.weight)


def test_round_trip_of_a_chain(tmp_path):
    chain = mmc.create("pooling", stride=2) | mmc.create("random_keep", keep_ratio=0.5, layer=2, seed=3)
    mmc.save_pretrained(chain, tmp_path)
    again = mmc.from_pretrained(tmp_path)
    assert isinstance(again, Chain) and again.config() == chain.config()


def test_stale_weights_do_not_survive(tmp_path, learned):
    mmc.save_pretrained(mmc.create("learned_keep"), tmp_path)
    mmc.save_pretrained(mmc.create("uniform_keep"), tmp_path)
    assert mmc.from_pretrained(tmp_path).name == "uniform_keep"


@pytest.mark.parametrize(
    "content, message",
    [(None, "must hold mmcompress.json"), ("{", "not valid JSON"), ("[]", "must be a dict"), ("{}", "'method' or 'chain'")],
)
def test_broken_folder(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mmcompress.json").write_text(content)
    with pytest.raises((ValueError, TypeError), match=message):
        mmc.from_pretrained(tmp_path)


def test_missing_weights(tmp_path, learned):
    mmc.save_pretrained(mmc.create("learned_keep"), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"must hold the parameters \['weight'\], got \[\]"):
        mmc.from_pretrained(tmp_path)


def test_broken_weights(tmp_path, learned):
    mmc.save_pretrained(mmc.create("learned_keep"), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        mmc.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    (tmp_path / "mmcompress.json").write_text(json.dumps({"method": "learned_keep", "width": 5}))
    with pytest.raises(ValueError, match="does not fit"):
        mmc.from_pretrained(tmp_path)


def test_a_config_refuses_what_it_cannot_carry(learned):
    model = tiny_model("llava")
    mmc.restore_(mmc.compress_(model, mmc.create("learned_keep")))
    model.config.mmcompress = mmc.create("learned_keep").config()
    with pytest.raises(ValueError, match=r"without parameters, got LearnedKeep with 1 \(weight"):
        mmc.apply_from_config(model)


def test_a_preset_in_a_chain_keeps_its_places():
    """It is a chain itself: its parts stand where they stood, not one inside the other."""
    cascade = mmc.create("position_cascade").config()["chain"]
    pooling = mmc.create("pooling", keep_ratio=0.5).config()
    by_name = from_config({"chain": [{"method": "position_cascade"}, pooling]})
    assert by_name.config() == from_config({"chain": [{"chain": cascade}, pooling]}).config() == {"chain": [*cascade, pooling]}
    assert [s.layer for s in by_name.stages] == [*(c["layer"] for c in cascade), None]


def test_the_models_config_remembers(tmp_path):
    model, inputs = tiny_model("llava"), tiny_inputs("llava", batch_size=1)
    chain = mmc.create("uniform_keep", keep_ratio=0.5) | mmc.create("random_keep", keep_ratio=0.5, layer=2)
    mmc.compress_(model, chain)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    mmc.restore_(model)
    assert not hasattr(model.config, "mmcompress")
    assert json.loads((tmp_path / "config.json").read_text())["mmcompress"] == chain.config()

    loaded = type(model).from_pretrained(tmp_path)
    assert not torch.equal(loaded(**inputs).logits, expected)  # nothing is applied behind the user's back
    assert torch.equal(mmc.apply_from_config(loaded)(**inputs).logits, expected)
    mmc.restore_(loaded)
    with pytest.raises(ValueError, match=r"config\.mmcompress"):
        mmc.apply_from_config(loaded)


def test_named(tmp_path):
    from mmcompress.io import named

    mmc.save_pretrained(mmc.create("k_center", keep_ratio=0.5), tmp_path)
    assert named("k_center", keep_ratio=0.5).config() == named(str(tmp_path)).config()
    with pytest.raises(ValueError, match="takes no fields, got keep_ratio"):
        named(str(tmp_path), keep_ratio=0.5)
    with pytest.raises(ValueError, match="got 'zoo:nothing'"):
        named("zoo:nothing")
    with pytest.raises(ValueError, match="unknown method 'k_centre'"):
        named("k_centre")
