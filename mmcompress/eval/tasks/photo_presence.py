"""What is on real photographs (coco128's boxes, COCO's terms): is it there, how many, in the left or the right half."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mmcompress.eval.tasks.base import SPLITS, Box, Evidence, Mark, Question, Scene, Task, folder_of, rng_of

COUNTS = {1: "one", 2: "two", 3: "three"}
CLEAR = 0.005  # share of the photograph that a thing must cover to be asked for
_PLURALS = {"person": "people", "knife": "knives", "mouse": "mice", "sheep": "sheep"}


@dataclass(frozen=True, eq=False)
class _Photo:
    """A photograph and its things: name -> boxes as shares of width and height [n, 4] (left, top, right, bottom)."""

    path: Path
    things: dict[str, np.ndarray]

    def clear(self, name: str) -> np.ndarray:
        """[n] bool: which of the boxes are large enough."""
        box = self.things[name]
        return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) >= CLEAR


class PhotoPresence(Task):
    """Photographs with 80 kinds of things; every second one is test. Half of them are mirrored, by the seed.

    Things that are there and things that are not are asked for equally often, each kind as often as it is there; so are the
    counts 1, 2 and 3. data: the folder coco128; FileNotFoundError where it is absent.
    """

    name = "photo_presence"
    needs = "the photographs and boxes of coco128 as ../shared/data/coco128 (or data=)"

    def __init__(self, data: str | Path | None = None) -> None:
        self.data = data

    @property
    def chance(self) -> float:  # type: ignore[override]
        """Of the test split: half of presence and half, a third of count."""
        topics = Counter(q.topic for i in range(self.length("test")) for q in self.scene("test", 0, i).questions)
        return (topics["presence"] / 2 + topics["half"] / 2 + topics["count"] / len(COUNTS)) / topics.total()

    def length(self, split: str) -> int:
        return len(self._photos(split))

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A photograph with two to four questions of presence, and those of count and half that it allows."""
        photos = self._photos(split)
        photo = photos[rng_of(seed, SPLITS.index(split), 12).permutation(len(photos))[index]]
        rng = rng_of(seed, SPLITS.index(split), 13, index)
        with Image.open(photo.path) as image:
            picture = image.convert("RGB")
        things = photo.things
        if rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
            things = {n: np.stack([1 - b[:, 2], b[:, 1], 1 - b[:, 0], b[:, 3]], 1) for n, b in things.items()}
        seen = {n: tuple(Evidence(_pixels(b, picture.size)) for b in boxes) for n, boxes in things.items()}
        questions = _presence(rng, photo, photos, seen)
        for name, boxes in things.items():
            count = len(boxes)
            if (photo, name) in _counted(photos, seed):
                answers = frozenset({str(count), COUNTS[count]})
                questions.append(Question(f"How many {plural(name)} are there?", str(count), "count", seen[name], answers))
        alone = [n for n, b in things.items() if len(b) == 1 and photo.clear(n)[0] and not b[0, 0] < 0.5 < b[0, 2]]
        if alone:
            name = alone[int(rng.integers(len(alone)))]
            answer = "left" if things[name][0, 2] <= 0.5 else "right"
            asked = f"Is the {name} in the left or right half of the picture?"
            questions.append(Question(asked, answer, "half", seen[name]))
        marks = [Mark(e.box, "thing", (name,)) for name, evidence in seen.items() for e in evidence if e.box is not None]
        return Scene(picture, questions, marks)

    def _photos(self, split: str) -> tuple[_Photo, ...]:
        return _photos(folder_of(self, "coco128", self.data, "object_detection/config.yaml"), split)


@functools.lru_cache(maxsize=4)
def _photos(folder: Path, split: str) -> tuple[_Photo, ...]:
    """Every second photograph that shows a thing clearly, by name, from the first (train) or the second on."""
    import yaml

    labels = folder / "object_detection"
    names = yaml.safe_load((labels / "config.yaml").read_text())["names"]
    out = []
    for text in sorted((labels / "labels/train2017").glob("*.txt")):
        things: dict[str, list[list[float]]] = {}
        for line in text.read_text().splitlines():
            kind, x, y, w, h = line.split()
            cx, cy, half_w, half_h = float(x), float(y), float(w) / 2, float(h) / 2
            things.setdefault(names[int(kind)], []).append([cx - half_w, cy - half_h, cx + half_w, cy + half_h])
        path = folder / "images/train2017" / f"{text.stem}.jpg"
        photo = _Photo(path, {name: np.clip(boxes, 0, 1) for name, boxes in things.items()})
        if path.is_file() and any(photo.clear(name).any() for name in things):
            out.append(photo)
    return tuple(out[SPLITS.index(split) :: 2])


@functools.lru_cache(maxsize=8)
def _counted(photos: tuple[_Photo, ...], seed: int) -> frozenset[tuple[_Photo, str]]:
    """Which things of which photographs are to be counted: those of each count equally often."""
    pairs: dict[int, list[tuple[_Photo, str]]] = {count: [] for count in COUNTS}
    for photo in photos:
        for name, boxes in photo.things.items():
            if len(boxes) in COUNTS and photo.clear(name).all() and plural(name) != name:
                pairs[len(boxes)].append((photo, name))
    n, rng = min(map(len, pairs.values())), rng_of(seed, 14)
    return frozenset(each[i] for each in pairs.values() for i in rng.permutation(len(each))[:n])


@functools.lru_cache(maxsize=4)
def _shares(photos: tuple[_Photo, ...]) -> dict[str, tuple[float, float]]:
    """Of each kind of thing: in what share of the photographs it is, and how often it is asked for where it is."""
    here = Counter(n for p in photos for n in p.things)
    asked: Counter[str] = Counter()
    for photo in photos:
        clear = [n for n in photo.things if photo.clear(n).any()]
        for name in clear:
            asked[name] += min(2, len(clear)) / len(clear)  # type: ignore[assignment]
    return {n: (here[n] / len(photos), asked[n]) for n in here}


def _presence(
    rng: np.random.Generator, photo: _Photo, photos: tuple[_Photo, ...], seen: dict[str, tuple[Evidence, ...]]
) -> list[Question]:
    """Up to two things that are there, and as many that are not; over all photographs each kind is asked for equally often
    where it is and where it is not."""
    clear = [n for n in photo.things if photo.clear(n).any()]
    there = [str(n) for n in rng.permutation(clear)[:2]]
    shares = {n: asked / (1 - here) for n, (here, asked) in _shares(photos).items() if n not in photo.things}
    weight = np.array(list(shares.values()))
    absent = [str(n) for n in rng.choice(list(shares), len(there), replace=False, p=weight / weight.sum())]
    out = [Question(f"Is there {article(n)} in the picture?", "yes", "presence", seen[n]) for n in there]
    return out + [Question(f"Is there {article(n)} in the picture?", "no", "presence") for n in absent]


def plural(name: str) -> str:
    """ "dogs", "wine glasses", "people"; what has no singular stays as it is."""
    if name in _PLURALS:
        return _PLURALS[name]
    if name in ("skis", "scissors"):
        return name
    return f"{name}es" if name.endswith(("s", "sh", "ch")) else f"{name}s"


def article(name: str) -> str:
    """ "a dog", "an apple", "skis"."""
    if name in ("skis", "scissors"):
        return f"a pair of {name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _pixels(box: Sequence[float], size: tuple[int, int]) -> Box:
    """A box of shares in pixels of a picture of this size."""
    left, top, right, bottom = (float(v) * n for v, n in zip(box, size * 2, strict=True))
    return Box(int(left), int(top), min(int(np.ceil(right)), size[0]), min(int(np.ceil(bottom)), size[1]))
