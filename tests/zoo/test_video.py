import numpy as np
import pytest
import torch
from PIL import Image
from zoo_contract import check_round_trip, prompt

from mmcompress import create, zoo
from mmcompress.ask import Question, prepare
from mmcompress.zoo import _build
from mmcompress.zoo.video import NUM_FRAMES

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 16, 3), dtype=np.uint8)).resize((320, 180))
FRAMES = [PICTURE.rotate(20 * i) for i in range(NUM_FRAMES)]


@pytest.fixture(scope="module")
def zoo_video():
    return _build("video")


def inputs(processor, frames=FRAMES):
    return processor(videos=[frames], text=prompt(processor, "video"), return_tensors="pt")


def test_eight_frames_of_64_tokens_and_a_newline(zoo_video):
    model, processor = zoo_video
    batch = inputs(processor)
    assert batch.pixel_values_videos.shape == (1, 8, 3, 224, 224)
    assert int((batch.input_ids == model.config.video_token_id).sum()) == 8 * 64 + 1
    array = np.stack([np.asarray(f) for f in FRAMES])
    for frames in (array, torch.from_numpy(array).permute(0, 3, 1, 2)):
        assert torch.equal(inputs(processor, frames).pixel_values_videos, batch.pixel_values_videos)


def test_a_token_is_the_mean_of_its_four_patches(zoo_video):
    model, processor = zoo_video
    pixels = inputs(processor).pixel_values_videos
    with torch.no_grad():
        tokens = model.model.get_video_features(
            pixels,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        ).pooler_output
        states = model.model.vision_tower(pixels[0, 2:3], output_hidden_states=True).hidden_states
        patches = torch.cat([states[i][0, 1:] for i in (2, 4, 6, 8, 10, 12)], -1)
        fine = model.model.multi_modal_projector(patches).view(16, 16, -1)
    torch.testing.assert_close(tokens[0].view(8, 8, 8, -1)[2, 3, 5], fine[6:8, 10:12].mean((0, 1)), atol=1e-5, rtol=1e-4)


def test_a_picture_becomes_anyres_crops(zoo_video):
    model, processor = zoo_video
    batch = processor(images=PICTURE.resize((448, 448)), text=prompt(processor, "image"), return_tensors="pt")
    assert int((batch.input_ids == model.config.image_token_id).sum()) == 5 * 256 + 32
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_save_and_load_round_trip(zoo_video, tmp_path):
    check_round_trip(*zoo_video, tmp_path, inputs)


def test_a_model_without_its_parts_says_to_train_it(monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "parts_dir", lambda name: tmp_path)
    with pytest.raises(ValueError, match=r"got 'video': python -m mmcompress\.zoo\.train video"):
        zoo.load("video")


def test_a_question_about_a_clip(zoo_video):
    model, processor = zoo_video
    clip = np.stack([np.asarray(f) for f in FRAMES]), list(range(0, 80, 10)), 25.0
    batch = prepare(model, processor, Question("What is it?", videos=[clip]))
    assert torch.equal(batch["pixel_values_videos"], inputs(processor).pixel_values_videos)
    with torch.no_grad(), create("vidcom2", keep_ratio=0.25)(model) as run:
        model(**batch)
    assert (run.ledger.tokens_in, run.ledger.tokens_kept, run.ledger.separators) == (512, 128, 1)
