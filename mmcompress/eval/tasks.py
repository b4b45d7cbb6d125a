"""Tasks on which the quality of a reduction can be measured: generated or packaged pictures, short questions, known evidence.

Everything is deterministic: a sample follows from (task, split, seed, index) alone, and train and test share no picture.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

SPLITS = ("train", "test")


class Box(NamedTuple):
    """A rectangle in pixels of the item: left and top inside, right and bottom just outside."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass
class Sample:
    """One question about one item; `evidence` is the region that holds the answer, where it is known."""

    item: Image.Image
    prompt: str
    answers: frozenset[str]
    evidence: Box | None = None


@dataclass
class Mark:
    """Something painted on a scene: its region, the words that say what it is, and the questions that it answers."""

    box: Box
    kind: str
    words: tuple[str, ...]
    questions: list[tuple[str, str]] = field(default_factory=list)


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


class Task:
    """A task: `samples(split, n, seed)`, `score(sample, text)`, and the accuracy of a guess (`chance`, in 0..1)."""

    name: str = ""
    chance: float = 0.0

    def samples(self, split: str, n: int, seed: int = 0) -> list[Sample]:
        raise NotImplementedError(f"{type(self).__name__} must define samples(split, n, seed)")

    def score(self, sample: Sample, text: str) -> bool:
        """True if the reply is an answer, or begins with one as a word of its own."""
        words = normalise(text).split()
        return any(words[: len(a.split())] == a.split() for a in map(normalise, sample.answers))

    def _check(self, split: str, n: int) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be an integer of at least 1, got {n!r}")


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(list(key))


# ---------------------------------------------------------------------------------------------------------------- easy_vqa


@functools.lru_cache(maxsize=2)
def _easy_vqa(split: str) -> tuple[list[tuple[str, str, int]], dict[int, str]]:
    try:
        import easy_vqa
    except ImportError as e:
        raise ImportError("the task easy_vqa needs easy-vqa: pip install mmcompress[zoo]") from e
    questions, answers, ids = getattr(easy_vqa, f"get_{split}_questions")()
    return list(zip(questions, answers, ids, strict=True)), getattr(easy_vqa, f"get_{split}_image_paths")()


class EasyVQA(Task):
    """Questions about one coloured shape (easy-vqa's own train and test split), its 64x64 picture enlarged to `size`."""

    name = "easy_vqa"
    chance = 1 / 13  # thirteen answers; most questions are yes or no, so a blind model does far better

    def __init__(self, size: int = 448) -> None:
        self.size = size

    def scenes(self, split: str, n: int, seed: int = 0) -> list[tuple[Image.Image, list[Mark]]]:
        """n pictures, each with one mark that carries all the questions of the package about it."""
        self._check(split, n)
        rows, paths = _easy_vqa(split)
        by_image: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in rows:
            by_image.setdefault(image, []).append((_sentence(question), answer))
        ids = sorted(by_image)
        out = []
        for i in _rng(seed, SPLITS.index(split), 1).permutation(len(ids))[:n]:
            picture, box = self._picture(paths[ids[i]])
            out.append((picture, [Mark(box, "shape", _facts(by_image[ids[i]]), by_image[ids[i]])]))
        return out

    def samples(self, split: str, n: int, seed: int = 0) -> list[Sample]:
        self._check(split, n)
        rows, paths = _easy_vqa(split)
        out = []
        for i in _rng(seed, SPLITS.index(split), 0).permutation(len(rows))[:n]:
            question, answer, image = rows[i]
            picture, box = self._picture(paths[image])
            out.append(Sample(picture, _sentence(question), frozenset({answer}), box))
        return out

    def _picture(self, path: str) -> tuple[Image.Image, Box]:
        small = Image.open(path).convert("RGB")
        pixels = np.asarray(small).astype(int)
        ys, xs = np.nonzero(np.abs(pixels - pixels[0, 0]).max(-1) > 24)
        s = self.size / small.width
        box = Box(int(xs.min() * s), int(ys.min() * s), int((xs.max() + 1) * s), int((ys.max() + 1) * s))
        return small.resize((self.size, self.size), Image.Resampling.BICUBIC), box


def _facts(questions: list[tuple[str, str]]) -> tuple[str, ...]:
    """The colour and shape that a picture's questions and answers state, as far as they do."""
    seen: dict[str, None] = {}
    for question, answer in questions:
        words = [w for w in normalise(question).split() if w in EASY_WORDS]
        if answer not in ("yes", "no"):
            seen.update(dict.fromkeys([answer, *words]))
        elif (answer == "no") == bool({"no", "not"} & set(normalise(question).split())):  # it says that the thing is there
            seen.update(dict.fromkeys(words))
    return tuple(w for w in EASY_WORDS if w in seen)


EASY_WORDS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow", "circle", "rectangle", "triangle")


def _sentence(question: str) -> str:
    return question[:1].upper() + question[1:]


# ------------------------------------------------------------------------------------------------------------------ detail

WORDS = (
    *("apple", "bread", "chair", "cloud", "king", "earth", "green", "happy", "house", "light"),
    *("money", "music", "night", "ocean", "paper", "river", "sleep", "table", "water", "world"),
)
DIGITS = "0123456789"
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (214, 32, 32),
    "green": (32, 150, 48),
    "blue": (36, 72, 214),
    "yellow": (245, 220, 30),
    "orange": (245, 134, 20),
    "purple": (134, 40, 160),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
SIZES = {"small": (15, 20), "middle": (26, 34), "large": (46, 60)}  # height of a mark, pixels on a 448-pixel picture
PICTURES = ((448, 448), (448, 448), (560, 560), (448, 384), (384, 448), (640, 512), (512, 640))  # width, height

_PHOTOS = {  # PyPI content only; no photograph is in both splits
    "train": (
        *("skimage/astronaut.png", "skimage/coffee.png", "skimage/motorcycle_left.png", "skimage/rocket.jpg"),
        *("skimage/grass.png", "skimage/gravel.png", "skimage/brick.png", "skimage/camera.png"),
        *("skimage/hubble_deep_field.jpg", "skimage/ihc.png", "skimage/retina.jpg"),
    ),
    "test": (
        "skimage/chelsea.png",
        "skimage/moon.png",
        "sklearn/china.jpg",
        "sklearn/flower.jpg",
        "matplotlib/grace_hopper.jpg",
    ),
}
_FOLDERS = {
    "skimage": ("skimage", "data", "scikit-image"),
    "sklearn": ("sklearn.datasets", "images", "scikit-learn"),
    "matplotlib": ("matplotlib", "mpl-data/sample_data", "matplotlib"),
}


def photo_paths(split: str, photos: str | Path | None = None) -> list[Path]:
    """The background photographs of a split: those of installed packages, or those of a folder (its last fifth is test)."""
    if photos is not None:
        found = sorted(p for p in Path(photos).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if len(found) < 2:
            raise ValueError(
                f"photos must be a folder with at least 2 .jpg or .png pictures, got {str(photos)!r} with {len(found)}"
            )
        cut = min(len(found) - 1, len(found) * 4 // 5)
        return found[:cut] if split == "train" else found[cut:]
    paths = []
    for entry in _PHOTOS[split]:
        package, name = entry.split("/")
        module, folder, distribution = _FOLDERS[package]
        try:
            paths.append(Path(str(importlib.resources.files(module))) / folder / name)
        except ImportError as e:
            raise ImportError(f"the task detail needs {distribution}'s photographs: pip install mmcompress[zoo]") from e
    return paths


@functools.lru_cache(maxsize=128)
def _photo(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@functools.lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == "default":
        return ImageFont.load_default(size)
    try:
        folder = Path(str(importlib.resources.files("matplotlib"))) / "mpl-data/fonts/ttf"
    except ImportError as e:
        raise ImportError("the task detail needs matplotlib's fonts: pip install mmcompress[zoo]") from e
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


FONTS = ("default", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")


class Detail(Task):
    """Small things on real photographs: a digit, a word and two coloured shapes, each inside one quarter of the picture.

    At "small" and "middle" only a high-resolution crop can show them; the question names one, the rest distracts.
    `size` is "small", "middle", "large" or "mixed"; `photos` a folder whose pictures replace the packaged photographs.
    """

    name = "detail"
    chance = (1 / len(DIGITS) + 1 / len(WORDS) + 1 / len(COLOURS) + 1 / len(SHAPES)) / 4

    def __init__(self, size: str = "mixed", photos: str | Path | None = None) -> None:
        if size not in (*SIZES, "mixed"):
            raise ValueError(f"size must be one of {[*SIZES, 'mixed']}, got {size!r}")
        self.size, self.photos = size, photos

    def scenes(self, split: str, n: int, seed: int = 0, start: int = 0) -> list[tuple[Image.Image, list[Mark]]]:
        """n pictures with all their marks, each mark with its questions."""
        self._check(split, n)
        paths = photo_paths(split, self.photos)
        return [self._scene(_rng(seed, SPLITS.index(split), 2, i), paths) for i in range(start, start + n)]

    def samples(self, split: str, n: int, seed: int = 0) -> list[Sample]:
        out = []
        for i, (picture, marks) in enumerate(self.scenes(split, n, seed)):
            choice = _rng(seed, SPLITS.index(split), 3, i)
            kind = ("digit", "word", "colour", "shape")[i % 4]  # as many of each
            fits = [m for m in marks if m.kind == (kind if kind in ("digit", "word") else "shape")]
            mark = fits[int(choice.integers(len(fits)))]
            prompt, answer = mark.questions[0 if kind != "shape" else 1]
            out.append(Sample(picture, prompt, frozenset({answer}), mark.box))
        return out

    def crowded(self, split: str, n: int, seed: int = 0, marks: int = 24) -> list[tuple[Image.Image, list[Mark]]]:
        """n pictures that are full of marks, for pretraining: too many of them for questions with one answer."""
        self._check(split, n)
        paths = photo_paths(split, self.photos)
        out = []
        for i in range(n):
            rng = _rng(seed, SPLITS.index(split), 4, i)
            picture = _background(rng, paths, 448, 448)
            out.append((picture, self._paint(rng, picture, [_any_words(rng) for _ in range(marks)], strict=False)))
        return out

    def _scene(self, rng: np.random.Generator, paths: list[Path]) -> tuple[Image.Image, list[Mark]]:
        width, height = PICTURES[int(rng.integers(len(PICTURES)))]
        picture = _background(rng, paths, width, height)
        shapes = rng.choice(len(SHAPES), 2, replace=False)
        colours = rng.choice(len(COLOURS), 2, replace=False)
        wanted: list[tuple[str, tuple[str, ...]]] = [
            ("word", (WORDS[int(rng.integers(len(WORDS)))],)),
            ("digit", (DIGITS[int(rng.integers(len(DIGITS)))],)),
            *(("shape", (list(COLOURS)[c], SHAPES[s])) for c, s in zip(colours, shapes, strict=True)),
        ]
        return picture, self._paint(rng, picture, wanted)

    def _paint(self, rng, picture: Image.Image, wanted: list[tuple[str, tuple[str, ...]]], strict: bool = True) -> list[Mark]:
        """Paint the marks where there is room; without room: an error if `strict`, else the mark is left out."""
        marks: list[Mark] = []
        for kind, words in wanted:
            size = self.size if self.size != "mixed" else list(SIZES)[int(rng.integers(3))]
            tile = _tile(rng, kind, words, round(rng.uniform(*SIZES[size]) * max(picture.size) / 448))
            box = _place(rng, tile.size, picture.size, [m.box for m in marks], 1000 if strict else 100)
            if box is not None:
                picture.paste(tile, box[:2], tile)
                marks.append(Mark(box, kind, words, _questions(kind, words)))
            elif strict:
                raise RuntimeError(f"no free place for a mark of {tile.size} pixels on a picture of {picture.size}")
        return marks


def _any_words(rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    kind = ("word", "word", "digit", "shape")[int(rng.integers(4))]
    if kind == "shape":
        return kind, (list(COLOURS)[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(len(SHAPES)))])
    return kind, ((WORDS if kind == "word" else DIGITS)[int(rng.integers(len(WORDS if kind == "word" else DIGITS)))],)


def _questions(kind: str, words: tuple[str, ...]) -> list[tuple[str, str]]:
    if kind == "digit":
        return [("What digit is in the picture?", words[0])]
    if kind == "word":
        return [("What word is written?", words[0])]
    colour, shape = words
    return [(f"What colour is the {shape}?", colour), (f"What shape is {colour}?", shape)]


def _background(rng: np.random.Generator, paths: list[Path], width: int, height: int) -> Image.Image:
    photo = _photo(paths[int(rng.integers(len(paths)))])
    share = rng.uniform(0.45, 1.0) * min(photo.width / width, photo.height / height)
    w, h = max(int(width * share), 1), max(int(height * share), 1)
    x, y = int(rng.integers(photo.width - w + 1)), int(rng.integers(photo.height - h + 1))
    out = photo.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    if rng.random() < 0.5:
        out = ImageOps.mirror(out)
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        out = enhance(out).enhance(float(rng.uniform(0.6, 1.3)))
    return out


def _tile(rng: np.random.Generator, kind: str, words: tuple[str, ...], size: int) -> Image.Image:
    """A mark as an RGBA picture `size` pixels high: writing on a plain plate, or an outlined shape."""
    if kind == "shape":
        return _shape(words[1], COLOURS[words[0]], size)
    dark = rng.random() < 0.5
    plate = tuple(int(v) for v in (rng.integers(0, 70, 3) if dark else rng.integers(200, 256, 3)))
    ink = tuple(int(v) for v in (rng.integers(215, 256, 3) if dark else rng.integers(0, 60, 3)))
    font = _font(FONTS[int(rng.integers(len(FONTS)))], max(round(size * 0.8), 8))
    left, top, right, bottom = font.getbbox(words[0])
    margin = max(round(size * 0.15), 2)
    tile = Image.new("RGBA", (int(right - left) + 2 * margin, max(size, int(bottom - top) + 2 * margin)), (*plate, 255))
    y = (tile.height - (bottom - top)) / 2 - top
    ImageDraw.Draw(tile).text((margin - left, y), words[0], font=font, fill=(*ink, 255))
    return tile


def _shape(shape: str, colour: tuple[int, int, int], size: int) -> Image.Image:
    s, k = 256, 24  # painted large, then reduced: smooth edges; k is the outline
    tile = Image.new("RGBA", (s, s), (0, 0, 0, 0))
    draw = ImageDraw.Draw(tile)
    line = (20, 20, 20, 255) if sum(colour) > 300 else (245, 245, 245, 255)
    for fill, m in ((line, 0), ((*colour, 255), k)):
        lo, hi, mid, span = m, s - m, s / 2, s - 2 * m
        if shape == "circle":
            draw.ellipse((lo, lo, hi, hi), fill=fill)
        elif shape == "square":
            draw.rectangle((lo, lo, hi, hi), fill=fill)
        elif shape == "triangle":
            draw.polygon([(mid, lo * 1.8), (hi - m * 0.6, hi), (lo + m * 0.6, hi)], fill=fill)
        elif shape == "star":
            r = (s / 2 - m * 1.3, (s / 2 - m * 1.3) * 0.42)
            angle = [np.pi * (i / 5 - 0.5) for i in range(10)]
            draw.polygon([(mid + r[i % 2] * np.cos(a), mid + r[i % 2] * np.sin(a)) for i, a in enumerate(angle)], fill=fill)
        elif shape == "cross":
            a, b = s * 0.33 + m * 0.6, s * 0.67 - m * 0.6
            draw.rectangle((a, lo, b, hi), fill=fill)
            draw.rectangle((lo, a, hi, b), fill=fill)
        else:  # heart
            q = span / 2
            draw.ellipse((lo, lo, lo + q * 1.06, lo + q), fill=fill)
            draw.ellipse((hi - q * 1.06, lo, hi, lo + q), fill=fill)
            draw.polygon([(lo + q * 0.07, lo + q * 0.7), (hi - q * 0.07, lo + q * 0.7), (mid, hi)], fill=fill)
    return tile.resize((size, size), Image.Resampling.LANCZOS)


def _place(
    rng: np.random.Generator, tile: tuple[int, int], picture: tuple[int, int], taken: Iterable[Box], tries: int
) -> Box | None:
    """A free place inside one quarter of the picture, so that one crop of a 2x2 grid shows the whole mark; or None."""
    gap, taken = 4, list(taken)
    for _ in range(tries):
        left, top = (
            int(rng.integers(2)) * (p // 2) + gap + int(rng.integers(max(p // 2 - t - 2 * gap, 1)))
            for p, t in zip(picture, tile, strict=True)
        )
        box = Box(left, top, left + tile[0], top + tile[1])
        if not any(_touch(box, b, gap) for b in taken):
            return box
    return None


def _touch(a: Box, b: Box, gap: int) -> bool:
    return a.left <= b.right + gap and b.left <= a.right + gap and a.top <= b.bottom + gap and b.top <= a.bottom + gap


TASKS: dict[str, type[Task]] = {t.name: t for t in (EasyVQA, Detail)}


def create_task(name: str, **settings) -> Task:
    """A task by name; "detail:small" is Detail(size="small")."""
    base, _, size = name.partition(":")
    if base not in TASKS:
        close = difflib.get_close_matches(base, TASKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {name!r}{hint}")
    if size:
        settings["size"] = size
    return TASKS[base](**settings)
