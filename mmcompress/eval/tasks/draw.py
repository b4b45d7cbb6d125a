"""How the tasks paint: photographs as backgrounds, words, digits and shapes as marks on them, each at a free place."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from mmcompress.eval.tasks.base import Box

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

GAP = 4  # pixels that marks keep from one another, and from the edges of their quarter

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
            raise ImportError(f"this task needs {distribution}'s photographs: pip install mmcompress[zoo]") from e
    return paths


@functools.lru_cache(maxsize=128)
def photo_of(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@functools.lru_cache(maxsize=512)
def font_of(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == "default":
        return ImageFont.load_default(size)
    try:
        folder = Path(str(importlib.resources.files("matplotlib"))) / "mpl-data/fonts/ttf"
    except ImportError as e:
        raise ImportError("this task needs matplotlib's fonts: pip install mmcompress[zoo]") from e
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


FONTS = ("default", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")


def background(rng: np.random.Generator, paths: list[Path], width: int, height: int) -> Image.Image:
    photo = photo_of(paths[int(rng.integers(len(paths)))])
    share = rng.uniform(0.45, 1.0) * min(photo.width / width, photo.height / height)
    w, h = max(int(width * share), 1), max(int(height * share), 1)
    x, y = int(rng.integers(photo.width - w + 1)), int(rng.integers(photo.height - h + 1))
    out = photo.resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    if rng.random() < 0.5:
        out = ImageOps.mirror(out)
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        out = enhance(out).enhance(float(rng.uniform(0.6, 1.3)))
    return out


def tile_of(rng: np.random.Generator, kind: str, words: tuple[str, ...], size: int) -> Image.Image:
    """A mark as an RGBA picture `size` pixels high: writing on a plain plate, or an outlined shape."""
    if kind == "shape":
        return shape_of(words[1], COLOURS[words[0]], size)
    dark = rng.random() < 0.5
    plate = tuple(int(v) for v in (rng.integers(0, 70, 3) if dark else rng.integers(200, 256, 3)))
    ink = tuple(int(v) for v in (rng.integers(215, 256, 3) if dark else rng.integers(0, 60, 3)))
    font = font_of(FONTS[int(rng.integers(len(FONTS)))], max(round(size * 0.8), 8))
    left, top, right, bottom = font.getbbox(words[0])
    margin = max(round(size * 0.15), 2)
    tile = Image.new("RGBA", (int(right - left) + 2 * margin, max(size, int(bottom - top) + 2 * margin)), (*plate, 255))
    y = (tile.height - (bottom - top)) / 2 - top
    ImageDraw.Draw(tile).text((margin - left, y), words[0], font=font, fill=(*ink, 255))
    return tile


def shape_of(shape: str, colour: tuple[int, int, int], size: int) -> Image.Image:
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


def place(
    rng: np.random.Generator, tile: tuple[int, int], picture: tuple[int, int], taken: Iterable[Box], tries: int
) -> Box | None:
    """A free place inside one quarter of the picture, so that one crop of a 2x2 grid shows the whole mark; or None."""
    taken = list(taken)
    for _ in range(tries):
        left, top = (
            int(rng.integers(2)) * (p // 2) + GAP + int(rng.integers(max(p // 2 - t - 2 * GAP, 1)))
            for p, t in zip(picture, tile, strict=True)
        )
        box = Box(left, top, left + tile[0], top + tile[1])
        if not any(touch(box, b, GAP) for b in taken):
            return box
    return None


def touch(a: Box, b: Box, gap: int) -> bool:
    return a.left <= b.right + gap and b.left <= a.right + gap and a.top <= b.bottom + gap and b.top <= a.bottom + gap
