"""Generated sounds in soft noise: which comes first or last, what comes after what, how many, is the second tone higher."""

from __future__ import annotations

import numpy as np

from mmcompress.eval.tasks.base import SPLITS, Box, Evidence, Mark, Question, Scene, Task, rng_of

RATE = 16000
SECONDS = 4.0
SOUNDS = {  # name -> ranges of the frequency at its start and at its end, Hz; noise has none
    "low tone": ((180, 320), None),
    "high tone": ((1000, 1800), None),
    "noise": (None, None),
    "rising sweep": ((250, 450), (1500, 2400)),
    "falling sweep": ((1500, 2400), (250, 450)),
}
COUNTS = {2: "two", 3: "three", 4: "four"}
_LENGTH, _GAP, _RAMP = (0.35, 0.6), 0.15, 0.02  # seconds


class SoundOrder(Task):
    """Four seconds at 16 kHz with two to four different sounds: low tone, high tone, noise, rising sweep, falling sweep.

    Answers are the first word of a name. A sound lasts 0.35 to 0.6 s; 0.15 s or more lie between two. The splits share no
    frequency.
    """

    name = "sound_order"
    kind = "audio"
    sampling_rate = RATE
    # first, last, after (not the one that the question names), count; pitch where both tones are, in a third of the recordings
    chance = (2 / len(SOUNDS) + 1 / (len(SOUNDS) - 1) + 1 / len(COUNTS) + 1 / 3 * 1 / 2) / (4 + 1 / 3)

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A recording with a question each of first, last, after and count, and of pitch where it holds both tones."""
        rng = rng_of(seed, SPLITS.index(split), 9, index)
        names = [str(n) for n in rng.choice(list(SOUNDS), int(rng.choice(list(COUNTS))), replace=False)]
        lengths = rng.uniform(*_LENGTH, len(names))
        free = SECONDS - lengths.sum() - _GAP * (len(names) + 1)
        pauses = _GAP + free * rng.dirichlet(np.ones(len(names) + 1))
        wave = rng.normal(0, rng.uniform(0.001, 0.006), round(SECONDS * RATE))
        seen, end = [], 0.0
        for name, length, pause in zip(names, lengths, pauses, strict=False):
            start = round((end + pause) * RATE)
            sound = sound_of(rng, name, round(length * RATE), split)
            wave[start : start + len(sound)] += sound
            end = (start + len(sound)) / RATE
            seen.append(Evidence(seconds=(start / RATE, end)))
        marks = [Mark(Box(0, 0, 0, 0), "sound", tuple(n.split()), 0, e.seconds) for n, e in zip(names, seen, strict=True)]
        return Scene(wave.astype(np.float32), _questions(rng, names, seen), marks)


def sound_of(rng: np.random.Generator, name: str, samples: int, split: str) -> np.ndarray:
    """A sound of this name as `samples` values, its loudness and pitch drawn."""
    first, last = SOUNDS[name]
    if first is None:
        wave = rng.normal(0, 0.35, samples)
    else:
        a = _frequency(rng, first, split)
        b = a if last is None else _frequency(rng, last, split)
        phase = 2 * np.pi * np.cumsum(np.geomspace(a, b, samples)) / RATE
        wave = np.sin(phase) + rng.uniform(0, 0.2) * np.sin(2 * phase)
    ramp = np.minimum(np.arange(samples), np.arange(samples)[::-1]) / (_RAMP * RATE)
    return wave * np.minimum(ramp, 1) * rng.uniform(0.15, 0.5)


def _frequency(rng: np.random.Generator, span: tuple[int, int], split: str) -> float:
    """One of 40 frequencies of a range; every fourth belongs to the test split, the others to train."""
    steps = np.geomspace(*span, 40)
    mine = steps[::4] if split == "test" else np.delete(steps, np.s_[::4])
    return float(rng.choice(mine))


def _questions(rng: np.random.Generator, names: list[str], seen: list[Evidence]) -> list[Question]:
    def said(name: str) -> tuple[str, frozenset[str]]:
        return name.split()[0], frozenset({name.split()[0], name})

    out = []
    for topic, i in (("first", 0), ("last", len(names) - 1)):
        answer, answers = said(names[i])
        out.append(Question(f"What sound comes {topic}?", answer, topic, (seen[i],), answers))
    i = int(rng.integers(len(names) - 1))
    answer, answers = said(names[i + 1])
    out.append(Question(f"What sound comes after the {names[i]}?", answer, "after", (seen[i + 1], seen[i]), answers))
    count = len(names)
    counts = frozenset({str(count), COUNTS[count]})
    out.append(Question("How many sounds are there?", str(count), "count", tuple(seen), counts))
    tones = [i for i, n in enumerate(names) if n.endswith("tone")]
    if len(tones) == 2:
        answer = "higher" if names[tones[1]] == "high tone" else "lower"
        evidence = tuple(seen[i] for i in tones)
        out.append(Question("Is the second tone higher or lower than the first?", answer, "pitch", evidence))
    return out
