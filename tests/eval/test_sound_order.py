"""An oracle that listens to the waveform finds the sounds, names them, and answers every question of `sound_order`."""

import itertools

import numpy as np
import pytest

from mmcompress.eval.tasks import SPLITS, SoundOrder
from mmcompress.eval.tasks.sound import SOUNDS, sound_of

FRAME = 320  # 20 ms


def heard(wave):
    """(name, start, end) of every stretch that is louder than the background, named by its spectrum."""
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    loud = np.sqrt((frames**2).mean(1)) > 0.03
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loud, [0]]).astype(int))).reshape(-1, 2)
    return [(name_of(frames[a:b]), a * FRAME / 16000, b * FRAME / 16000) for a, b in edges]


def name_of(frames):
    power = np.abs(np.fft.rfft(frames * np.hanning(FRAME), 4096)) ** 2
    if power.max(1).mean() / power.sum(1).mean() < 0.02:
        return "noise"
    pitch = power.argmax(1) * 16000 / 4096
    start, end = np.median(pitch[1:4]), np.median(pitch[-4:-1])
    if max(start, end) / min(start, end) > 1.5:
        return "rising sweep" if end > start else "falling sweep"
    return "high tone" if start > 600 else "low tone"


@pytest.mark.parametrize("split", SPLITS)
def test_the_waveform_gives_every_answer(split):
    asked = set()
    for scene in SoundOrder().scenes(split, 80, 4):
        assert scene.item.dtype == np.float32 and scene.item.shape == (64000,) and np.abs(scene.item).max() <= 1
        sounds = heard(scene.item)
        names = [n for n, _, _ in sounds]
        assert [tuple(n.split()) for n in names] == [m.words for m in scene.marks]
        for (_, start, end), mark in zip(sounds, scene.marks, strict=True):
            assert abs(start - mark.seconds[0]) < 0.05 and abs(end - mark.seconds[1]) < 0.05
        for q in scene.questions:
            asked.add(q.topic)
            if q.topic in ("first", "last"):
                answer = names[0 if q.topic == "first" else -1]
            elif q.topic == "after":
                answer = names[1 + names.index(q.prompt.removeprefix("What sound comes after the ").removesuffix("?"))]
            elif q.topic == "count":
                answer = str(len(names))
            else:
                answer = "higher" if names.index("low tone") < names.index("high tone") else "lower"
            assert answer in q.answers and q.answer in q.answers
            assert {e.seconds for e in q.evidence} <= {m.seconds for m in scene.marks}
            assert len(q.evidence) == {"after": 2, "pitch": 2, "count": len(names)}.get(q.topic, 1)
    assert asked == {"first", "last", "after", "count", "pitch"}


def test_splits_share_no_frequency():
    pitches = {}
    for split in SPLITS:
        rng, found = np.random.default_rng(0), set()
        for _ in range(200):
            wave = sound_of(rng, "low tone", 16000, split)
            found.add(round(np.abs(np.fft.rfft(wave, 64000)).argmax() / 4, 2))
        pitches[split] = found
    assert not pitches["train"] & pitches["test"] and len(pitches["train"]) == 30 and len(pitches["test"]) == 10


def test_sounds_keep_apart():
    for scene in SoundOrder().scenes("train", 40, 1):
        spans = [m.seconds for m in scene.marks]
        assert all(b[0] - a[1] > 0.149 for a, b in itertools.pairwise(spans))
        assert len({m.words for m in scene.marks}) == len(spans) and all(" ".join(m.words) in SOUNDS for m in scene.marks)
