"""An oracle that knows where words and digits stand on the page answers every question of `document`."""

import numpy as np
import pytest

from mmcompress.eval.tasks import SPLITS, Document
from mmcompress.eval.tasks.document import NUMBERS, _written
from mmcompress.eval.tasks.draw import FONTS, WORDS


def in_row(scene, label):
    """What stands right of a label, from left to right."""
    middle = (label.box.top + label.box.bottom) / 2
    row = [m for m in scene.marks if m.kind != "label" and m.box.top < middle < m.box.bottom]
    assert all(m.box.left >= label.box.right for m in row)
    return "".join(m.words[0] for m in sorted(row, key=lambda m: m.box.left))


@pytest.mark.parametrize("split", SPLITS)
def test_the_marks_give_every_answer(split):
    for scene in Document().scenes(split, 40, 5):
        assert [q.topic for q in scene.questions] == ["heading", "field", "field", "number", "number"]
        labels = {m.words[0]: m for m in scene.marks if m.kind == "label"}
        assert 4 <= len(labels) <= 6
        for q in scene.questions:
            if q.topic == "heading":
                top = min(scene.marks, key=lambda m: m.box.top)
                assert top.words == (q.answer,) and q.evidence[0].box == top.box
                continue
            label = labels[q.prompt.removeprefix("What is the ").removesuffix("?")]
            assert in_row(scene, label) == q.answer and q.answer.isdigit() == (q.topic == "number")
            value, name = (e.box for e in q.evidence)
            assert name == label.box and value.left > name.right


@pytest.mark.parametrize("split", SPLITS)
def test_marks_are_ink_and_no_value_lies_across_a_middle_line(split):
    for scene in Document().scenes(split, 30, 6):
        width, height = scene.item.size
        dark = np.asarray(scene.item.convert("L")) < 110
        for m in scene.marks:
            inside = dark[m.box.top : m.box.bottom, m.box.left : m.box.right]
            assert inside.any(0).mean() > (0.3 if m.words == ("1",) else 0.6) and inside.any(1).mean() > 0.7
            if m.kind != "label":
                assert m.box.right <= width // 2 or m.box.left >= width // 2
                assert m.box.bottom <= height // 2 or m.box.top >= height // 2
        boxes = [m.box for m in scene.marks]
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                w, h = min(a.right, b.right) - max(a.left, b.left), min(a.bottom, b.bottom) - max(a.top, b.top)
                assert w <= 1 or h <= 0  # neighbouring digits share a column of pixels at most


@pytest.mark.parametrize("choices", [WORDS, NUMBERS])
def test_splits_share_no_pair_of_word_and_font(choices):
    rng = np.random.default_rng(0)
    pairs = {}
    for split, n in (("train", 16), ("test", 3)):
        pairs[split] = {(f, w) for _ in range(60) for f in range(len(FONTS)) for w in _written(rng, split, f, choices, n)}
    assert not pairs["train"] & pairs["test"] and len(pairs["train"]) + len(pairs["test"]) == len(FONTS) * len(choices)
    assert {w for _, w in pairs["train"]} == {w for _, w in pairs["test"]} == set(choices)
