from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmcompress.eval.tasks import (
    SPLITS,
    Detail,
    Document,
    EasyVQA,
    PhotoPresence,
    Receipts,
    Relations,
    SoundOrder,
    SpokenDigits,
    VideoEvent,
    VideoOrder,
    create_task,
    photo_paths,
)
from mmcompress.eval.tasks.detail import paint
from mmcompress.eval.tasks.draw import COLOURS, SIZES
from mmcompress.eval.tasks.easy_vqa import _facts

GENERATED = (Detail("mixed"), Relations(), Document(), VideoOrder(), VideoEvent(), SoundOrder())
"""Tasks whose answers are drawn."""
FROM_DATA = (SpokenDigits(), SpokenDigits("unseen"), PhotoPresence(), Receipts())
"""Tasks that need ../shared/data; skipped where it is absent."""
ALL = (EasyVQA(), Detail("small"), Detail("middle"), Detail("large"), *GENERATED, *FROM_DATA)


@pytest.fixture
def task(request):
    """A task whose data is here."""
    try:
        request.param.scene("train", 0, 0)
    except FileNotFoundError as e:
        pytest.skip(str(e))
    return request.param


def name(task) -> str:
    return f"{task.name}-{getattr(task, task.setting) if task.setting else ''}"


def content(item) -> bytes:
    """What a picture, a clip or a recording shows or sounds like."""
    return b"".join(frame.tobytes() for frame in item) if isinstance(item, list) else item.tobytes()


def same(a, b) -> bool:
    return (a.prompt, a.answers, a.evidence, a.topic) == (b.prompt, b.answers, b.evidence, b.topic) and content(
        a.item
    ) == content(b.item)


@pytest.mark.parametrize("task", ALL, ids=name, indirect=True)
def test_samples_are_deterministic_and_differ_by_seed_and_split(task):
    first, again, other, train = (
        task.samples(*key) for key in (("test", 6, 1), ("test", 6, 1), ("test", 6, 2), ("train", 6, 1))
    )
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(content(a.item) == content(b.item) for a in first for b in train)
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("task", ALL, ids=name, indirect=True)
@pytest.mark.parametrize("split", SPLITS)
def test_evidence_lies_inside_the_item_and_answers_score(task, split):
    for s in task.samples(split, 12, 3):
        assert s.evidence or s.answers == {"no"}  # what is not there is nowhere
        for seen in s.evidence:
            if task.kind == "audio":
                assert 0 <= seen.seconds[0] < seen.seconds[1] <= len(s.item) / task.sampling_rate
                continue
            clip = s.item if isinstance(s.item, list) else [s.item]
            first, end = seen.frames or (0, len(clip))
            assert 0 <= first < end <= len(clip) and (seen.frames is None) == (task.kind == "image")
            assert (
                0 <= seen.box.left < seen.box.right <= clip[0].width and 0 <= seen.box.top < seen.box.bottom <= clip[0].height
            )
        for answer in s.answers:
            assert task.score(s, answer) and task.score(s, f" {answer.capitalize()}.")
        assert not task.score(s, "nothing of the kind") and s.topic


CLOSED = [t for t in (*GENERATED, *FROM_DATA) if t.name != "receipts"]  # whose answers are open: 25 of each topic


@pytest.mark.parametrize("task", CLOSED, ids=name, indirect=True)
def test_a_blind_guess_stays_near_chance(task):
    """The best fixed answer to a prompt of another seed, and to a topic of this one, are right as rarely as `chance` says."""
    asked, known = task.samples("test", 300, 11), task.samples("train", 300, 12)
    by_prompt = {}
    for s in known:
        by_prompt.setdefault(s.prompt, Counter())[min(s.answers)] += 1
    blind = [by_prompt[s.prompt].most_common(1)[0][0] in s.answers for s in asked if s.prompt in by_prompt]
    assert np.mean(blind) < task.chance + 0.08
    by_topic = {}
    for s in asked:
        by_topic.setdefault(s.topic, Counter())[min(s.answers)] += 1
    guessed = sum(c.most_common(1)[0][1] for c in by_topic.values()) / len(asked)
    assert abs(guessed - task.chance) < 0.08, (guessed, task.chance, by_topic)


def test_detail_shows_each_mark_whole_in_one_quarter_and_nothing_overlaps():
    for scene in Detail("mixed").scenes("train", 40, 5):
        picture, marks = scene.item, scene.marks
        assert [m.kind for m in marks] == ["word", "digit", "shape", "shape"]
        for m in marks:
            assert m.box.right <= picture.width // 2 or m.box.left >= picture.width // 2
            assert m.box.bottom <= picture.height // 2 or m.box.top >= picture.height // 2
        for i, a in enumerate(marks):
            for b in marks[i + 1 :]:
                apart = (
                    a.box.right < b.box.left or b.box.right < a.box.left or a.box.bottom < b.box.top or b.box.bottom < a.box.top
                )
                assert apart


@pytest.mark.parametrize("size", [(512, 640), (384, 448)])
def test_a_long_word_on_a_narrow_picture_stays_in_its_quarter(size):
    widths = []
    for seed in range(12):
        (mark,) = paint(np.random.default_rng(seed), Image.new("RGB", size), [("word", ("money",))], [(60, 60)])
        assert mark.box.right <= size[0] // 2 or size[0] // 2 <= mark.box.left < mark.box.right <= size[0]
        widths.append(mark.box.right - mark.box.left)
    assert max(widths) == size[0] // 2 - 8  # some had to be made smaller


def test_detail_paints_what_it_says():
    """The evidence of "What colour is ...?" holds that colour, and the picture without its marks does not equal it."""
    seen = 0
    for s in Detail("large").samples("test", 16, 0):
        if s.prompt.startswith("What colour"):
            pixels = np.asarray(s.item.crop(s.evidence[0].box)).reshape(-1, 3).astype(int)
            colour = np.array(COLOURS[next(iter(s.answers))])
            assert (np.abs(pixels - colour).max(-1) < 8).mean() > 0.1
            seen += 1
    assert seen == 4


def test_sizes_are_a_dial():
    heights = [
        np.median([m.box.bottom - m.box.top for scene in Detail(s).scenes("test", 8) for m in scene.marks]) for s in SIZES
    ]
    assert heights == sorted(heights) and heights[2] > 2 * heights[0]


def test_splits_share_no_picture():
    assert not {p.name for p in photo_paths("train")} & {p.name for p in photo_paths("test")}
    train, test = ({s.item.tobytes() for s in EasyVQA(64).samples(split, 200, 0)} for split in SPLITS)
    assert not train & test


def test_photos_folder_is_split_too(tmp_path):
    for i in range(5):
        Image.new("RGB", (500, 480), (i * 40, 90, 20)).save(tmp_path / f"{i}.png")
    assert [p.name for p in photo_paths("test", tmp_path)] == ["4.png"]
    assert len(Detail("small", photos=tmp_path).samples("train", 2)) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="photos"):
        photo_paths("train", tmp_path / "empty")


def test_score_wants_the_word_not_a_part_of_it():
    task, sample = Detail(), Detail("large").samples("test", 1)[0]
    sample.answers = frozenset({"no"})
    assert task.score(sample, "No, there is none") and not task.score(sample, "Not at all") and not task.score(sample, "")


def test_easy_vqa_facts():
    facts = _facts(
        [("Is there not a red shape?", "no"), ("Does the image contain a circle?", "yes"), ("Is a teal shape present?", "no")]
    )
    assert facts == ("red", "circle")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: create_task("detial"), "did you mean 'detail'"),
        (lambda: Detail("huge"), "size must be one of"),
        (lambda: create_task("detail", sise="small"), r"task detail does not take \['sise'\]"),
        (lambda: create_task("detail:small", size="large"), "name its size once, got 'detail:small' and 'large'"),
        (lambda: SpokenDigits("all"), "speakers must be one of"),
        (lambda: Detail().samples("validation", 3), "split must be one of"),
        (lambda: EasyVQA().samples("test", 0), "n must be"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("task", FROM_DATA, ids=name)
def test_missing_data_is_named(task, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"the task {task.name} needs .*shared/data"):
        type(task)(data=tmp_path).scene("train", 0, 0)


def test_what_follows_a_colon_is_the_main_setting():
    assert create_task("detail:small").size == "small"
    with pytest.raises(ValueError, match="without a colon"):
        create_task("easy_vqa:64")
