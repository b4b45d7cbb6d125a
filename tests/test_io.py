"""Saving and loading compressors, alone and inside a model's own config."""

import json
from pathlib import Path

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


class Unwritable(mmc.Scorer):
    """A field that JSON cannot hold."""

    target: object = None


def held(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_failed_save_keeps_the_one_before(tmp_path, learned, monkeypatch):
    from mmcompress import io

    mmc.save_pretrained(mmc.create("learned_keep", keep_ratio=0.5), tmp_path)
    before = held(tmp_path)
    with pytest.raises(ValueError, match="configuration of plain JSON values"):
        mmc.save_pretrained(Unwritable(target=object()), tmp_path)
    assert held(tmp_path) == before
    other = mmc.create("learned_keep", keep_ratio=0.25)
    with torch.no_grad():
        other.weight += 1

    replace = io.os.replace
    for stop in (WEIGHTS, "mmcompress.json"):  # the disk fails at the first rename, and between the two

        def failing(source, target, stop=stop):
            if Path(target).name == stop and Path(source).parent.name == "new":
                raise OSError("no room")
            replace(source, target)

        monkeypatch.setattr(io.os, "replace", failing)
        with pytest.raises(OSError, match="no room"):
            mmc.save_pretrained(other, tmp_path)
        assert held(tmp_path) == before
        with pytest.raises(OSError, match="no room"):
            mmc.save_pretrained(other, tmp_path / "new")
        assert not list((tmp_path / "new").iterdir())
        (tmp_path / "new").rmdir()
    monkeypatch.setattr(io.os, "replace", replace)
    mmc.save_pretrained(other, tmp_path)
    assert torch.equal(mmc.from_pretrained(tmp_path).weight, other.weight) and len(held(tmp_path)) == 2


def test_a_save_says_its_format_and_a_newer_one_is_refused(tmp_path):
    file = tmp_path / "mmcompress.json"
    mmc.save_pretrained(mmc.create("uniform_keep", keep_ratio=0.5), tmp_path)
    saved = json.loads(file.read_text())
    assert saved.pop("format_version") == 1 and saved == mmc.create("uniform_keep", keep_ratio=0.5).config()
    file.write_text(json.dumps(saved))  # as files were before there was a version
    assert mmc.from_pretrained(tmp_path).config() == saved
    for version in (2, 0, "1", None, True):
        file.write_text(json.dumps({"format_version": version, "method": "of_tomorrow"}))
        with pytest.raises(ValueError, match="format_version from 1 to 1, got"):
            mmc.from_pretrained(tmp_path)


def test_parameters_that_share_memory_are_saved(tmp_path):
    from mmcompress.io import save_beside

    class Tied(mmc.Scorer):
        def setup(self):
            self.a = torch.nn.Parameter(torch.ones(2, 3).T)
            self.b = self.a

    save_beside(Tied(), tmp_path)
    from safetensors.torch import load_file

    assert all(torch.equal(v, torch.ones(3, 2)) for v in load_file(tmp_path / WEIGHTS).values())


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


def test_a_models_folder_remembers_parameters(tmp_path, learned):
    """Saved beside the model, found where the model was loaded from, or in the folder that is named."""
    from mmcompress.io import save_beside

    model, inputs = tiny_model("llava"), tiny_inputs("llava", batch_size=1)
    width = model.config.text_config.hidden_size
    method = mmc.create("learned_keep", keep_ratio=0.5, width=width) | mmc.create("uniform_keep", keep_ratio=0.5, layer=2)
    with torch.no_grad():
        method.stages[0].weight.copy_(torch.randn(width))
    with method(model):
        expected = model(**inputs).logits
    model.config.mmcompress = method.config()
    model.save_pretrained(tmp_path / "model")
    save_beside(method, tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_beside(method, adapter)
    assert {p.name for p in adapter.iterdir()} == {"adapter_config.json", "mmcompress.json", WEIGHTS}

    assert torch.equal(mmc.from_pretrained(tmp_path / "model").stages[0].weight, method.stages[0].weight)
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(mmc.apply_from_config(loaded)(**inputs).logits, expected)
    mmc.restore_(loaded)
    base = tiny_model("llava")  # an adapter's: its config remembers nothing
    assert torch.equal(mmc.apply_from_config(base, adapter)(**inputs).logits, expected)
    mmc.restore_(base)
    loaded.config.mmcompress = mmc.create("uniform_keep").config()
    with pytest.raises(ValueError, match=r"must hold the compressor that model\.config\.mmcompress remembers"):
        mmc.apply_from_config(loaded, adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="must hold the parameters"):
        mmc.apply_from_config(tiny_model("llava"), adapter)


def test_the_folder_of_a_model_is_read_where_its_config_holds_all(tmp_path):
    model = tiny_model("llava")
    chain = mmc.create("uniform_keep", keep_ratio=0.5) | mmc.create("random_keep", keep_ratio=0.5, layer=2)
    mmc.compress_(model, chain).save_pretrained(tmp_path)
    (tmp_path / "mmcompress.json").unlink(missing_ok=True)
    assert mmc.from_pretrained(tmp_path).config() == chain.config()
    mmc.restore_(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold mmcompress\.json"):
        mmc.from_pretrained(tmp_path)


def test_a_preset_in_a_chain_keeps_its_places():
    """It is a chain itself: its parts stand where they stood, not one inside the other."""
    cascade = mmc.create("position_cascade").config()["chain"]
    pooling = mmc.create("pooling", keep_ratio=0.5).config()
    by_name = from_config({"chain": [pooling, {"method": "position_cascade"}]})
    assert by_name.config() == from_config({"chain": [pooling, {"chain": cascade}]}).config() == {"chain": [pooling, *cascade]}
    assert [s.layer for s in by_name.stages] == [None, *(c["layer"] for c in cascade)]


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


def test_a_folder_called_like_a_method_does_not_stand_before_it(tmp_path, monkeypatch):
    from mmcompress.eval.bench import Sweep
    from mmcompress.io import named

    monkeypatch.chdir(tmp_path)
    mmc.save_pretrained(mmc.create("pooling"), "k_center")
    mmc.save_pretrained(mmc.create("pooling"), "mine")
    mmc.save_pretrained(mmc.create("pooling"), ".")
    assert named("k_center").name == "k_center" and named("./k_center").name == named("k_center/").name == "pooling"
    assert [s.compressor.name for s in Sweep(["m"], ["t"], ["k_center"]).settings()][-1] == "k_center"
    with pytest.raises(ValueError, match=r"a folder as '\./mine', got 'mine'"):
        named("mine")
    for nothing in ("", " "):
        with pytest.raises(ValueError, match="unknown method"):
            named(nothing)
        with pytest.raises(ValueError, match="folder must be one that holds"):
            mmc.from_pretrained(nothing)
