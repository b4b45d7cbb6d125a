"""Where is it, which is further left or higher, how many, same colour or not: what must survive when tokens are merged."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from mmcompress.eval.tasks.base import SPLITS, Box, Evidence, Mark, Question, Scene, Task, rng_of
from mmcompress.eval.tasks.draw import COLOURS, PICTURES, SHAPES, background, photo_paths, place, tile_of

COUNTS = {"1": "one", "2": "two", "3": "three", "4": "four"}
HEIGHTS = (60, 100)  # of a shape, pixels on a picture whose shorter side has 448


class Relations(Task):
    """Two to six coloured shapes on a dimmed photograph, none across a middle line; six questions a picture.

    Of one kind there are one to four shapes, of every other kind one. No two are alike, so "the red star" is one thing.
    photos: a folder whose pictures replace the packaged photographs.
    """

    name = "relations"
    chance = (1 / 4 + 1 / 4 + 1 / 2 + 1 / 2 + 1 / 4 + 1 / 2) / 6  # where (twice), side, height, count, same

    def __init__(self, photos: str | Path | None = None) -> None:
        self.photos = photos

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A picture with two questions of the topic where and one each of side, height, count and same."""
        rng = rng_of(seed, SPLITS.index(split), 5, index)
        width, height = PICTURES[int(rng.integers(len(PICTURES)))]
        picture = dimmed(rng, background(rng, photo_paths(split, self.photos), width, height))
        wanted, pair = _shapes(rng)
        scale = min(width, height) / 448
        tiles = [tile_of(rng, "shape", words, round(rng.uniform(*HEIGHTS) * scale)) for words in wanted]
        boxes = _boxes(rng, tiles, picture.size)
        for tile, box in zip(tiles, boxes, strict=True):
            picture.paste(tile, box[:2], tile)
        marks = [Mark(box, "shape", words) for box, words in zip(boxes, wanted, strict=True)]
        return Scene(picture, _questions(rng, marks, pair, picture.size), marks)


def dimmed(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """The picture with less contrast, so that what is painted on it stands out."""
    grey = Image.new("RGB", picture.size, (int(rng.integers(70, 170)),) * 3)
    return Image.blend(picture, grey, float(rng.uniform(0.35, 0.55)))


def _shapes(rng: np.random.Generator) -> tuple[list[tuple[str, str]], tuple[int, int]]:
    """Colour and shape of every mark, the counted kind first, and two marks that are the only ones of their kind; these have
    one colour in half of the pictures."""
    count = int(rng.integers(1, 5))
    others = int(rng.integers(1, 5)) if count == 1 else 2
    kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    shapes = [kinds[0]] * count + kinds[1 : others + 1]
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:count]]
    colours += [list(COLOURS)[i] for i in rng.integers(len(COLOURS), size=others)]
    single = range(len(shapes)) if count == 1 else range(count, len(shapes))
    a, b = (int(i) for i in rng.choice(single, 2, replace=False))
    if rng.random() < 0.5:
        colours[b] = colours[a]
    else:
        rest = [c for c in COLOURS if c != colours[a]]
        colours[b] = rest[int(rng.integers(len(rest)))]
    return list(zip(colours, shapes, strict=True)), (a, b)


def _boxes(rng: np.random.Generator, tiles: list[Image.Image], size: tuple[int, int]) -> list[Box]:
    """A free place for every tile, such that on each axis some two are clearly apart."""
    for _ in range(1000):
        boxes: list[Box] = []
        for tile in tiles:
            box = place(rng, tile.size, size, boxes, 50)
            if box is None:
                break
            boxes.append(box)
        if len(boxes) == len(tiles) and _apart(boxes, 0) and _apart(boxes, 1):
            return boxes
    raise RuntimeError(f"no free places for {len(tiles)} shapes on a picture of {size}")


def _apart(boxes: list[Box], axis: int) -> list[tuple[int, int]]:
    """Pairs (first, second) of boxes that lie one after the other on an axis (0 x, 1 y), without overlap on it."""
    return [(i, j) for i, j in itertools.permutations(range(len(boxes)), 2) if boxes[i][axis + 2] < boxes[j][axis]]


def _questions(rng: np.random.Generator, marks: list[Mark], pair: tuple[int, int], size: tuple[int, int]) -> list[Question]:
    names = [f"the {' '.join(m.words)}" for m in marks]
    shapes = [m.words[1] for m in marks]
    seen = [Evidence(m.box) for m in marks]
    out = []
    for i in rng.choice(len(marks), 2, replace=False):
        box = marks[i].box
        answer = f"{'top' if box.bottom <= size[1] // 2 else 'bottom'} {'left' if box.right <= size[0] // 2 else 'right'}"
        out.append(Question(f"Where is {names[i]}?", answer, "where", (seen[i],)))
    for axis, topic, words in ((0, "side", ("left", "right")), (1, "height", ("above", "below"))):
        pairs = _apart([m.box for m in marks], axis)
        a, b = pairs[int(rng.integers(len(pairs)))]
        answer = words[0]
        if rng.random() < 0.5:
            a, b, answer = b, a, words[1]
        asked = "left or right of" if axis == 0 else "above or below"
        out.append(Question(f"Is {names[a]} {asked} {names[b]}?", answer, topic, (seen[a], seen[b])))
    kind = shapes[0]
    count = str(shapes.count(kind))
    counted = tuple(e for e, s in zip(seen, shapes, strict=True) if s == kind)
    plural = f"{kind}es" if kind.endswith("s") else f"{kind}s"
    out.append(Question(f"How many {plural} are there?", count, "count", counted, frozenset({count, COUNTS[count]})))
    a, b = pair
    answer = "yes" if marks[a].words[0] == marks[b].words[0] else "no"
    asked = f"Do the {shapes[a]} and the {shapes[b]} have the same colour?"
    out.append(Question(asked, answer, "same", (seen[a], seen[b])))
    return out
