import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from mmcompress import create
from mmcompress.ask import Question, ask, load_model, prepare
from mmcompress.media import load_audio
from mmcompress.zoo import load
from mmcompress.zoo.wheels import read_ctranslate2

RATE = 16000
READING = Path(__file__).parents[2] / "../shared/data/speech_samples/two_cities.wav"
WORDS = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it was
the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness, it
was the spring of hope, it was the winter of despair, we had everything before us, we had nothing before us, we were
all going direct to Heaven, we were all going direct the other way"""


@pytest.fixture(scope="module")
def zoo_asr():
    return load("asr")


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def test_transcribes_a_clean_reading(zoo_asr):
    if not READING.is_file():
        pytest.skip("needs ../shared/data/speech_samples/two_cities.wav")
    model, processor = zoo_asr
    sound = load_audio(READING, RATE)
    batch = processor(sound[: 30 * RATE], sampling_rate=RATE, return_tensors="pt")
    out = model.generate(**batch)
    assert words(processor.batch_decode(out, skip_special_tokens=True)[0]) == words(WORDS)


def test_hears_1500_tokens(zoo_asr):
    model, processor = zoo_asr
    batch = processor(np.zeros(RATE, np.float32), sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        assert model.model.encoder(batch.input_features).last_hidden_state.shape == (1, 1500, 384)


def test_special_tokens_and_time_stamps(zoo_asr):
    _, processor = zoo_asr
    ids = processor.tokenizer.convert_tokens_to_ids
    assert [ids(t) for t in ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "<|0.00|>", "<|30.00|>")] == [
        50256,
        50257,
        50362,
        50363,
        51863,
    ]
    labels = processor.tokenizer(" Hello there").input_ids
    assert labels[:2] == [50257, 50362] and labels[-1] == 50256
    assert processor.tokenizer.decode(labels, skip_special_tokens=True) == " Hello there"


def test_save_and_load_round_trip(zoo_asr, tmp_path):
    model, processor = zoo_asr
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor2 = load_model(str(tmp_path))
    assert type(again) is WhisperForConditionalGeneration
    sound = np.random.default_rng(0).normal(size=RATE).astype(np.float32)
    one, two = (p(sound, sampling_rate=RATE, return_tensors="pt") for p in (processor, processor2))
    assert torch.equal(one.input_features, two.input_features)
    first, second = (m.generate(**one, max_new_tokens=5, min_new_tokens=5) for m in (model, again))
    assert torch.equal(first, second) and first.shape == (1, 5)


def file(variables, aliases=(), version=6):
    def name(s):
        return struct.pack("<H", len(s) + 1) + s.encode() + b"\0"

    out = struct.pack("<I", version) + name("Spec") + struct.pack("<II", 3, len(variables))
    for n, code, a in variables:
        out += name(n) + struct.pack(f"<B{a.ndim}I", a.ndim, *a.shape) + struct.pack("<BI", code, a.nbytes) + a.tobytes()
    out += struct.pack("<I", len(aliases))
    return out + b"".join(name(a) + name(b) for a, b in aliases)


def test_reads_a_ctranslate2_file(tmp_path):
    path = tmp_path / "model.bin"
    half, scalar, single = np.arange(6, dtype="<f2").reshape(2, 3), np.array(7, "<i2"), np.array([1.5, -2], "<f4")
    whole = file([("a/weight", 4, half), ("n", 2, scalar), ("b", 0, single)], [("again", "b")])
    path.write_bytes(whole)
    got = read_ctranslate2(path)
    assert list(got) == ["a/weight", "n", "b", "again"] and got["n"] == 7 and got["again"] is got["b"]
    np.testing.assert_array_equal(got["a/weight"], half)
    np.testing.assert_array_equal(got["b"], single)
    path.write_bytes(whole + b"xy")
    with pytest.raises(ValueError, match=r"model\.bin must end with its last alias, got 2 more bytes"):
        read_ctranslate2(path)
    path.write_bytes(file([], version=5))
    with pytest.raises(ValueError, match=r"model\.bin must be a CTranslate2 file of version 6, got version 5"):
        read_ctranslate2(path)


def test_half_the_tokens_keep_the_transcript(zoo_asr):
    """`ask` through the seam: 11 s at 750 of 1,500 tokens."""
    if not READING.is_file():
        pytest.skip("needs ../shared/data/speech_samples/two_cities.wav")
    inputs = prepare(*zoo_asr, Question("", audio=[load_audio(READING, RATE)[: 11 * RATE]]))
    assert "prompt_ids" not in inputs
    answer = ask(*zoo_asr, inputs, create("pooling", keep_ratio=0.5), 48)
    said = words(answer.text)
    assert len(said) > 24 and said == words(WORDS)[: len(said)]
    assert (answer.ledger.tokens_in, answer.ledger.tokens_kept) == (1500, 750)


def test_a_prompt_is_what_was_said_before(zoo_asr):
    inputs = prepare(*zoo_asr, Question("Hello there.", audio=[np.zeros(RATE, np.float32)]))
    assert zoo_asr[1].tokenizer.decode(inputs["prompt_ids"]) == "<|startofprev|> Hello there."
    with pytest.raises(ValueError, match="takes one recording a question, got 2"):
        prepare(*zoo_asr, Question("", audio=[np.zeros(RATE, np.float32)] * 2))
    with pytest.raises(ValueError, match="takes audio, got image"):
        prepare(*zoo_asr, Question("", images=[None]))
