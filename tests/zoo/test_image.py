import hashlib
import json
import time

import pytest
import torch

from mmcompress.eval.tasks import Box, Detail, Mark, photo_paths
from mmcompress.zoo import _build, load, parts_dir
from mmcompress.zoo.features import encode, layout, token_boxes, token_marks
from mmcompress.zoo.image import PINPOINTS
from mmcompress.zoo.lora import add_lora_, lora_state, merge_lora
from mmcompress.zoo.measure import interval, measure
from mmcompress.zoo.train import Reader


@pytest.fixture(scope="module")
def zoo_image():
    return load("image")


def ask(processor, picture, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=picture, text=text, return_tensors="pt")


def test_a_photo_gives_a_2x2_grid_and_at_least_1280_tokens(zoo_image):
    from PIL import Image

    model, processor = zoo_image
    with Image.open(photo_paths("test")[0]) as photo:
        inputs = ask(processor, photo.convert("RGB").crop((0, 0, 300, 300)), "What is it?")
    assert inputs.pixel_values.shape[1:] == (5, 3, 224, 224)
    assert int((inputs.input_ids == model.config.image_token_id).sum()) == 5 * 256 + 32


@pytest.mark.parametrize("size", [(448, 448), (448, 384), (512, 640), (300, 900), (1000, 300), (231, 517)])
def test_layout_is_the_model_s_own_packing(zoo_image, size):
    model, _ = zoo_image
    order, grid = layout(model.config, size)
    hw = torch.tensor([[size[1], size[0]]])
    rows = torch.arange((1 + grid[0] * grid[1]) * 256, dtype=torch.float64).view(-1, 256, 1)
    packed, _ = model.model.pack_image_features([rows], hw, "default", torch.tensor([-1.0], dtype=torch.float64))
    assert torch.equal(packed[0][:, 0].long(), order)
    assert [grid[0] * 224, grid[1] * 224] in PINPOINTS


def test_tokens_know_which_mark_they_show():
    boxes = token_boxes((448, 448), (2, 2))
    assert boxes[0].tolist() == [0, 0, 28, 28] and boxes[256].tolist() == [0, 0, 14, 14]
    assert boxes[-1].tolist() == [434, 434, 448, 448]
    label = token_marks(boxes, [Mark(Box(14, 28, 42, 42), "digit", ("7",))])
    crops = [i - 256 for i in (label == 0).nonzero()[:, 0].tolist() if i >= 256]
    assert crops == [2 * 16 + 1, 2 * 16 + 2]
    padded = token_boxes((448, 224), (2, 2))  # as wide as the canvas, half as high: 112 rows of padding above
    assert padded[256 + 8 * 16].tolist() == [0, 0, 14, 14]


def test_packed_questions_read_as_the_stock_forward_does(zoo_image, tmp_path):
    model, processor = zoo_image
    picture, marks = Detail("large").scenes("test", 1, 7)[0]
    picture = picture.resize((448, 100))
    scene = encode(model, processor, [(picture, marks)], tmp_path / "x.bin")[0]
    pairs = [q for m in marks for q in m.questions][:2]
    with torch.no_grad():
        packed, right = Reader(model, processor.tokenizer)(scene, pairs, torch.arange(len(scene.order)))
        losses = []
        for (question, answer), ok in zip(pairs, right, strict=True):
            inputs = ask(processor, picture, question)
            said = processor.tokenizer(answer + "<|im_end|>", return_tensors="pt").input_ids
            out = model.generate(**inputs, max_new_tokens=said.shape[1])[:, inputs.input_ids.shape[1] :]
            assert ok == (out.tolist() == said.tolist())
            n = said.shape[1]
            ids = torch.cat([inputs.input_ids, said], 1)
            labels = torch.full_like(ids, -100)
            labels[:, -n:] = said
            extra = {"pixel_values": inputs.pixel_values, "image_sizes": inputs.image_sizes}
            losses.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **extra).loss)
    assert packed.item() == pytest.approx(torch.stack(losses).mean().item(), abs=2e-2)  # features were kept in half precision


def test_answers_better_than_a_blind_model(zoo_image):
    card = json.loads((parts_dir("image") / "card.json").read_text())
    got = measure(*zoo_image, "detail:large", pictures=4)
    assert got["n"] == 24 and got["accuracy"] > card["blind"]["detail:large"]["accuracy"] + 0.1


def test_the_card_describes_these_parts():
    card = json.loads((parts_dir("image") / "card.json").read_text())
    for file, sha256 in card["sha256"].items():
        assert hashlib.sha256((parts_dir("image") / file).read_bytes()).hexdigest() == sha256
    assert {f.name for f in parts_dir("image").glob("*.safetensors")} == set(card["sha256"])
    for task, measured in card["measured"].items():
        low, high = measured["interval"]
        assert low <= measured["accuracy"] <= high and measured["n"] >= (100 if task == "detail:small" else 200)
        unseen = max(card["blind"][task]["accuracy"], card["question_only"][task], card["chance"][task])
        assert low > unseen, f"{task} does not beat a model that cannot see"


def test_save_and_load_round_trip(zoo_image, tmp_path):
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model, processor = zoo_image
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor2 = LlavaNextForConditionalGeneration.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    picture = Detail("large").samples("test", 1)[0].item.resize((448, 200))
    one, two = (
        ask(processor, picture, "What digit is in the picture?"),
        ask(processor2, picture, "What digit is in the picture?"),
    )
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.pixel_values, two.pixel_values)
    with torch.no_grad():
        assert torch.equal(model(**one).logits, again.eval()(**two).logits)


def test_second_load_is_fast():
    began = time.perf_counter()
    load("image")
    assert time.perf_counter() - began < 15


def test_blind_reader_and_untrained_start(zoo_image):
    """Without its parts the model is random on pictures: the shipped parts are what was learned."""
    _, processor = zoo_image
    fresh, _ = _build("image")
    assert measure(fresh, processor, "detail:large", pictures=2, blind=True)["accuracy"] <= 0.25


def test_lora_merges_to_the_same_output():
    base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    state = {f"m.{n}": v.clone() for n, v in base.state_dict().items()}
    layers = add_lora_(base, torch.Generator().manual_seed(0))
    for layer in layers.values():
        layer.b.data.normal_()
    x = torch.randn(3, 6)
    expected = base(x)
    merge_lora(state, lora_state(layers, "m."))
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    plain.load_state_dict({n.removeprefix("m."): v for n, v in state.items()})
    torch.testing.assert_close(plain(x), expected)
    with pytest.raises(ValueError, match="known weights"):
        merge_lora({}, lora_state(layers, "m."))


def test_interval_widens_when_questions_of_a_picture_agree():
    yes, no = (1.0, 1.0), (0.0, 1.0)
    loose, tied = [[yes, no]] * 50, [[yes, yes], [no, no]] * 25
    assert interval(loose) == (0.5, 0.5)
    low, high = interval(tied)
    assert low < 0.4 and high > 0.6
