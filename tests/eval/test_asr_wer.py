import wave
from pathlib import Path

import numpy as np
import pytest

from mmcompress.eval.tasks import AsrWer, create_task
from mmcompress.eval.tasks.asr import SENTENCES

FOLDER = Path(__file__).parents[3] / "shared/data/speech_samples"


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/data/speech_samples")
def test_the_reading_is_cut_in_its_pauses_and_as_long_as_its_words():
    samples = AsrWer().samples("test", 10)
    assert len(samples) == 3 and sum(len(s.item) for s in samples) == pytest.approx(44.37 * 16000, abs=16)
    words = [len(next(iter(s.answers)).split()) for s in samples]
    assert sum(words) == 119
    for sample, n in zip(samples, words, strict=True):
        seconds = len(sample.item) / 16000
        assert seconds < 30 and 1.8 < n / seconds < 3.5  # words a second
        loud = np.sqrt((sample.item**2).mean())
        if sample is not samples[-1]:
            assert np.abs(sample.item[-800:]).mean() < loud / 5  # nobody speaks at a cut


def test_score_is_one_minus_the_share_of_wrong_words():
    pytest.importorskip("jiwer")
    task = AsrWer()
    sample = create_task("asr_wer:reading").samples("test", 1)[0] if FOLDER.is_dir() else None
    if sample is None:
        pytest.skip("needs ../shared/data/speech_samples")
    sample.answers = frozenset({"It was the best of times"})
    assert task.score(sample, " it WAS the best, of times.") == 1
    assert task.score(sample, "it was the rest of times") == pytest.approx(5 / 6)
    assert task.score(sample, "was the best of times") == pytest.approx(5 / 6)
    assert task.score(sample, "") == 0 and task.score(sample, "a b c d e f g h i j k l m n") == 0


def test_generated_speech_comes_from_the_program(tmp_path, monkeypatch):
    """A stand-in for espeak-ng that writes one second at 22,050 Hz and notes what it was told."""
    tone = tmp_path / "tone.wav"
    with wave.open(str(tone), "wb") as file:
        file.setparams((1, 2, 22050, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(np.arange(22050) / 10)).astype("<i2").tobytes())
    program = tmp_path / "espeak-ng"
    program.write_text(f'#!/bin/sh\ncp {tone} "$2"\necho "$@" >> {tmp_path}/said\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    samples = AsrWer("generated").samples("test", 20, 1)
    assert sorted(next(iter(s.answers)) for s in samples) == sorted(SENTENCES)
    assert all(s.item.shape == (16000,) and 0.2 < np.abs(s.item).max() < 0.3 for s in samples)
    said = (tmp_path / "said").read_text().splitlines()
    assert all(line.endswith(next(iter(s.answers))) for line, s in zip(said, samples, strict=True))


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"two_cities\.wav"):
        AsrWer(data=tmp_path).samples("test", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="espeak-ng"):
        AsrWer("generated").samples("test", 1)
    with pytest.raises(ValueError, match="speech must be one of"):
        AsrWer("sung")
    with pytest.raises(ValueError, match="nothing is trained"):
        AsrWer().samples("train", 1)
