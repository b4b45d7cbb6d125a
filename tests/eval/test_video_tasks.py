"""Oracles that know which mark is in which frame answer every question of `video_order` and `video_event`."""

import re

import numpy as np
import pytest

from mmcompress.eval.tasks import SPLITS, VideoEvent, VideoOrder
from mmcompress.eval.tasks.draw import COLOURS, SHAPES


def test_slideshow_marks_give_every_answer():
    kinds = set()
    for split in SPLITS:
        for scene in VideoOrder().scenes(split, 16, 5):
            frame_of = {}
            for m in reversed(scene.marks):
                frame_of[m.words[-1]] = m.frame  # its first
                kinds.add(m.kind)
            names = sorted(frame_of, key=frame_of.get)
            assert len(scene.item) == 8 and [frame_of[n] for n in names] == [0, 2, 4, 6]
            assert [q.topic for q in scene.questions] == ["first", "last", "after", "before_after", "before_after"]
            for q in scene.questions:
                asked = [n for n in re.findall(r"[a-z]+", q.prompt) if n in frame_of]
                if q.topic in ("first", "last"):
                    assert q.answer == names[0 if q.topic == "first" else -1] and not asked
                elif q.topic == "after":
                    assert q.answer == names[names.index(asked[0]) + 1]
                else:
                    assert q.answer == ("before" if frame_of[asked[0]] < frame_of[asked[1]] else "after")
                shown = {(m.box, m.frame) for m in scene.marks if m.words[-1] in {q.answer, *asked}}
                assert {(e.box, f) for e in q.evidence for f in range(*e.frames)} == shown
    assert kinds == {"shape", "word"}


def test_event_marks_give_every_answer():
    for split in SPLITS:
        for scene in VideoEvent().scenes(split, 24, 5):
            frames = {}
            for m in scene.marks:
                frames.setdefault(m.words, []).append(m)
            moving, flash = sorted(frames.values(), key=len, reverse=True)
            assert [m.frame for m in moving] == list(range(8)) and len(flash) == 1
            first, last = moving[0].box, moving[-1].box
            dx, dy = last.left - first.left, last.top - first.top
            way = ("right" if dx > 0 else "left") if dx else ("down" if dy > 0 else "up")
            assert abs(dx + dy) > 80 and dx * dy == 0
            answers = {
                "Which way": way,
                "What shape moves": moving[0].words[1],
                "What shape appears": flash[0].words[1],
                "What colour is the shape": flash[0].words[0],
                "Does the": "early" if flash[0].frame < 4 else "late",
            }
            assert flash[0].frame not in (3, 4) and not set(moving[0].words) & set(flash[0].words)
            for q in scene.questions:
                (expected,) = [a for start, a in answers.items() if q.prompt.startswith(start)]
                named = [w for w in re.findall(r"[a-z]+", q.prompt) if w in SHAPES]
                marks = moving if q.topic in ("direction", "moving") else flash
                assert q.answer == expected and named in ([], [marks[0].words[1]])
                assert [(e.box, e.frames) for e in q.evidence] == [(m.box, (m.frame, m.frame + 1)) for m in marks]


@pytest.mark.parametrize("task", [VideoOrder(), VideoEvent()], ids=lambda t: t.name)
def test_marks_are_in_their_frames_and_in_no_other(task):
    for scene in task.scenes("test", 6, 3):
        pixels = np.stack([np.asarray(f).astype(int) for f in scene.item])
        assert pixels.shape == (8, 224, 224, 3)
        for m in scene.marks:
            assert m.box.left >= 0 and m.box.right <= 224 and m.box.top >= 0 and m.box.bottom <= 224
            if m.kind == "shape":
                painted = (
                    np.abs(pixels[:, m.box.top : m.box.bottom, m.box.left : m.box.right] - COLOURS[m.words[0]]).max(-1) < 8
                )
                assert painted[m.frame].mean() > 0.1
        if task.name == "video_event":
            painted = painted.mean((1, 2))  # of the flash, which is the last mark
            assert np.delete(painted, m.frame).max() < painted[m.frame]


def test_the_camera_pans_over_one_photograph():
    scene = VideoEvent().scene("train", 0, 3)
    shown = np.stack([np.asarray(f.convert("L")).astype(float) for f in scene.item])
    steps = np.abs(np.diff(shown, axis=0)).mean((1, 2))
    assert (steps > 0).all() and steps.max() < 60
