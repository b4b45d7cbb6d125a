import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Model, LlamaForCausalLM
from zoo_contract import check_round_trip, prompt

from mmcompress.zoo import _build
from mmcompress.zoo.wheels import part_dir

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((300, 300))


@pytest.fixture(scope="module")
def zoo_mrope():
    return _build("mrope")


@pytest.fixture(scope="module")
def dino():
    return Dinov2Model.from_pretrained(part_dir("dinov2-small-focus")).eval()


class Sigmoid(torch.nn.Module):
    def forward(self, z):
        return z * torch.sigmoid(1.702 * z)


def inputs(processor, picture=PICTURE):
    return processor(images=[picture], text=[prompt(processor, "image")], return_tensors="pt")


@pytest.mark.parametrize("size", [(64, 64), (300, 300), (448, 448), (640, 480), (333, 500), (231, 517), (1000, 334)])
def test_at_least_256_tokens_and_16x16_of_a_square(zoo_mrope, size):
    model, processor = zoo_mrope
    batch = inputs(processor, PICTURE.resize(size))
    grid = batch.image_grid_thw[0].tolist()
    assert int((batch.input_ids == model.config.image_token_id).sum()) == grid[1] * grid[2] >= 256
    assert size[0] != size[1] or grid == [1, 16, 16]


@torch.no_grad()
def test_text_alone_is_smollm2(zoo_mrope):
    model, processor = zoo_mrope
    plain = LlamaForCausalLM.from_pretrained(part_dir("smollm2-135m-instruct"), dtype=torch.float32).eval()
    ids = processor.tokenizer("What is the capital of France? The capital of France is", return_tensors="pt").input_ids
    expected = plain(ids).logits
    got = model(input_ids=ids).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("i", [0, 3, 7])
@torch.no_grad()
def test_a_block_is_dinov2_s(zoo_mrope, dino, i):
    """With zero angles, on a stream as DINOv2 has it: equal with the sigmoid form of GELU, close with GELU itself."""
    model, _ = zoo_mrope
    layer, block = dino.encoder.layer[i], model.model.visual.blocks[i]
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    x = dino(pixels, output_hidden_states=True).hidden_states[i]
    centred = lambda t: t - t.mean(-1, keepdim=True)  # noqa: E731
    zero, bias = torch.zeros(257, 64), block.attn.proj.bias
    if i == 0:  # it also adds what Qwen's patch embedding cannot
        e, kept = dino.embeddings, bias.clone()
        bias -= centred(e.patch_embeddings.projection.bias + e.position_embeddings[0, 1:].mean(0))
    got = block(centred(x)[0], torch.tensor([0, 257]), position_embeddings=(zero + 1, zero))
    if i == 0:
        bias.copy_(kept)
    exact = layer(x)
    gelu, layer.mlp.activation = layer.mlp.activation, Sigmoid()
    sigmoid = layer(x)
    layer.mlp.activation = gelu
    torch.testing.assert_close(got, centred(sigmoid)[0], atol=2e-4, rtol=1e-4)
    change = (centred(exact) - centred(x)).norm()
    assert 0 < (got - centred(exact)[0]).norm() < 0.15 * change


@torch.no_grad()
def test_patches_are_dinov2_s(zoo_mrope, dino):
    model, processor = zoo_mrope
    patches = inputs(processor).pixel_values
    pixels = patches.view(16, 16, 3, 2, 14, 14)[:, :, :, 0].permute(2, 0, 3, 1, 4).reshape(1, 3, 224, 224)
    conv = dino.embeddings.patch_embeddings.projection
    expected = torch.nn.functional.conv2d(pixels, conv.weight, stride=14)[0].flatten(1).T
    expected = expected - expected.mean(-1, keepdim=True)
    torch.testing.assert_close(model.model.visual.patch_embed(patches), expected, atol=1e-4, rtol=1e-4)


def test_a_clip(zoo_mrope):
    model, processor = zoo_mrope
    frames = np.stack([np.asarray(PICTURE.rotate(20 * i)) for i in range(4)])
    batch = processor(
        videos=[frames],
        text=[prompt(processor, "video")],
        return_tensors="pt",
        do_sample_frames=False,
        video_metadata=[{"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3], "duration": 2.0}],
    )
    assert batch.video_grid_thw.tolist() == [[2, 16, 16]]
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_save_and_load_round_trip(zoo_mrope, tmp_path):
    check_round_trip(*zoo_mrope, tmp_path, inputs)
