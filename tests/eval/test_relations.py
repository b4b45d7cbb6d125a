"""An oracle that knows the marks' boxes and words alone answers every question of `relations`."""

import re

import numpy as np

from mmcompress.eval.tasks import SPLITS, Relations
from mmcompress.eval.tasks.draw import COLOURS

WORDS = {"1": "one", "2": "two", "3": "three", "4": "four"}


def centre(mark):
    return (mark.box.left + mark.box.right) / 2, (mark.box.top + mark.box.bottom) / 2


def answer(scene, prompt):
    by_name = {" ".join(m.words): m for m in scene.marks}
    assert len(by_name) == len(scene.marks)  # a name is one thing
    if prompt.startswith("Where"):
        x, y = centre(by_name[re.fullmatch(r"Where is the (.*)\?", prompt)[1]])
        return f"{'top' if y < scene.item.height / 2 else 'bottom'} {'left' if x < scene.item.width / 2 else 'right'}"
    if prompt.startswith("Is the"):
        a, axis, b = re.fullmatch(r"Is the (.*) (left or right of|above or below) the (.*)\?", prompt).groups()
        (ax, ay), (bx, by) = centre(by_name[a]), centre(by_name[b])
        if axis.startswith("left"):
            assert abs(ax - bx) > 40
            return "left" if ax < bx else "right"
        assert abs(ay - by) > 40
        return "above" if ay < by else "below"
    if prompt.startswith("How many"):
        kind = re.fullmatch(r"How many (.*) are there\?", prompt)[1]
        return str(sum(kind in (f"{m.words[1]}s", f"{m.words[1]}es") for m in scene.marks))
    kinds = re.fullmatch(r"Do the (.*) and the (.*) have the same colour\?", prompt).groups()
    a, b = ([m for m in scene.marks if m.words[1] == kind] for kind in kinds)
    assert len(a) == len(b) == 1
    return "yes" if a[0].words[0] == b[0].words[0] else "no"


def test_the_marks_give_every_answer():
    for split in SPLITS:
        for scene in Relations().scenes(split, 40, 5):
            assert [q.topic for q in scene.questions] == ["where", "where", "side", "height", "count", "same"]
            assert 2 <= len(scene.marks) <= 6
            for q in scene.questions:
                assert answer(scene, q.prompt) == q.answer and q.answer in q.answers
                assert {e.box for e in q.evidence} <= {m.box for m in scene.marks}
                if q.topic == "count":
                    assert len(q.evidence) == int(q.answer) and q.answers == {q.answer, WORDS[q.answer]}


def test_marks_are_where_they_are_said_to_be():
    for scene in Relations().scenes("test", 8, 6):
        pixels = np.asarray(scene.item).astype(int)
        for m in scene.marks:
            part = pixels[m.box.top : m.box.bottom, m.box.left : m.box.right]
            assert (np.abs(part - np.array(COLOURS[m.words[0]])).max(-1) < 8).mean() > 0.1
            assert m.box.right <= scene.item.width // 2 or m.box.left >= scene.item.width // 2
            assert m.box.bottom <= scene.item.height // 2 or m.box.top >= scene.item.height // 2


def test_every_count_and_picture_size_occurs():
    scenes = list(Relations().scenes("train", 60, 2))
    assert {q.answer for s in scenes for q in s.questions if q.topic == "count"} == set(WORDS)
    assert len({s.item.size for s in scenes}) == 6
