"""Small things on real photographs: which digit, which word, what colour, what shape.

At "small" and "middle" only a high-resolution crop can show them; the question names one, the rest distracts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmcompress.eval.tasks.base import SPLITS, Evidence, Mark, Question, Scene, Task, rng_of
from mmcompress.eval.tasks.draw import (
    COLOURS,
    DIGITS,
    GAP,
    PICTURES,
    SHAPES,
    SIZES,
    WORDS,
    background,
    photo_paths,
    place,
    tile_of,
)


class Detail(Task):
    """A digit, a word and two coloured shapes, each inside one quarter of the picture.

    size: "small", "middle", "large" or "mixed". photos: a folder whose pictures replace the packaged photographs.
    """

    name = "detail"
    setting = "size"
    chance = (1 / len(DIGITS) + 1 / len(WORDS) + 1 / len(COLOURS) + 1 / len(SHAPES)) / 4

    def __init__(self, size: str = "mixed", photos: str | Path | None = None) -> None:
        if size not in (*SIZES, "mixed"):
            raise ValueError(f"size must be one of {[*SIZES, 'mixed']}, got {size!r}")
        self.size, self.photos = size, photos

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A picture with four questions, one of each topic."""
        rng = rng_of(seed, SPLITS.index(split), 2, index)
        width, height = PICTURES[int(rng.integers(len(PICTURES)))]
        picture = background(rng, photo_paths(split, self.photos), width, height)
        shapes = rng.choice(len(SHAPES), 2, replace=False)
        colours = rng.choice(len(COLOURS), 2, replace=False)
        wanted: list[tuple[str, tuple[str, ...]]] = [
            ("word", (WORDS[int(rng.integers(len(WORDS)))],)),
            ("digit", (DIGITS[int(rng.integers(len(DIGITS)))],)),
            *(("shape", (list(COLOURS)[c], SHAPES[s])) for c, s in zip(colours, shapes, strict=True)),
        ]
        heights = [self.size if self.size != "mixed" else list(SIZES)[int(rng.integers(3))] for _ in wanted]
        marks = paint(rng, picture, wanted, [SIZES[h] for h in heights])
        return Scene(picture, [_question(m, about_colour=m is marks[2]) for m in marks], marks)


def paint(
    rng: np.random.Generator,
    picture: Image.Image,
    wanted: Sequence[tuple[str, tuple[str, ...]]],
    heights: Sequence[tuple[int, int]],
    strict: bool = True,
) -> list[Mark]:
    """Paint marks of these kinds and words, each `heights` (lowest, highest; pixels on a 448-pixel picture) high.

    Where there is no room: RuntimeError if `strict`, else the mark is left out.
    """
    marks: list[Mark] = []
    for (kind, words), height in zip(wanted, heights, strict=True):
        tile = tile_of(rng, kind, words, round(rng.uniform(*height) * max(picture.size) / 448))
        tile.thumbnail((picture.width // 2 - 2 * GAP, picture.height // 2 - 2 * GAP))  # a long word on a narrow picture
        box = place(rng, tile.size, picture.size, [m.box for m in marks], 1000 if strict else 100)
        if box is not None:
            picture.paste(tile, box[:2], tile)
            marks.append(Mark(box, kind, words))
        elif strict:
            raise RuntimeError(f"no free place for a mark of {tile.size} pixels on a picture of {picture.size}")
    return marks


def _question(mark: Mark, about_colour: bool) -> Question:
    seen = (Evidence(mark.box),)
    if mark.kind == "digit":
        return Question("What digit is in the picture?", mark.words[0], "digit", seen)
    if mark.kind == "word":
        return Question("What word is written?", mark.words[0], "word", seen)
    colour, shape = mark.words
    if about_colour:
        return Question(f"What colour is the {shape}?", colour, "colour", seen)
    return Question(f"What shape is {colour}?", shape, "shape", seen)
