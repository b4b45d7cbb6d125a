import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from zoo_contract import check_round_trip, prompt

from mmcompress.zoo import _build, load, parts_dir

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 16, 3), dtype=np.uint8)).resize((640, 300))


@pytest.fixture(scope="module")
def zoo_single():
    return load("image-single")


def inputs(processor):
    return processor(images=PICTURE, text=prompt(processor, "image"), return_tensors="pt")


def test_one_view_of_256_tokens_as_the_anyres_thumbnail(zoo_single):
    model, processor = zoo_single
    batch = inputs(processor)
    assert int((batch.input_ids == model.config.image_token_id).sum()) == 256
    anyres = _build("image")[1](images=PICTURE, text=prompt(processor, "image"), return_tensors="pt")
    assert torch.equal(batch.pixel_values[0], anyres.pixel_values[0, 0])


def test_the_trained_parts_are_those_of_image(zoo_single):
    model, _ = zoo_single
    assert parts_dir("image-single") == parts_dir("image")
    trained = load_file(parts_dir("image") / "projector.safetensors")["model.multi_modal_projector.linear_2.weight"]
    assert torch.equal(model.model.multi_modal_projector.linear_2.weight, trained.float())


def test_save_and_load_round_trip(zoo_single, tmp_path):
    check_round_trip(*zoo_single, tmp_path, inputs)
