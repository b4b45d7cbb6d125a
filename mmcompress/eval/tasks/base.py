"""What a task is: items with questions whose answers, and whose evidence where it is known, are given.

A `Scene` is one item (a picture, a clip, a recording) with all its questions; a `Sample` is one of them. Everything is
deterministic: scene i follows from (task, split, seed, i) alone, and train and test share no item.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SPLITS = ("train", "test")
KINDS = ("image", "video", "audio")


class Box(NamedTuple):
    """A rectangle in pixels of the picture or frame: left and top inside, right and bottom just outside."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Evidence:
    """Where an answer can be seen or heard; None means everywhere.

    box: pixels. frames: (first, last + 1) of a clip's frames. seconds: (start, end) of a recording.
    """

    box: Box | None = None
    frames: tuple[int, int] | None = None
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Question:
    """A prompt, the answer that a model is trained to give, all answers that count, what the question is about, and where
    its answer shows."""

    prompt: str
    answer: str
    topic: str = ""
    evidence: tuple[Evidence, ...] = ()
    answers: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.answers:
            object.__setattr__(self, "answers", frozenset({self.answer}))


@dataclass
class Mark:
    """Something that was painted on a picture or frame, or mixed into a recording.

    box: its region; empty for a sound. kind: "shape", "word", "digit" …; words: what says it ("red", "star"). frame: of a clip.
    seconds: (start, end) of a sound.
    """

    box: Box
    kind: str
    words: tuple[str, ...]
    frame: int = 0
    seconds: tuple[float, float] | None = None


@dataclass
class Scene:
    """An item with all its questions.

    item: a PIL picture, a list of them (the frames of a clip, one size), or a mono float32 waveform at the task's
    `sampling_rate`. marks: what was painted on it.
    """

    item: Any
    questions: list[Question]
    marks: list[Mark] = field(default_factory=list)


@dataclass
class Sample:
    """One question about one item. Samples of one scene hold the very same item."""

    item: Any
    prompt: str
    answers: frozenset[str]
    evidence: tuple[Evidence, ...] = ()
    topic: str = ""


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


class Task:
    """A task: `scenes` and `samples` of a split, `score`, and the accuracy of a guess (`chance`, in 0..1).

    kind: "image", "video" or "audio". fps: frames per second of a clip. needs: what must be there besides the package, for
    tasks on data that does not come from PyPI. setting: the argument that `create_task` takes after a colon.
    """

    name: str = ""
    setting: str = ""
    needs: str = ""
    kind: str = "image"
    chance: float = 0.0
    fps: float = 2.0
    sampling_rate: int = 16000

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """Scene number `index`."""
        raise NotImplementedError(f"{type(self).__name__} must define scene(split, seed, index)")

    def length(self, split: str) -> int | None:
        """How many scenes a split has; None: as many as wanted."""
        return None

    def scenes(self, split: str, n: int, seed: int = 0, start: int = 0) -> Iterator[Scene]:
        """n scenes from number `start` on (fewer where the split ends), made one by one. Raises ValueError for an unknown
        split or n < 1."""
        check(split, n)
        length = self.length(split)
        end = start + n if length is None else min(start + n, length)
        return (self.scene(split, seed, i) for i in range(start, end))

    def samples(self, split: str, n: int, seed: int = 0) -> list[Sample]:
        """n questions (fewer where the split ends), all of a scene before those of the next."""
        check(split, n)
        out: list[Sample] = []
        for scene in self.scenes(split, n, seed):
            out += [Sample(scene.item, q.prompt, q.answers, q.evidence, q.topic) for q in scene.questions]
            if len(out) >= n:
                break
        return out[:n]

    def score(self, sample: Sample, text: str) -> float:
        """How right a reply is, in 0..1: True if it is an answer, or begins with one as a word of its own."""
        words = normalise(text).split()
        return any(words[: len(a.split())] == a.split() for a in map(normalise, sample.answers))


def check(split: str, n: int) -> None:
    """Raise ValueError for an unknown split or a count below 1."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be an integer of at least 1, got {n!r}")


def folder_of(task: Task, name: str, data: str | Path | None, part: str) -> Path:
    """The folder of a data set: `data` if given, else ../shared/data/name seen from the repository or the current directory.

    Raises FileNotFoundError where `part` (a path in it) is absent.
    """
    roots = [Path(__file__).resolve().parents[4], Path.cwd().parent]
    folders = [Path(data)] if data is not None else [root / "shared" / "data" / name for root in roots]
    for folder in folders:
        if (folder / part).exists():
            return folder
    raise FileNotFoundError(f"the task {task.name} needs {task.needs}; not found: {folders[0] / part}")


def rng_of(*key: int) -> np.random.Generator:
    """A generator that follows from the key alone."""
    return np.random.default_rng(list(key))
