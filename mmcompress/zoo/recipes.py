"""How each zoo model is trained: on what, how much, and with which senses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmcompress.zoo.sense import Clip, Grid, Picture, Sense, Sound


@dataclass(frozen=True)
class Source:
    """Scenes of a task in the training mixture: how many, and their share of the steps (early: in the first half of them).
    thumbnail: one view only."""

    task: str
    scenes: int
    weight: float
    thumbnail: bool = False
    early: float | None = None

    @property
    def name(self) -> str:
        return self.task.replace(":", "-") + ("-thumbnail" if self.thumbnail else "")


@dataclass(frozen=True)
class Recipe:
    """see: steps of the first stage (0: the encoder stays as it is); hear: the same for sound, of the projector alone.
    start: the model from whose trained parts (of `runs/NAME`, else as shipped) this one starts; lora: the same, of the language
    model's part alone.
    answer: steps of the last stage, some 1,000 tokens each.
    rates: peak learning rates of projector and LoRA."""

    sources: tuple[Source, ...]
    see: int = 0
    hear: int = 0
    start: str | None = None
    lora: str | None = None
    answer: int = 1000
    rates: tuple[float, float] = (3e-5, 8e-4)


RECIPES = {
    "image": Recipe(
        see=1135,
        answer=2200,
        sources=(
            Source("detail", 200, 0.2, early=0.15),
            Source("relations", 300, 0.25, early=0.15),
            Source("document", 200, 0.15, early=0.05),
            Source("easy_vqa", 40, 0.04, early=0.02),
            Source("relations", 2000, 0.32, early=0.6, thumbnail=True),
            Source("easy_vqa", 100, 0.04, early=0.03, thumbnail=True),
        ),
    ),
    "video": Recipe(
        start="image",
        answer=420,
        sources=(Source("video_order", 130, 0.42), Source("video_event", 170, 0.58)),
    ),
    "audio": Recipe(
        sources=(Source("spoken_digits", 900, 0.5), Source("sound_order", 500, 0.5)),
        hear=1500,
        rates=(3e-4, 8e-4),
        answer=320,
    ),
    "mrope": Recipe(
        see=560,
        lora="image",
        answer=1340,
        sources=(Source("relations", 2000, 0.85), Source("easy_vqa", 300, 0.15)),
    ),
}


TASKS: dict[str, tuple[str, ...]] = {
    "image": ("easy_vqa", "detail:small", "detail:middle", "detail:large", "relations", "document"),
    "image-single": ("easy_vqa", "relations"),
    "video": ("video_order", "video_event"),
    "audio": ("spoken_digits:known", "spoken_digits:unseen", "sound_order"),
    "asr": ("asr_wer",),
    "mrope": ("easy_vqa", "relations"),
}
"""On which tasks each model is measured."""

SENSES: dict[str, type[Sense]] = {"image": Picture, "image-single": Picture, "video": Clip, "audio": Sound, "mrope": Grid}


def sense_of(name: str, model: Any, processor: Any, **settings: Any) -> Sense:
    """The sense through which a model takes its items."""
    if name == "image-single":
        settings["thumbnail"] = True
    return SENSES[name](model, processor, **settings)
