"""Spoken digits (Free Spoken Digit Dataset, CC BY-SA 4.0): held-out recordings of known speakers, or an unseen speaker."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from mmcompress.eval.tasks.base import SPLITS, Box, Evidence, Mark, Question, Scene, Task, folder_of, rng_of
from mmcompress.media import load_audio

RATE = 16000
SECONDS = 4.0
KNOWN = ("george", "jackson", "nicolas")
UNSEEN = "lucas"
HELD_OUT = 5  # recordings 0 to 4 of each digit and known speaker are never trained on
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class SpokenDigits(Task):
    """One spoken digit somewhere in four seconds of soft noise, 16 kHz; in the train split up to 12 % slower or faster.

    speakers: who speaks in the test split, "known" (held-out recordings of the three training speakers) or "unseen" (a fourth
    speaker). The train split is the same for both. data: the folder fsdd; FileNotFoundError where it is absent.
    """

    name = "spoken_digits"
    kind = "audio"
    setting = "speakers"
    sampling_rate = RATE
    chance = 1 / len(NAMES)
    needs = "the Free Spoken Digit Dataset as ../shared/data/fsdd (or data=), and mmcompress[audio]"

    def __init__(self, speakers: str = "known", data: str | Path | None = None) -> None:
        if speakers not in ("known", "unseen"):
            raise ValueError(f"speakers must be one of ['known', 'unseen'], got {speakers!r}")
        self.speakers, self.data = speakers, data

    def length(self, split: str) -> int | None:
        """Every test recording once; as many as wanted of the train split."""
        return None if split == "train" else len(self._paths(split))

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A recording with the one question which digit is spoken."""
        paths = self._paths(split)
        if split == "train":
            path = paths[int(rng_of(seed, 0, 10, index).integers(len(paths)))]
        else:
            path = paths[rng_of(seed, 1, 10).permutation(len(paths))[index]]
        rng = rng_of(seed, SPLITS.index(split), 11, index)
        spoken = recording(path)
        if split == "train":
            spoken = np.interp(np.arange(0, len(spoken) - 1, rng.uniform(0.88, 1.12)), np.arange(len(spoken)), spoken)
        spoken = spoken[: round(SECONDS * RATE)]
        start = int(rng.integers(round(SECONDS * RATE) - len(spoken) + 1))
        wave = rng.normal(0, rng.uniform(0.0005, 0.004), round(SECONDS * RATE))
        wave[start : start + len(spoken)] += spoken * rng.uniform(0.3, 0.9) / np.abs(spoken).max()
        digit = path.name[0]
        span = (start / RATE, (start + len(spoken)) / RATE)
        answers = frozenset({digit, NAMES[int(digit)]})
        question = Question("What digit is spoken?", digit, "digit", (Evidence(seconds=span),), answers)
        return Scene(wave.astype(np.float32), [question], [Mark(Box(0, 0, 0, 0), "digit", (digit,), 0, span)])

    def _paths(self, split: str) -> list[Path]:
        folder = folder_of(self, "fsdd", self.data, "recordings/0_george_0.wav") / "recordings"
        return _paths(folder, split, self.speakers)


@functools.lru_cache(maxsize=8)
def _paths(folder: Path, split: str, speakers: str) -> list[Path]:
    """{digit}_{speaker}_{index}.wav of a split, sorted by name."""

    def belongs(path: Path) -> bool:
        _, speaker, index = path.stem.split("_")
        if split == "test" and speakers == "unseen":
            return speaker == UNSEEN
        return speaker in KNOWN and (int(index) < HELD_OUT) == (split == "test")

    return [p for p in sorted(folder.glob("*.wav")) if belongs(p)]


@functools.lru_cache(maxsize=4096)
def recording(path: Path) -> np.ndarray:
    """Mono sound of a file at 16 kHz, float32."""
    return load_audio(path, RATE)
