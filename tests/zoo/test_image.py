"""The zoo's image model with its trained parts: tokens, card, saving, and that it sees."""

import hashlib

import pytest
import torch
from zoo_contract import check_round_trip, prompt

from mmcompress.eval.tasks import create_task, photo_paths
from mmcompress.zoo import _build, card_file, card_of, load, parts_dir
from mmcompress.zoo.measure import measure
from mmcompress.zoo.recipes import RECIPES, TASKS


@pytest.fixture(scope="module")
def zoo_image():
    return load("image")


def ask(processor, picture, question="What digit is in the picture?"):
    return processor(images=picture, text=prompt(processor, "image", question), return_tensors="pt")


def test_a_photo_gives_a_2x2_grid_and_at_least_1280_tokens(zoo_image):
    from PIL import Image

    model, processor = zoo_image
    with Image.open(photo_paths("test")[0]) as photo:
        inputs = ask(processor, photo.convert("RGB").crop((0, 0, 300, 300)))
    assert inputs.pixel_values.shape[1:] == (5, 3, 224, 224)
    assert int((inputs.input_ids == model.config.image_token_id).sum()) == 5 * 256 + 32


def test_answers_better_than_a_blind_model(zoo_image):
    got = measure("image", *zoo_image, "detail:large", 24)
    assert got["n"] == 24 and got["accuracy"] > card_of("image")["blind"]["detail:large"]["accuracy"] + 0.2


def test_untrained_it_is_blind(zoo_image):
    """Without its parts the model sees nothing in a picture: the shipped parts are what was learned."""
    _, processor = zoo_image
    fresh, _ = _build("image")
    assert measure("image", fresh, processor, "detail:large", 8)["accuracy"] <= 0.25


def trained():
    return [n for n in TASKS if card_file(n).is_file()]


@pytest.mark.parametrize("name", trained())
def test_the_card_describes_these_parts(name):
    card, folder = card_of(name), parts_dir(name)
    for file, sha256 in card["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == sha256
    assert {f.name for f in folder.glob("*.safetensors")} == set(card["sha256"])
    assert set(card["measured"]) == set(TASKS[name])
    for task, measured in card["measured"].items():
        low, high = measured["interval"]
        assert low <= measured["accuracy"] <= high
        if name in RECIPES:
            unseen = max(card["blind"][task]["accuracy"], card["chance"][task])
            assert (low <= unseen) == (task in card["not_learned"]), task
    assert len(card["not_learned"]) < len(card["measured"])


def test_the_parts_of_all_models_are_small():
    files = list(parts_dir("image").parent.glob("*/*.safetensors"))
    assert {f.parent.name for f in files} >= {"image", "video", "audio", "vq_hash"}
    assert sum(f.stat().st_size for f in files) <= 40e6


def test_save_and_load_round_trip(zoo_image, tmp_path):
    model, processor = zoo_image
    picture = create_task("detail:large").samples("test", 1)[0].item.resize((448, 200))
    check_round_trip(model, processor, tmp_path, lambda p: ask(p, picture))
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
