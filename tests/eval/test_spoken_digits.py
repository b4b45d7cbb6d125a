"""Which recordings a split plays, found again in the waveform."""

import functools
from math import gcd
from pathlib import Path

import numpy as np
import pytest

from mmcompress.eval.tasks import SpokenDigits
from mmcompress.eval.tasks.digits import HELD_OUT, KNOWN, UNSEEN

FOLDER = Path(__file__).parents[3] / "shared/data/fsdd/recordings"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/data/fsdd")


@functools.cache
def original(path):
    """The file at 16 kHz, by another reader and another resampler than the task's."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    rate, wave = wavfile.read(path)
    return resample_poly(wave.astype(float), 16000 // gcd(16000, rate), rate // gcd(16000, rate))


@pytest.mark.parametrize("speakers", ["known", "unseen"])
def test_the_waveform_is_a_recording_of_the_answer(speakers):
    task = SpokenDigits(speakers)
    belong = [p for p in FOLDER.glob("*.wav") if p.stem.split("_")[1] in (KNOWN if speakers == "known" else (UNSEEN,))]
    if speakers == "known":
        belong = [p for p in belong if int(p.stem.split("_")[2]) < HELD_OUT]
    assert task.length("test") == len(belong) == (150 if speakers == "known" else 500)
    for sample in task.samples("test", 5, 3):
        start, end = (round(t * 16000) for t in sample.evidence[0].seconds)
        spoken = sample.item[start:end]
        likeness = {}
        for path in belong:
            wave = original(path)
            if abs(len(wave) - len(spoken)) < 8:
                n = min(len(wave), len(spoken))
                likeness[path.name] = np.corrcoef(wave[:n], spoken[:n])[0, 1]
        best = max(likeness, key=likeness.get)
        assert likeness[best] > 0.95 and best[0] in sample.answers and len(sample.answers) == 2
        outside = np.concatenate([sample.item[:start], sample.item[end:]])
        assert outside.std() < 0.01 < spoken.std() and len(sample.item) == 64000


def test_every_test_recording_is_played_once_and_training_goes_on():
    task = SpokenDigits()
    samples = task.samples("test", 1000)
    assert len(samples) == 150 and all(sum(str(d) in s.answers for s in samples) == 15 for d in range(10))
    assert len(task.samples("train", 160)) == 160


def test_no_training_recording_is_tested():
    train, known = (set(SpokenDigits()._paths(split)) for split in ("train", "test"))
    again, unseen = (set(SpokenDigits("unseen")._paths(split)) for split in ("train", "test"))
    assert train == again and len(train) == 1350 and not train & known and not train & unseen
    assert {p.stem.split("_")[1] for p in train} == set(KNOWN) and {p.stem.split("_")[1] for p in unseen} == {UNSEEN}
