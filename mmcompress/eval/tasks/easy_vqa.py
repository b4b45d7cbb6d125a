"""easy-VQA: questions about one coloured shape, from the package of the same name (victorzhou, MIT)."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from mmcompress.eval.tasks.base import SPLITS, Box, Evidence, Mark, Question, Scene, Task, normalise, rng_of


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

    def length(self, split: str) -> int:
        return len(_by_image(split))

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """One picture with all the questions of the package about it."""
        by_image = _by_image(split)
        image = _order(split, seed)[index]
        picture, box = self._picture(_easy_vqa(split)[1][image])
        pairs, seen = by_image[image], (Evidence(box),)
        questions = [Question(q, a, "yes/no" if a in ("yes", "no") else "what", seen) for q, a in pairs]
        return Scene(picture, questions, [Mark(box, "shape", _facts(pairs))])

    def _picture(self, path: str) -> tuple[Image.Image, Box]:
        small = Image.open(path).convert("RGB")
        pixels = np.asarray(small).astype(int)
        ys, xs = np.nonzero(np.abs(pixels - pixels[0, 0]).max(-1) > 24)
        s = self.size / small.width
        box = Box(int(xs.min() * s), int(ys.min() * s), int((xs.max() + 1) * s), int((ys.max() + 1) * s))
        return small.resize((self.size, self.size), Image.Resampling.BICUBIC), box


@functools.lru_cache(maxsize=2)
def _by_image(split: str) -> dict[int, list[tuple[str, str]]]:
    """Image -> its questions with their answers."""
    out: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in _easy_vqa(split)[0]:
        out.setdefault(image, []).append((_sentence(question), answer))
    return out


@functools.lru_cache(maxsize=8)
def _order(split: str, seed: int) -> list[int]:
    """The images in the order of this seed."""
    ids = sorted(_by_image(split))
    return [ids[i] for i in rng_of(seed, SPLITS.index(split), 1).permutation(len(ids))]


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
