"""Clips: a slideshow (what comes first, last, after what) and a moving shape while another appears for one frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mmcompress.eval.tasks.base import SPLITS, Box, Evidence, Mark, Question, Scene, Task, rng_of
from mmcompress.eval.tasks.draw import COLOURS, SHAPES, WORDS, background, photo_paths, place, tile_of

SIDE = 224  # pixels of a frame
FRAMES = 8
SHOTS = 4
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_WORD_CLIPS = 1 / 4  # share of slideshows that show words


class VideoOrder(Task):
    """Eight frames of 224x224, two of each of four shots: a photograph with one big mark.

    The marks are shapes, in a quarter of the clips words; no two are alike.
    photos: a folder whose pictures replace the packaged photographs.
    """

    name = "video_order"
    kind = "video"
    # first, last; after (not the one that the question names); before or after (twice)
    chance = (
        (1 - _WORD_CLIPS) * (2 / len(SHAPES) + 1 / (len(SHAPES) - 1))
        + _WORD_CLIPS * (2 / len(WORDS) + 1 / (len(WORDS) - 1))
        + 2 / 2
    ) / 5

    def __init__(self, photos: str | Path | None = None) -> None:
        self.photos = photos

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A clip with five questions, one each of first, last and after, two of before_after."""
        rng = rng_of(seed, SPLITS.index(split), 7, index)
        paths = photo_paths(split, self.photos)
        order = rng.permutation(len(paths))
        kind = "word" if rng.random() < _WORD_CLIPS else "shape"
        names = [str(n) for n in rng.choice(WORDS if kind == "word" else SHAPES, SHOTS, replace=False)]
        colours = [str(c) for c in rng.choice(list(COLOURS), SHOTS, replace=False)]
        frames, marks, seen = [], [], []
        for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
            words = (name,) if kind == "word" else (colour, name)
            tile = tile_of(rng, kind, words, int(rng.integers(44, 56) if kind == "word" else rng.integers(90, 140)))
            shot = background(rng, [paths[order[i % len(paths)]]], SIDE, SIDE)
            left, top = (int(rng.integers(4, SIDE - t - 3)) for t in tile.size)
            box = Box(left, top, left + tile.width, top + tile.height)
            shot.paste(tile, box[:2], tile)
            each = FRAMES // SHOTS
            seen.append(Evidence(box, (each * i, each * (i + 1))))
            for frame in range(each * i, each * (i + 1)):
                frames.append(shot.copy())
                marks.append(Mark(box, kind, words, frame))
        return Scene(frames, _order_questions(rng, kind, names, seen), marks)


def _order_questions(rng: np.random.Generator, kind: str, names: list[str], seen: list[Evidence]) -> list[Question]:
    said = [n if kind == "word" else f"the {n}" for n in names]
    i = int(rng.integers(SHOTS - 1))
    out = [
        Question(f"What {kind} comes first?", names[0], "first", (seen[0],)),
        Question(f"What {kind} comes last?", names[-1], "last", (seen[-1],)),
        Question(f"What {kind} comes after {said[i]}?", names[i + 1], "after", (seen[i + 1], seen[i])),
    ]
    for _ in range(2):
        a, b = (int(k) for k in rng.choice(SHOTS, 2, replace=False))
        answer = "before" if a < b else "after"
        out.append(Question(f"Does {said[a]} come before or after {said[b]}?", answer, "before_after", (seen[a], seen[b])))
    return out


class VideoEvent(Task):
    """Eight frames of 224x224 of a camera that pans over a photograph: one shape moves, another appears in one frame only.

    It appears in one of the first three frames ("early") or of the last three ("late"); the two differ in shape and colour.
    photos: a folder whose pictures replace the packaged photographs.
    """

    name = "video_event"
    kind = "video"
    chance = (1 / len(MOVES) + 2 / len(SHAPES) + 1 / len(COLOURS) + 1 / 2) / 5

    def __init__(self, photos: str | Path | None = None) -> None:
        self.photos = photos

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A clip with five questions: direction and moving about the one shape, flash (twice) and when about the other."""
        rng = rng_of(seed, SPLITS.index(split), 8, index)
        frames = _pan(rng, photo_paths(split, self.photos))
        shapes = [str(s) for s in rng.choice(SHAPES, 2, replace=False)]
        colours = [str(c) for c in rng.choice(list(COLOURS), 2, replace=False)]
        moving, brief = (tile_of(rng, "shape", words, int(rng.integers(56, 76))) for words in zip(colours, shapes, strict=True))
        direction = list(MOVES)[int(rng.integers(len(MOVES)))]
        marks = [
            Mark(box, "shape", (colours[0], shapes[0]), i) for i, box in enumerate(_path(rng, MOVES[direction], moving.width))
        ]
        late = bool(rng.random() < 0.5)
        at = int(rng.integers(3)) + (FRAMES - 3) * late
        flash = place(rng, brief.size, (SIDE, SIDE), [marks[at].box], 1000)
        if flash is None:
            raise RuntimeError(f"no free place for a shape of {brief.size} pixels")
        for frame, mark in zip(frames, marks, strict=True):
            frame.paste(moving, mark.box[:2], moving)
        frames[at].paste(brief, flash[:2], brief)
        track = tuple(Evidence(m.box, (m.frame, m.frame + 1)) for m in marks)
        once = (Evidence(flash, (at, at + 1)),)
        questions = [
            Question(f"Which way does the {shapes[0]} move?", direction, "direction", track),
            Question("What shape moves?", shapes[0], "moving", track),
            Question("What shape appears for a moment?", shapes[1], "flash", once),
            Question("What colour is the shape that appears for a moment?", colours[1], "flash", once),
            Question(f"Does the {shapes[1]} appear early or late?", "late" if late else "early", "when", once),
        ]
        return Scene(frames, questions, [*marks, Mark(flash, "shape", (colours[1], shapes[1]), at)])


def _pan(rng: np.random.Generator, paths: list[Path]) -> list[Image.Image]:
    """Frames of a window that moves steadily over a larger picture, by 24 to 64 pixels in all."""
    picture = background(rng, paths, SIDE + 64, SIDE + 64)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(24, 64)
    out = []
    for t in np.linspace(-0.5, 0.5, FRAMES):
        left, top = (round(32 + t * length * f(angle)) for f in (np.cos, np.sin))
        out.append(picture.crop((left, top, left + SIDE, top + SIDE)))
    return out


def _path(rng: np.random.Generator, step: tuple[int, int], size: int) -> list[Box]:
    """Where a shape of `size` pixels is in each frame while it moves over most of what is free on one axis."""
    free = SIDE - size
    low, high = rng.uniform(0, 0.15) * free, rng.uniform(0.85, 1) * free
    across = int(rng.integers(free + 1))
    along = np.linspace(low, high, FRAMES).round().astype(int)[:: sum(step)]
    places = [(int(a), across) if step[0] else (across, int(a)) for a in along]
    return [Box(x, y, x + size, y + size) for x, y in places]
