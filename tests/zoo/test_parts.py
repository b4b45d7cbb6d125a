import pytest
import torch
from safetensors.torch import save_file

from mmcompress.zoo.lora import apply_parts_


def state():
    return {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(4), "model.image_newline": torch.zeros(2)}


@pytest.mark.parametrize("rank", [1, 8])
def test_weights_are_replaced_and_adapters_of_any_rank_added(tmp_path, rank):
    a, b = torch.randn(rank, 2), torch.randn(3, rank)
    save_file({"a.weight": torch.full((3, 2), 5.0).half()}, tmp_path / "projector.safetensors")
    save_file({"a.weight.lora_a": a, "a.weight.lora_b": b}, tmp_path / "lora.safetensors")
    got = state()
    apply_parts_(got, tmp_path)
    assert got["a.weight"].dtype == torch.float32
    torch.testing.assert_close(got["a.weight"], 5 + 2 * b @ a)
    assert torch.equal(got["b.weight"], torch.ones(4))


@pytest.mark.parametrize("part", [{"c.weight": torch.ones(3)}, {"b.weight": torch.ones(5)}])
def test_foreign_weights_are_refused(tmp_path, part):
    save_file(part, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors must hold weights of this model, got '[bc]\.weight' of shape"):
        apply_parts_(state(), tmp_path)


def test_an_adapter_of_no_weight_is_refused(tmp_path):
    save_file({"c.weight.lora_a": torch.ones(1, 2), "c.weight.lora_b": torch.ones(3, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"known weights, got one for 'c\.weight'"):
        apply_parts_(state(), tmp_path)


def test_a_newline_is_left_out_where_the_model_has_none(tmp_path):
    save_file({"model.image_newline": torch.ones(2)}, tmp_path / "x.safetensors")
    got = state()
    apply_parts_(got, tmp_path)
    assert torch.equal(got["model.image_newline"], torch.ones(2))
    bare = {"b.weight": torch.ones(4)}
    apply_parts_(bare, tmp_path)
    assert list(bare) == ["b.weight"]
