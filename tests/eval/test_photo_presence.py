"""The label files, read anew, answer every question of `photo_presence`."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mmcompress.eval.tasks import SPLITS, PhotoPresence
from mmcompress.eval.tasks.photo_presence import article, plural

FOLDER = Path(__file__).parents[3] / "shared/data/coco128"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/data/coco128")


def labels():
    """A photograph's pixels, small -> (its labels [n, 5], mirrored or not)."""
    out = {}
    for text in sorted((FOLDER / "object_detection/labels/train2017").glob("*.txt")):
        path = FOLDER / "images/train2017" / f"{text.stem}.jpg"
        rows = np.array([line.split() for line in text.read_text().splitlines()], dtype=float).reshape(-1, 5)
        if path.is_file():
            picture = np.asarray(Image.open(path).convert("RGB"))
            mirrored = rows.copy()
            mirrored[:, 1] = 1 - rows[:, 1]
            out[picture.tobytes()], out[picture[:, ::-1].tobytes()] = rows, mirrored
    return out


def test_the_labels_give_every_answer():
    known = labels()
    names = yaml.safe_load((FOLDER / "object_detection/config.yaml").read_text())["names"]
    topics = Counter()
    for split in SPLITS:
        for scene in PhotoPresence().scenes(split, 40, 5):
            rows = known[scene.item.tobytes()]
            for q in scene.questions:
                topics[q.topic] += 1
                kind = [k for k, n in names.items() if f" {article(n)} " in q.prompt or f" {plural(n)} are" in q.prompt]
                kind += [k for k, n in names.items() if q.prompt == f"Is the {n} in the left or right half of the picture?"]
                own = rows[rows[:, 0] == max(kind, key=lambda k: len(names[k]))]  # "a traffic light" is longer than "a light"
                if q.topic == "presence":
                    assert q.answer == ("yes" if len(own) else "no") and len(q.evidence) == len(own)
                elif q.topic == "count":
                    assert q.answer == str(len(own)) == str(len(q.evidence)) and len(q.answers) == 2
                else:
                    assert len(own) == 1 and q.answer == ("left" if own[0, 1] < 0.5 else "right")
                    box, width = q.evidence[0].box, scene.item.width
                    assert box.right <= width / 2 + 1 or box.left >= width / 2 - 1
                for seen, (_, x, y, _, _) in zip(q.evidence, own, strict=True):
                    assert seen.box.left - 1 <= x * scene.item.width <= seen.box.right + 1
                    assert seen.box.top - 1 <= y * scene.item.height <= seen.box.bottom + 1
    assert set(topics) == {"presence", "count", "half"}


def test_answers_are_balanced_and_chance_is_exact():
    task = PhotoPresence()
    samples = task.samples("test", 1000, 1)
    answers = {t: Counter(min(s.answers) for s in samples if s.topic == t) for t in ("presence", "count")}
    assert len(set(answers["presence"].values())) == 1 and set(answers["count"]) == {"1", "2", "3"}
    assert len(set(answers["count"].values())) == 1
    guess = sum({"presence": 1 / 2, "half": 1 / 2, "count": 1 / 3}[s.topic] for s in samples) / len(samples)
    assert task.chance == pytest.approx(guess)


def test_words():
    assert [article(n) for n in ("dog", "apple", "skis")] == ["a dog", "an apple", "a pair of skis"]
    assert [plural(n) for n in ("dog", "bus", "wine glass", "person", "bench")] == [
        "dogs",
        "buses",
        "wine glasses",
        "people",
        "benches",
    ]
