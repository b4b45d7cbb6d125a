"""The training of vq_hash on a tiny language model, and a few steps of the script on the zoo's model without its parts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmcompress import create, zoo
from mmcompress.ask import Question, prepare
from mmcompress.eval.loop import weights_of
from mmcompress.eval.tasks import create_task
from mmcompress.eval.tasks.base import Question as Asked
from mmcompress.io import from_pretrained
from mmcompress.models import ADAPTERS
from mmcompress.testing import HIDDEN, tiny_model
from mmcompress.tokens import Layout, Tokens
from mmcompress.train.vq_hash import Rows, accuracy, embedded, main, read, reduced, train
from mmcompress.zoo import _build
from mmcompress.zoo.reader import Reader
from mmcompress.zoo.recipes import sense_of
from mmcompress.zoo.sense import NEWLINE, Seen


class Letters:
    """A processor whose tokens are letters."""

    video_token = "<video>"

    def apply_chat_template(self, messages, **_):
        video, text = messages[0]["content"]
        assert video["type"] == "video"
        return f"u{self.video_token}{text['text']}a"

    def tokenizer(self, text, **_):
        return SimpleNamespace(input_ids=[10 + ord(c) % 80 for c in text])


def clips(n=6, seed=0):
    """Two frames that swap places: what is first, and what is last? A newline stands behind the last frame."""
    g = torch.Generator().manual_seed(seed)
    looks = torch.randn(2, HIDDEN, generator=g)
    out = []
    for i in range(n):
        order = (0, 1) if i % 2 else (1, 0)
        x = looks[torch.tensor(order)].repeat_interleave(64, 0) + 0.1 * torch.randn(128, HIDDEN, generator=g)
        rows = torch.cat([x, torch.ones(1, HIDDEN)])
        place = torch.arange(129)
        at = torch.cat([place[:128], torch.tensor([NEWLINE])])[:, None]
        asked = [Asked("f", "xy"[order[0]], "first"), Asked("l", "xy"[order[1]], "last")]
        out.append(Seen(rows.half(), at, place, 129, torch.zeros(129).bool(), asked))
    return out


@pytest.fixture(scope="module")
def reader():
    model = tiny_model("llava").requires_grad_(False)
    sense = SimpleNamespace(model=model, processor=Letters(), kind="video")
    return Reader(Rows(sense))


def method(**fields):
    return create("vq_hash", mapper=True, width=HIDDEN, place_width=8, num_places=8, **{"num_codes": 6, **fields})


def test_a_clip_behind_the_method():
    seen = clips(1)[0]
    shown = reduced(create("vq_hash", num_codes=6), seen)
    out = create("vq_hash", num_codes=6)(Tokens.of(seen.features[:128].float(), Layout("video", (2, 8, 8))))
    assert torch.equal(shown.features, torch.cat([out.x[0], seen.features[128:].float()]))
    assert shown.position.tolist() == [*out.anchor[0].tolist(), 128] and shown.length == 129
    assert shown.order[-1].tolist() == [NEWLINE] and len(shown.features) == 7
    whole = reduced(create("none"), seen)
    assert torch.equal(whole.features, seen.features.float()) and torch.equal(whole.position, seen.position)


def test_training_lowers_the_loss_and_leaves_the_model(reader, tmp_path):
    before = {k: v.clone() for k, v in reader.model.state_dict().items()}
    learns, seen = method(), clips()
    with torch.no_grad():
        start = sum(read(reader, reduced(learns, s), s.questions)[0].item() for s in seen)
    last = train(learns, reader, seen, tmp_path, steps=40, lr=1e-2)
    with torch.no_grad():
        end = sum(read(reader, reduced(learns, s), s.questions)[0].item() for s in seen)
    assert end < 0.7 * start and last["tokens"] == 6
    assert all(torch.equal(v, before[k]) for k, v in reader.model.state_dict().items())
    assert all(p.grad is None for p in reader.model.parameters())
    again = from_pretrained(tmp_path)
    assert again.config() == learns.config()
    assert torch.equal(reduced(again, seen[0]).features, reduced(learns, seen[0]).features)
    assert not torch.equal(reduced(learns, seen[0]).features, reduced(create("vq_hash", num_codes=6), seen[0]).features)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [25, 40] and {"loss", "right first", "right last"} <= set(lines[-1])
    assert 0 <= accuracy(reader, seen, lambda s: reduced(learns, s)) <= 1


def test_a_resumed_run_is_the_unbroken_one(reader, tmp_path, monkeypatch):
    monkeypatch.setattr("mmcompress.train.vq_hash.SAVE_EVERY", 0)
    whole, first, second = method(), method(), method()
    train(whole, reader, clips(), tmp_path / "whole", steps=4)
    with pytest.raises(KeyboardInterrupt):
        train(first, reader, Interrupted(clips(), after=5), tmp_path / "parts", steps=4)
    assert json.loads((tmp_path / "parts" / "train.json").read_text())["step"] == 2
    train(second, reader, Interrupted(clips(), after=4), tmp_path / "parts", steps=4, resume=True)  # two steps of two clips
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="a run of the same method to resume, got one with another num_codes"):
        train(method(num_codes=5), reader, clips(), tmp_path / "parts", steps=5, resume=True)


class Interrupted(list):
    """Clips that stop the training when they are asked for once too often."""

    def __init__(self, items, after):
        super().__init__(items)
        self.left = after

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(i)


@pytest.fixture(scope="module")
def video():
    return _build("video")


def test_training_reads_what_the_compressed_model_reads(video):
    """The loss behind the method, from embedded rows, is that of the stock forward with the method installed."""
    model, processor = video
    if model.config.model_type not in ADAPTERS:
        pytest.skip(f"mmcompress.models has no adapter for {model.config.model_type} yet")
    task, sense = create_task("video_order"), sense_of("video", model, processor)
    scene = next(task.scenes("test", 1))
    learns = create("vq_hash", mapper=True, width=576, num_codes=8)
    torch.nn.init.normal_(learns.hash_mapper.attention.out_proj.weight, std=0.05)
    asked = scene.questions[0]
    clip = (np.stack([np.asarray(f.convert("RGB")) for f in scene.item]), list(range(len(scene.item))), task.fps)
    inputs = prepare(model, processor, Question(asked.prompt, videos=[clip]))
    said = processor.tokenizer(asked.answer + "<|im_end|>", return_tensors="pt").input_ids
    n = said.shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], said], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        shown = reduced(learns, embedded(sense, sense.see(scene)))
        loss, _ = read(Reader(Rows(sense)), shown, [asked])
        with learns(model) as run:
            logits = model(**inputs).logits[0, -n - 1 : -1]
    assert run.items[0].anchor.tolist() == shown.position[:-1].tolist()
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, said[0]).item(), abs=2e-2)


def test_the_script(video, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "load", lambda *_, **__: video)
    run = ["--out", str(tmp_path), "--scenes", "1", "--test-scenes", "1", "--tasks", "video_event", "--num-codes", "9"]
    run += ["--threads", "1", "--dtype", "float32", "--batch", "1"]
    main([*run, "--steps", "1"])
    main([*run, "--steps", "2", "--resume"])
    record = json.loads((tmp_path / "run.json").read_text())
    assert set(record["accuracy"]) == {"all tokens", "codebook", "trained"} and record["questions"] > 1
    assert record["train"]["tokens"] == 9 and json.loads((tmp_path / "train.json").read_text())["step"] == 2
    learned = from_pretrained(tmp_path)
    assert learned.num_codes == 9 and learned.hash_mapper.attention.out_proj.weight.abs().max() > 0
    assert "method written to" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*run, "--steps", "0"])


def test_what_ships_was_trained_for_the_video_model_that_ships():
    method, model = from_pretrained("zoo:vq_hash"), zoo.load("video")[0]
    record = json.loads((zoo.parts_dir("video").parent / "vq_hash" / "run.json").read_text())
    assert record["model"]["weights"] == weights_of(model) and method.mapper
    assert method.hash_mapper.attention.out_proj.weight.abs().max() > 0
    assert record["accuracy"]["trained"] > record["accuracy"]["codebook"]
