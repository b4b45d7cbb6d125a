"""Training views for a tower: 224-pixel squares full of words, digits, numbers and coloured shapes, on photographs and paper.

They are made without end, so nothing is learned by heart; backgrounds come from the train split of the tasks' photographs.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from mmcompress.eval.tasks.base import Box, Mark, rng_of
from mmcompress.eval.tasks.draw import (
    COLOURS,
    DIGITS,
    FONTS,
    SHAPES,
    WORDS,
    background,
    font_of,
    photo_paths,
    tile_of,
    touch,
)
from mmcompress.eval.tasks.easy_vqa import EASY_WORDS, EasyVQA
from mmcompress.zoo.common import SIDE

MORE_WORDS = (  # what forms and pages say besides the words that are asked for
    *("name", "city", "street", "country", "date", "total", "price", "number", "code", "room", "day", "month", "year", "time"),
    *("animal", "fruit", "color", "item", "owner", "title", "topic", "team", "plant", "food", "tool", "size", "age"),
    *("weight", "height", "floor", "gate", "seat", "page", "count", "amount", "tax", "sum", "place", "thing", "word", "note"),
    *("book", "door", "fish", "gold", "hand", "horse", "lake", "moon", "north", "park", "road", "school"),
    *("snow", "star", "stone", "sun", "tree", "wind", "window", "winter", "year", "zero", "bird", "bridge", "dog", "cat"),
    *("first", "last", "east", "west", "south", "small", "large", "open", "closed", "left", "right", "high", "low", "new"),
)
READ = tuple(dict.fromkeys((*WORDS, *MORE_WORDS)))
TABLES = (
    tuple(DIGITS),
    READ,
    tuple(sorted({*COLOURS, *EASY_WORDS[:8]})),
    tuple(sorted({*SHAPES, *EASY_WORDS[8:]})),
    ("left", "right"),
    ("top", "bottom"),
)
"""The closed sets among which a token's word is: digits, words, colours, shapes, and where in its view a mark stands."""


def spelled(mark: Mark, tokens: np.ndarray, boxes: np.ndarray, places: float) -> list[tuple[np.ndarray, list[tuple[int, str]]]]:
    """What the tokens that show a mark should say, as groups of tokens with (table, word) of each: read row by row, text.

    A word or digit: all tokens say it. A shape: the left ones its colour, the right ones its name ("red star"); of one that is
    at most `places` pixels high the lower rows say where in its view it is ("top left"). A mark of one column is split by rows,
    one token says both. tokens: their indices; boxes [N, 4] of all tokens.
    """
    kinds = {"digit": (0,), "word": (1,), "shape": (2, 3)}[mark.kind]
    words = [(t, w) for w in mark.words for t in kinds if w in TABLES[t]]
    x, y = (mark.box.left + mark.box.right) / 2, (mark.box.top + mark.box.bottom) / 2
    across, down = (boxes[tokens, i] + boxes[tokens, i + 2] for i in (0, 1))
    left, upper = across < 2 * x, down < 2 * y
    if len(words) < 2 or len(tokens) < 2:
        return [(tokens, words)] if words and len(tokens) else []
    colour, shape = words
    if not (left.any() and (~left).any()):
        left, upper = upper, np.ones_like(upper)
    elif not (upper.any() and (~upper).any()) or mark.box.bottom - mark.box.top > places:
        upper = np.ones_like(upper)
    where = [(k, TABLES[k][int(at > SIDE / 2)]) for k, at in ((5, y), (4, x))]
    groups = [(upper & left, colour), (upper & ~left, shape), (~upper & left, where[0]), (~upper & ~left, where[1])]
    return [(tokens[of], [said]) for of, said in groups if of.any()]


def view(seed: int, index: int) -> tuple[Image.Image, list[Mark]]:
    """View number `index`, a 224-pixel square, and what was painted on it."""
    rng = rng_of(seed, 0, 20, index)
    kind = rng.random()
    if kind < 0.1:
        return _easy(rng)
    if kind < 0.45:
        return _paper(rng)
    picture = background(rng, photo_paths("train"), SIDE, SIDE)
    if rng.random() < 0.5:
        picture = Image.blend(picture, Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(0, 256, 3))), rng.uniform(0, 0.5))
    marks: list[Mark] = []
    largest = rng.uniform(18, 90)
    for _ in range(int(rng.integers(4, 15))):
        mark_kind = ("word", "word", "digit", "shape", "shape")[int(rng.integers(5))]
        if mark_kind == "shape":
            words: tuple[str, ...] = (_one(rng, list(COLOURS)), _one(rng, SHAPES))
        else:
            words = (_one(rng, (WORDS if rng.random() < 0.7 else READ) if mark_kind == "word" else DIGITS),)
        height = float(np.exp(rng.uniform(np.log(11), np.log(largest))))
        _paste(rng, picture, marks, mark_kind, words, tile_of(rng, mark_kind, words, round(height)))
    return picture, marks


def _one(rng: np.random.Generator, among) -> str:
    return str(among[int(rng.integers(len(among)))])


def _paste(rng, picture: Image.Image, marks: list[Mark], kind: str, words: tuple[str, ...], tile: Image.Image) -> None:
    if tile.width > SIDE - 8 or tile.height > SIDE - 8:
        return
    taken = [m.box for m in marks]
    for _ in range(40):
        left, top = int(rng.integers(SIDE - tile.width)), int(rng.integers(SIDE - tile.height))
        box = Box(left, top, left + tile.width, top + tile.height)
        if not any(touch(box, b, 2) for b in taken):
            picture.paste(tile, box[:2], tile)
            marks.append(Mark(box, kind, words))
            return


def _easy(rng: np.random.Generator) -> tuple[Image.Image, list[Mark]]:
    """A picture of easy-VQA's train split, whole or the quarter that shows its shape at twice the size."""
    task = EasyVQA(SIDE)
    scene = task.scene("train", 0, int(rng.integers(task.length("train"))))
    picture, mark = scene.item, scene.marks[0]
    if rng.random() < 0.5:
        big = EasyVQA(2 * SIDE).scene("train", 0, int(rng.integers(task.length("train"))))
        picture, mark = big.item, big.marks[0]
        b = mark.box
        left = int(np.clip((b.left + b.right) // 2 - rng.integers(40, SIDE - 40), 0, SIDE))
        top = int(np.clip((b.top + b.bottom) // 2 - rng.integers(40, SIDE - 40), 0, SIDE))
        picture = picture.crop((left, top, left + SIDE, top + SIDE))
        box = Box(max(b.left - left, 0), max(b.top - top, 0), min(b.right - left, SIDE), min(b.bottom - top, SIDE))
        mark = Mark(box, "shape", mark.words)
    return picture, [mark]


def _paper(rng: np.random.Generator) -> tuple[Image.Image, list[Mark]]:
    """Lines of text on plain paper, cut anywhere, as the crops of a page show them."""
    paper = tuple(int(v) for v in rng.integers(215, 256, 3))
    ink = tuple(int(v) for v in rng.integers(0, 90, 3))
    picture = Image.new("RGB", (SIDE, SIDE), paper)
    draw, marks = ImageDraw.Draw(picture), []
    size = round(float(np.exp(rng.uniform(np.log(11), np.log(34)))))
    y = float(rng.uniform(-5, size))
    while y < SIDE - size * 0.7:
        font = font_of(FONTS[int(rng.integers(len(FONTS)))], size)
        x = float(rng.uniform(-10, 60))
        while x < SIDE - size:
            if rng.random() < 0.3:
                text, kind = "".join(_one(rng, DIGITS) for _ in range(int(rng.integers(1, 4)))), "digit"
            else:
                text, kind = _one(rng, WORDS if rng.random() < 0.6 else READ), "word"
            shown = text.capitalize() if rng.random() < 0.4 else text.upper() if rng.random() < 0.05 else text
            draw.text((x, y), shown, font=font, fill=ink)
            top, bottom = font.getbbox(shown)[1] + y, font.getbbox(shown)[3] + y
            pieces = list(text) if kind == "digit" else [shown]
            at = x
            for piece in pieces:
                wide = font.getlength(piece)
                box = Box(max(int(at), 0), max(int(top), 0), min(round(at + wide), SIDE), min(round(bottom), SIDE))
                if at >= -1 and at + wide <= SIDE + 1 and top >= -1 and bottom <= SIDE + 1:
                    marks.append(Mark(box, kind, (piece.lower(),)))
                at += wide
            ending = ":" if rng.random() < 0.25 else ""
            draw.text((at, y), ending, font=font, fill=ink)
            x = at + font.getlength(ending + " ") + float(rng.uniform(0, 2 * size))
        y += size * float(rng.uniform(1.3, 2.2))
    return picture, marks
