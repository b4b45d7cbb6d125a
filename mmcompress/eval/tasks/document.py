"""Rendered pages: a heading, fields with values, and small print that is never asked. Reading, field by field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmcompress.eval.tasks.base import SPLITS, Box, Evidence, Mark, Question, Scene, Task, rng_of
from mmcompress.eval.tasks.draw import FONTS, WORDS, font_of

WORD_FIELDS = ("city", "name", "item", "team", "street", "code")
NUMBER_FIELDS = ("total", "room", "age", "seat", "floor", "price")
NUMBERS = tuple(str(i) for i in range(10, 100))
SMALL_PRINT = (
    *("please", "keep", "this", "copy", "for", "your", "own", "records", "and", "sign", "below", "if", "all", "lines", "are"),
    *(
        "complete",
        "before",
        "you",
        "return",
        "it",
        "to",
        "the",
        "office",
        "without",
        "delay",
        "see",
        "also",
        "part",
        "of",
        "our",
    ),
)
_PAGE = 448  # height, in the units in which sizes are given
_LINE = 1.5  # height of a row in sizes of its font


class Document(Task):
    """A page 448 wide and 448 to 576 high with a heading and four to six fields ("City: river", "Total: 42").

    Values are written 24 to 30 pixels high on a page of 448, no word across a middle line. A word or number that is written in
    one font in the train split is written in another in the test split: of this task, others write all words in all fonts.
    """

    name = "document"
    chance = (3 / len(WORDS) + 2 / len(NUMBERS)) / 5  # heading, two fields, two numbers

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A page with five questions: the heading, two fields with words and two with numbers."""
        rng = rng_of(seed, SPLITS.index(split), 6, index)
        page = _Page(rng, int(rng.choice([448, 512, 576])))
        words, numbers = (int(rng.integers(2, 4)) for _ in range(2))
        font = int(rng.integers(len(FONTS)))
        values = [*_written(rng, split, font, WORDS, words), *_written(rng, split, font, NUMBERS, numbers)]
        names = [*rng.choice(WORD_FIELDS, words, replace=False), *rng.choice(NUMBER_FIELDS, numbers, replace=False)]
        fields = [(str(name), value) for name, value in zip(names, values, strict=True)]
        heading_font = int(rng.integers(len(FONTS)))
        (heading,) = _written(rng, split, heading_font, WORDS, 1)
        seen = page.fill(heading, heading_font, [fields[i] for i in rng.permutation(len(fields))], font)
        questions = [Question("What is the heading?", heading, "heading", seen[""])]
        for topic, first, count in (("field", 0, words), ("number", words, numbers)):
            for i in first + rng.choice(count, 2, replace=False):
                name, value = fields[i]
                questions.append(Question(f"What is the {name}?", value, topic, seen[name]))
        return Scene(page.picture, questions, page.marks)


def _written(rng: np.random.Generator, split: str, font: int, choices: Sequence[str], n: int) -> list[str]:
    """n of the choices that this split writes in this font: a sixth of them in test, the others in train."""
    mine = [c for i, c in enumerate(choices) if ((i + font) % len(FONTS) == 0) == (split == "test")]
    return [str(c) for c in rng.choice(mine, n, replace=False)]


class _Page:
    """A tinted page that is written on from top to bottom; `marks` is what was written."""

    def __init__(self, rng: np.random.Generator, height: int) -> None:
        self.rng, self.scale = rng, height / _PAGE
        tint = tuple(int(v) for v in rng.integers(232, 256, 3)) if rng.random() < 0.6 else (255, 255, 255)
        self.picture = Image.new("RGB", (448, height), tint)
        self.draw = ImageDraw.Draw(self.picture)
        self.marks: list[Mark] = []
        self.ink = tuple(int(v) for v in rng.integers(0, 70, 3))
        if rng.random() < 0.3:
            self.draw.rectangle((4, 4, 443, height - 5), outline=self.ink, width=2)

    def fill(
        self, heading: str, heading_font: int, fields: list[tuple[str, str]], value_font: int
    ) -> dict[str, tuple[Evidence, ...]]:
        """Write the page; returns the evidence of every field by its name, of the heading by ""."""
        rng = self.rng
        label_font, print_font = FONTS[int(rng.integers(len(FONTS)))], FONTS[int(rng.integers(4))]
        size, heading_size = (round(rng.uniform(*r) * self.scale) for r in ((24, 30), (28, 34)))
        small, ruled, colon = round(11 * self.scale), rng.random() < 0.4, rng.random() < 0.7
        rows = [("heading", round(heading_size * _LINE))]
        rows += [("print", small + 4)] * int(rng.integers(1, 3))
        rows += [(f"field {i}", round(size * _LINE)) for i in range(len(fields))]
        rows += [("print", small + 4)] * int(rng.integers(1, 3))
        slack = self.picture.height - 24 - sum(h for _, h in rows) - round(size * _LINE)  # a row may step over the middle
        gaps = rng.dirichlet(np.ones(len(rows) + 1)) * max(slack, 0)
        seen: dict[str, tuple[Evidence, ...]] = {}
        y, left = 12.0, int(rng.integers(14, 40))
        for (row, height), gap in zip(rows, gaps[:-1], strict=True):
            y = self._clear(y + gap, height)
            if row == "print":
                words = rng.choice(SMALL_PRINT, int(rng.integers(5, 9)))
                self.draw.text((left, y), " ".join(words).capitalize(), font=font_of(print_font, small), fill=self.ink)
            elif row == "heading":
                box = self._write(heading, FONTS[heading_font], heading_size, left, y, centre=rng.random() < 0.5)
                self.marks.append(Mark(box, "word", (heading,)))
                seen[""] = (Evidence(box),)
            else:
                name, value = fields[int(row.split()[1])]
                text = name.capitalize() + (":" if colon else "")
                label = self._write(text, label_font, size, left, y)
                self.marks.append(Mark(label, "label", (name,)))
                at = max(label.right + round(size * 0.5), 0 if colon else 150)
                box = self._write(value, FONTS[value_font], size, at, y)
                self._mark(value, FONTS[value_font], size, box)
                seen[name] = (Evidence(box), Evidence(label))
                if ruled:
                    self.draw.line((left, y + height - 2, 448 - left, y + height - 2), fill=(150, 150, 150))
            y += height
        return seen

    def _clear(self, y: float, height: int) -> float:
        """y, or just under the page's middle where a row would lie across it."""
        middle = self.picture.height / 2
        return middle + 2 if y < middle < y + height else y

    def _write(self, text: str, font: str, size: int, x: int, y: float, centre: bool = False) -> Box:
        """Write from x on, or right of the page's middle where it would lie across it, or in the middle of one half."""
        face = font_of(font, size)
        width = face.getbbox(text)[2]
        if centre:
            x = int(224 * self.rng.integers(2) + (224 - width) // 2)
        elif x < 228 < x + width + 4:
            x = 228
        self.draw.text((x, y), text, font=face, fill=self.ink)
        return _whole(self.draw.textbbox((x, y), text, font=face))

    def _mark(self, value: str, font: str, size: int, box: Box) -> None:
        """A mark for a word, or one for each digit of a number."""
        if not value.isdigit():
            self.marks.append(Mark(box, "word", (value,)))
            return
        face = font_of(font, size)
        start = box.left - face.getbbox(value)[0]
        for i, digit in enumerate(value):
            left, top, right, bottom = face.getbbox(digit)
            x, y = start + face.getlength(value[:i]), box.top - face.getbbox(value)[1]
            self.marks.append(Mark(_whole((x + left, y + top, x + right, y + bottom)), "digit", (digit,)))


def _whole(box: tuple[float, float, float, float]) -> Box:
    """The smallest box of whole pixels around this one."""
    return Box(int(np.floor(box[0])), int(np.floor(box[1])), int(np.ceil(box[2])), int(np.ceil(box[3])))
