"""Scanned receipts (ICDAR 2019 SROIE): what is the total, what is the date."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from mmcompress.eval.tasks.base import SPLITS, Box, Evidence, Question, Scene, Task, folder_of, rng_of


class Receipts(Task):
    """Fifty receipts, every second one is test. Answers are written as on the receipt; a currency sign may be left out.

    data: the folder sroie; FileNotFoundError where it is absent.
    """

    name = "receipts"
    chance = 0.0  # answers are open
    needs = "the receipts of SROIE as ../shared/data/sroie (or data=)"

    def __init__(self, data: str | Path | None = None) -> None:
        self.data = data

    def length(self, split: str) -> int:
        return len(self._keys(split))

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A receipt with the questions for its total and its date, as far as its text lines hold them."""
        keys = self._keys(split)
        key = keys[rng_of(seed, SPLITS.index(split), 17).permutation(len(keys))[index]]
        folder = key.parents[1]
        lines = (folder / "box" / f"{key.stem}.csv").read_text(errors="replace").splitlines()
        values, questions = json.loads(key.read_text()), []
        for topic in ("total", "date"):
            value = values.get(topic, "").strip()
            rows = [parts for parts in (line.split(",", 8) for line in lines) if len(parts) == 9 and value in parts[8]]
            if value and rows:
                seen = tuple(Evidence(_box(r[:8])) for r in rows)
                answers = frozenset({value, value.lstrip("$")})
                questions.append(Question(f"What is the {topic}?", value, topic, seen, answers))
        with Image.open(folder / "img" / f"{key.stem}.jpg") as image:
            return Scene(image.convert("RGB"), questions)

    def _keys(self, split: str) -> list[Path]:
        keys = sorted((folder_of(self, "sroie", self.data, "key") / "key").glob("*.json"))
        return keys[SPLITS.index(split) :: 2]


def _box(corners: list[str]) -> Box:
    """The rectangle around four corners x1, y1, … x4, y4."""
    x, y = [int(v) for v in corners[::2]], [int(v) for v in corners[1::2]]
    return Box(min(x), min(y), max(x), max(y))
