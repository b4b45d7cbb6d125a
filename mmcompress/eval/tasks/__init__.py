"""Tasks on which the quality of a reduction can be measured; one file per task or family of tasks."""

from __future__ import annotations

import difflib

from mmcompress.eval.tasks.asr import AsrWer
from mmcompress.eval.tasks.base import SPLITS, Box, Evidence, Mark, Question, Sample, Scene, Task, normalise
from mmcompress.eval.tasks.detail import Detail
from mmcompress.eval.tasks.digits import SpokenDigits
from mmcompress.eval.tasks.document import Document
from mmcompress.eval.tasks.draw import photo_paths
from mmcompress.eval.tasks.easy_vqa import EasyVQA
from mmcompress.eval.tasks.photo_presence import PhotoPresence
from mmcompress.eval.tasks.receipts import Receipts
from mmcompress.eval.tasks.relations import Relations
from mmcompress.eval.tasks.sound import SoundOrder
from mmcompress.eval.tasks.video import VideoEvent, VideoOrder

__all__ = [
    "SPLITS",
    "TASKS",
    "AsrWer",
    "Box",
    "Detail",
    "Document",
    "EasyVQA",
    "Evidence",
    "Mark",
    "PhotoPresence",
    "Question",
    "Receipts",
    "Relations",
    "Sample",
    "Scene",
    "SoundOrder",
    "SpokenDigits",
    "Task",
    "VideoEvent",
    "VideoOrder",
    "create_task",
    "list_tasks",
    "normalise",
    "photo_paths",
]

_PICTURES: tuple[type[Task], ...] = (EasyVQA, Detail, Relations, Document, PhotoPresence, Receipts)
_CLIPS: tuple[type[Task], ...] = (VideoOrder, VideoEvent)
_RECORDINGS: tuple[type[Task], ...] = (SoundOrder, SpokenDigits, AsrWer)
TASKS: dict[str, type[Task]] = {t.name: t for t in (*_PICTURES, *_CLIPS, *_RECORDINGS)}
"""name -> class."""


def list_tasks(kind: str | None = None) -> list[str]:
    """Names that `create_task` takes, of one kind of item ("image", "video", "audio") or all."""
    return sorted(n for n, t in TASKS.items() if kind in (None, t.kind))


def create_task(name: str, **settings) -> Task:
    """A task by name; what follows a colon is its main setting: "detail:small" is Detail(size="small").

    Raises ValueError for an unknown name or setting.
    """
    base, colon, value = name.partition(":")
    if base not in TASKS:
        close = difflib.get_close_matches(base, TASKS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {name!r}{hint}")
    kind = TASKS[base]
    if colon:
        if not kind.setting:
            raise ValueError(f"task must be {base!r} without a colon, for it has no setting to name so, got {name!r}")
        if kind.setting in settings:
            raise ValueError(f"task must name its {kind.setting} once, got {name!r} and {settings[kind.setting]!r}")
        settings[kind.setting] = value
    try:
        return kind(**settings)
    except TypeError as error:
        raise ValueError(f"task {base} does not take {sorted(settings)}: {error}") from error
