"""Training and measuring of the zoo: packed questions against the stock forward, stages that resume, marks and tokens."""

import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmcompress.ask import Question, prepare
from mmcompress.eval.tasks import Box, Mark, Scene, Task, create_task
from mmcompress.eval.tasks.base import Question as TaskQuestion
from mmcompress.zoo import _build, parts_dir, verify
from mmcompress.zoo import measure as measuring
from mmcompress.zoo import train as training
from mmcompress.zoo.boxes import layout, token_boxes, token_marks
from mmcompress.zoo.eye import Eye, QwenEye, normalised, patches
from mmcompress.zoo.image import PINPOINTS
from mmcompress.zoo.lora import add_lora_, lora_state, merge_lora
from mmcompress.zoo.measure import guess, kept, measure, summary
from mmcompress.zoo.reader import Reader, arranged
from mmcompress.zoo.recipes import RECIPES, Recipe, Source, sense_of
from mmcompress.zoo.see import lesson
from mmcompress.zoo.sense import encode, hidden, store
from mmcompress.zoo.train import BUDGET, PLAN, PREFIX, _clear, _drawn, _reads, _take_over, _tower, choose, main, parts_of
from mmcompress.zoo.views import TABLES, spelled, view

ITEM = {"image": "images", "video": "videos", "audio": "audio"}


def question(task, scene, prompt):
    if task.kind == "video":
        return Question(prompt, videos=[(scene.item, list(range(len(scene.item))), task.fps)])
    return Question(prompt, **{ITEM[task.kind]: [scene.item]})


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("image", "detail:large"),
        ("image-single", "relations"),
        ("video", "video_order"),
        ("audio", "sound_order"),
        ("mrope", "relations"),
    ],
)
def test_packed_questions_read_as_the_stock_forward_does(name, task):
    model, processor = _build(name)
    of = create_task(task)
    scene = next(of.scenes("test", 1, 7))
    if name == "image":
        scene.item = scene.item.resize((448, 100))
    reader = Reader(sense_of(name, model, processor))
    asked = scene.questions[:2]
    with torch.no_grad():
        seen = reader.sense.see(scene)
        packed, right = reader(seen, asked, torch.arange(len(seen.order)))
        losses = []
        for q, ok in zip(asked, right, strict=True):
            inputs = prepare(model, processor, question(of, scene, q.prompt))
            said = processor.tokenizer(q.answer + "<|im_end|>", return_tensors="pt").input_ids
            n = said.shape[1]
            ids = torch.cat([inputs["input_ids"], said], 1)
            extra = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
            if "mm_token_type_ids" in inputs:
                extra["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, n))
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0, -n - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), said[0]))
            assert ok == bool((logits.argmax(-1) == said[0]).all())
    assert packed.item() == pytest.approx(torch.stack(losses).mean().item(), abs=2e-2)  # features were kept in half precision


def test_qwen_patches_are_the_processor_s():
    _, processor = _build("mrope")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8))
    batch = processor.image_processor(images=[picture], return_tensors="pt")
    assert batch.image_grid_thw.tolist() == [[1, 16, 16]]
    torch.testing.assert_close(patches(normalised([picture])), batch.pixel_values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(448, 448), (448, 384), (512, 640), (300, 900), (1000, 300), (231, 517)])
def test_layout_is_the_model_s_own_packing(size):
    from transformers import LlavaNextConfig, LlavaNextModel
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    class Shape:
        image_grid_pinpoints = PINPOINTS
        vision_config = type("vision", (), {"image_size": 224, "patch_size": 14})

    order, grid = layout(Shape, size)
    hw = torch.tensor([[size[1], size[0]]])
    assert grid == tuple(get_anyres_image_grid_shape((size[1], size[0]), PINPOINTS, 224))
    rows = torch.arange((1 + grid[0] * grid[1]) * 256, dtype=torch.float64).view(-1, 256, 1)
    stock = LlavaNextModel.__new__(LlavaNextModel)
    torch.nn.Module.__init__(stock)
    stock.config = LlavaNextConfig(
        vision_config={"model_type": "dinov2", "image_size": 224, "patch_size": 14}, image_grid_pinpoints=PINPOINTS
    )
    packed, _ = stock.pack_image_features([rows], hw, "default", torch.tensor([-1.0], dtype=torch.float64))
    assert torch.equal(packed[0][:, 0].long(), order)


def test_tokens_know_which_mark_they_show():
    boxes = token_boxes((448, 448), (2, 2))
    assert boxes[0].tolist() == [0, 0, 28, 28] and boxes[256].tolist() == [0, 0, 14, 14]
    assert boxes[-1].tolist() == [434, 434, 448, 448]
    label = token_marks(boxes, [Mark(Box(14, 28, 42, 42), "digit", ("7",))])
    crops = [i - 256 for i in (label == 0).nonzero()[:, 0].tolist() if i >= 256]
    assert crops == [2 * 16 + 1, 2 * 16 + 2]
    padded = token_boxes((448, 224), (2, 2))  # as wide as the canvas, half as high: 112 rows of padding above
    assert padded[256 + 8 * 16].tolist() == [0, 0, 14, 14]
    assert torch.equal(token_boxes((448, 224), None), padded[:256])


def test_views_are_deterministic_and_their_marks_named():
    (one, marks), (two, again) = view(3, 5), view(3, 5)
    assert one.tobytes() == two.tobytes() and marks == again and one.size == (224, 224)
    assert view(3, 6)[0].tobytes() != one.tobytes()
    boxes, spelt = token_boxes((224, 224), None), 0
    for i in range(30):
        picture_marks = view(0, i)[1]
        label = token_marks(boxes, picture_marks).numpy()
        for j, mark in enumerate(picture_marks):
            groups = spelled(mark, np.nonzero(label == j)[0], boxes.numpy(), 52)
            spelt += bool(groups)
            if groups:
                assert sorted(np.concatenate([t for t, _ in groups]).tolist()) == np.nonzero(label == j)[0].tolist()
            assert all(w in TABLES[t] for _, said in groups for t, w in said)
    assert spelt > 60


def read(mark, places):
    """The words of a mark's tokens, row by row."""
    boxes = token_boxes((224, 224), None)
    tokens = np.nonzero(token_marks(boxes, [mark]).numpy() == 0)[0]
    says = {int(t): " ".join(w for _, w in said) for group, said in spelled(mark, tokens, boxes.numpy(), places) for t in group}
    rows: dict[int, list[str]] = {}
    for t in sorted(says):
        rows.setdefault(t // 16, []).append(says[t])
    return [" ".join(r) for r in rows.values()]


def test_tokens_of_a_shape_spell_it_and_its_place():
    star = Mark(Box(140, 14, 182, 56), "shape", ("red", "star"))
    assert read(star, 52) == ["red star star", "top right right", "top right right"]
    assert read(star, 0) == ["red star star"] * 3
    assert read(Mark(Box(14, 140, 28, 168), "shape", ("red", "star")), 52) == ["red", "star"]
    assert read(Mark(Box(14, 140, 28, 154), "shape", ("red", "star")), 52) == ["red star"]
    assert read(Mark(Box(14, 140, 42, 168), "digit", ("7",)), 52) == ["7 7", "7 7"]


@pytest.mark.parametrize("kind", [Eye, QwenEye])
def test_a_folded_projector_is_the_trained_one(kind):
    model, _ = _build("image" if kind is Eye else "mrope")
    eye = kind(model)
    with torch.no_grad():
        x = eye.features(normalised([view(0, 0)[0]]))[0].float()
        eye.mean, eye.std = x.mean(0), x.std(0) + 1e-6
        expected, folded = eye.project(x), eye.folded()
        eye.projector.load_state_dict({n.removeprefix(eye.projector_prefix): v for n, v in folded.items()})
        eye.mean, eye.std = torch.zeros(()), torch.ones(())
        torch.testing.assert_close(eye.project(x), expected, atol=2e-3, rtol=1e-3)


def test_a_run_starts_from_another_s_parts(tmp_path):
    """What `video` takes over from `image` computes what `image` computed."""
    (one, processor), (two, _) = _build("image"), _build("video")
    first, second = sense_of("image", one, processor), sense_of("video", two, processor)
    first.eye.mean, first.eye.std = torch.randn(2304), torch.rand(2304) + 0.5
    one.model.image_newline.data.normal_()
    layers, others = (add_lora_(m.model.language_model, torch.Generator().manual_seed(s)) for s, m in enumerate((one, two)))
    for layer in layers.values():
        layer.b.data.normal_(std=0.1)
    save_file({k: v.contiguous() for k, v in first.folded().items()}, tmp_path / "projector.safetensors")
    save_file({k: v.contiguous() for k, v in lora_state(layers, PREFIX).items()}, tmp_path / "lora.safetensors")
    _take_over(tmp_path, second, others, 0)
    x = torch.randn(5, 2304)
    torch.testing.assert_close(second.project(x), first.project(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(two.model.image_newline, one.model.image_newline)
    embeds = torch.randn(1, 4, 576)
    with torch.no_grad():
        a, b = (m.model.language_model(inputs_embeds=embeds).last_hidden_state for m in (one, two))
    assert torch.equal(a, b)


class Toy:
    """An eye that knows the mark that each token shows, and a language whose words are the axes."""

    def __init__(self, views, vector, mean, wrong=False):
        self.places = 52
        out = torch.zeros(len(views), 256, len(mean))
        for b, (_, marks) in enumerate(views):
            label = token_marks(token_boxes((224, 224), None), marks)
            boxes = token_boxes((224, 224), None).numpy()
            for j, mark in enumerate(marks):
                for tokens, said in spelled(mark, np.nonzero(label.numpy() == j)[0], boxes, self.places):
                    out[b, tokens] = 8 * sum(vector[w] for _, w in said) * (-1 if wrong else 1)
        self.out, self.mean = out, mean

    def features(self, pixels):
        return self.out

    def project(self, x):
        return x + self.mean


@pytest.mark.parametrize("wrong", [False, True])
def test_lesson_rewards_what_a_token_should_say(wrong):
    words = sorted({w for t in TABLES for w in t})
    vector = dict(zip(words, torch.eye(len(words)), strict=True))
    mean = torch.full((len(words),), 0.3)
    views = [view(1, i) for i in range(4)]
    loss, right = lesson(
        Toy(views, vector, mean, wrong), views, token_boxes((224, 224), None), vector, mean, np.random.default_rng(0)
    )
    hits = [h for v in right.values() for h in v]
    assert (np.mean(hits) == 0) if wrong else (np.mean(hits) == 1 and loss < 2.5)


def test_a_step_shows_a_share_and_what_is_asked_for():
    shows = torch.zeros(1000, dtype=torch.bool)
    shows[100:120] = True
    seen = hidden(next(create_task("detail").scenes("train", 1)))
    seen.order, seen.shows = torch.arange(1000)[:, None], shows
    sizes = [(len(keep), int(shows[keep].sum())) for keep in (choose(seen, 0.1, np.random.default_rng(i)) for i in range(40))]
    assert 90 < np.mean([n for n, _ in sizes]) < 140 and {20} < {m for _, m in sizes} and min(m for _, m in sizes) > 0
    assert len(choose(seen, 1.0, np.random.default_rng(0))) == 1000


def test_some_steps_show_their_items_whole_and_the_mixture_changes():
    seen = hidden(next(create_task("relations").scenes("train", 1)))
    seen.order, seen.shows = torch.arange(200)[:, None], torch.zeros(200, dtype=torch.bool)
    recipe = Recipe((Source("detail", 1, 0.1, early=0.9), Source("relations", 1, 0.9, early=0.1)))

    def steps(progress):
        drawn = [_drawn(recipe, [[seen], [seen]], progress, np.random.default_rng(i), False, BUDGET) for i in range(80)]
        whole = [{len(keep) == 200 for _, _, keep in items} for items, _ in drawn]
        assert all(len(w) == 1 for w in whole)  # all items of a step, or none
        assert all(sum(len(k) + 24 * len(q) + 5 for _, q, k in items) <= 1.1 * BUDGET for items, _ in drawn)
        topics = [t for _, step in drawn for t in step]
        return np.mean([w == {True} for w in whole]), np.mean([t.startswith("detail") for t in topics])

    (early, detail), (late, rarely) = steps(0.2), steps(0.9)
    assert 0.02 < early < 0.2 and 0.25 < late < 0.55 and detail > 0.8 and rarely < 0.2


def test_features_of_a_start_are_those_of_its_parts(tmp_path):
    """Qwen's tower ends in the merger's norm, which ships with the projector: it must be there before scenes are encoded."""
    model, processor = _build("mrope")
    sense = sense_of("mrope", model, processor)
    for name in ("tower", "lora"):
        shutil.copyfile(parts_dir("mrope") / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    given = load_file(parts_dir("mrope") / "projector.safetensors")
    given["model.visual.merger.ln_q.weight"] = torch.full((384,), 2.0)
    save_file(given, tmp_path / "projector.safetensors")
    (tmp_path / "run").mkdir()
    _tower(Namespace(out=tmp_path / "run"), RECIPES["mrope"], sense, torch.float32, tmp_path)
    pixels = normalised([view(0, 0)[0]])
    with torch.no_grad():
        doubled = sense.eye.features(pixels)
        model.model.visual.merger.ln_q.weight.fill_(1.0)
        torch.testing.assert_close(doubled, 2 * sense.eye.features(pixels))


def test_a_language_model_starts_from_another_s(tmp_path):
    net = {"layer": torch.nn.Linear(4, 3)}
    theirs, mine = (add_lora_(torch.nn.ModuleDict(net), torch.Generator().manual_seed(i), rank=2) for i in (0, 1))
    theirs["layer"].b.data.normal_()
    save_file({k: v.contiguous() for k, v in lora_state(theirs, PREFIX).items()}, tmp_path / "lora.safetensors")
    _reads(mine, tmp_path)
    assert torch.equal(mine["layer"].a, theirs["layer"].a) and torch.equal(mine["layer"].b, theirs["layer"].b)


def test_a_model_starts_from_a_run_of_one_s_own_or_from_what_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parts_of("image") == parts_dir("image") and (parts_of("image") / "tower.safetensors").is_file()
    (tmp_path / "runs" / "image").mkdir(parents=True)
    assert parts_of("image") == parts_dir("image")  # a run that is not finished
    (tmp_path / "runs" / "image" / "run.json").write_text("{}")
    assert parts_of("image").resolve() == tmp_path / "runs" / "image"


def test_training_runs_resumes_and_measures(tmp_path, monkeypatch):
    """A few steps in two calls, on the cheapest model; the parts load and answer, blind and not; a card notes the run."""
    arguments = ["audio", "--scale", "0.007", "--threads", "1", "--dtype", "float32", "--out", str(tmp_path)]
    try:
        create_task("spoken_digits").length("test")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    main([*arguments, "--steps", "1"])
    first = (tmp_path / "answer.json").read_text()
    main([*arguments, "--steps", "2", "--resume"])
    assert json.loads(first)["step"] == 1 and json.loads((tmp_path / "answer.json").read_text())["step"] == 2
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["name"] == "audio" and not record["blind"] and record["resumed"] and record["minutes"] > 0
    model, processor = _build("audio", None, tmp_path)
    got = measure("audio", model, processor, "sound_order", 3, blind=True)
    assert got["n"] >= 3 and got["interval"][0] <= got["accuracy"] <= got["interval"][1]
    (tmp_path / "run.json").write_text(json.dumps(record | {"resumed": False, "scale": 1.0}))  # as if it were whole
    card = {"measured": {"sound_order": {"accuracy": 0.9, "n": 5}}, "sha256": {"of": "the shipped parts"}}
    card |= {"measure_seed": 0, "measure_dtype": "float32"}
    monkeypatch.setattr(measuring, "card_of", lambda name: card)
    monkeypatch.setattr(measuring, "card_file", lambda name: tmp_path / "card.json")
    measuring.main(["audio", str(tmp_path), "--again", "--threads", "1"])
    noted = json.loads((tmp_path / "card.json").read_text())
    again = noted["again"]["measured"]["sound_order"]
    assert noted["sha256"] == card["sha256"] and 5 <= again["n"] < 12 and noted["again"]["trained"]["name"] == "audio"


@pytest.mark.parametrize(("name", "blind"), [("image", False), ("mrope", False), ("video", False), ("image", True)])
def test_a_whole_recipe_runs_in_half_precision(name, blind, tmp_path, monkeypatch):
    """All stages in one process, each a step: what the first leaves behind (its gradients) does not stop the last."""
    monkeypatch.chdir(tmp_path)  # no runs there: what ships is the start
    short = ["--scale", "0.002", "--see-steps", "1", "--steps", "1", "--dtype", "bfloat16", "--threads", "1"]
    main([name, *short, "--out", "run", *(["--blind"] if blind else [])])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["answer"]["steps"] == 1 and record["blind"] == blind and not record["resumed"]
    if name == "video":
        assert record["start"] == "the trained parts of `image` are taken over (those that ship)"
    elif not blind:
        assert record["see"]["steps"] == 1 and "start" not in record
    _build(name, None, tmp_path / "run")


def test_a_run_that_goes_on_is_the_same_run(tmp_path, capsys, monkeypatch):
    """What does not fit is told before anything of an earlier run is overwritten."""
    monkeypatch.setattr(training, "train", lambda args, recipe, plan: (tmp_path / PLAN).write_text(json.dumps(plan)))
    main(["mrope", "--out", str(tmp_path)])
    main(["mrope", "--out", str(tmp_path), "--resume", "--steps", "9"])  # more steps of the last stage may be wished
    (tmp_path / "lora.safetensors").write_bytes(b"precious")
    for wrong, says in {
        "mrope --resume --seed 1": "--resume must go on with seed 0",
        "mrope --resume --scale 0.5": "with scale 1.0",
        "mrope --resume --see-steps 9": "with see_steps 560",
        "mrope --resume --blind": "with blind False",
        "image --resume": "with name 'mrope'",
        "mrope --steps 0": "must be an integer >= 1, got 0",
        "mrope --start nowhere": "--start must be a folder with tower",
        "mrope --device cuda": "--device must be cpu where there is no GPU",
        "mrope --blind --start nowhere": "not for --blind",
    }.items():
        if "cuda" in wrong and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            main([*wrong.split(), "--out", str(tmp_path)])
        assert says in capsys.readouterr().err
    assert (tmp_path / "lora.safetensors").read_bytes() == b"precious"


def test_a_new_run_leaves_nothing_of_the_old_one(tmp_path):
    old = ["run.json", "log.jsonl", "measured-image.json", "see.state", "answer.json", "hear.safetensors", "lora.safetensors"]
    for name in (*old, "notes.txt"):
        (tmp_path / name).write_text("old")
    _clear(tmp_path, str(tmp_path.resolve()))  # it starts from the parts that lie there
    assert sorted(f.name for f in tmp_path.iterdir()) == ["lora.safetensors", "notes.txt"]
    _clear(tmp_path, None)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_is_measured_as_what_it_is(tmp_path, capsys, monkeypatch):
    for name, blind in (("sighted", False), ("blind", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"name": "mrope", "blind": blind, "resumed": False, "scale": 0.5}))
    for wrong, says in {
        "mrope blind sighted": "RUN must be a run of mrope without --blind, got one of mrope with it",
        "image sighted blind": "RUN must be a run of image without --blind, got one of mrope",
        "mrope nowhere blind": "RUN must be the folder of a finished run",
        "image-single sighted": "image-single is not trained and takes no RUN",
        "mrope sighted --again": "--again needs a RUN of the whole recipe in one call",
    }.items():
        name, *folders = (x if x.startswith("-") or i == 0 else str(tmp_path / x) for i, x in enumerate(wrong.split()))
        with pytest.raises(SystemExit):
            measuring.main([name, *folders])
        assert says in capsys.readouterr().err


def test_figures_of_other_parts_or_questions_are_measured_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(measuring, "_build", lambda *_: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr(measuring, "measure", lambda *given: calls.append(given) or {"accuracy": len(calls)})
    args = Namespace(name="mrope", seed=0, dtype="float32")
    save_file({"w": torch.zeros(1)}, tmp_path / "lora.safetensors")

    def again(**changes):
        found = measuring._measured(Namespace(**vars(args) | changes), tmp_path, {"relations": 4})
        assert list(found) == ["measured"]
        return found["measured"]["relations"]["accuracy"]

    assert [again(), again(), again(seed=1), again(dtype="bfloat16"), again(dtype="bfloat16")] == [1, 1, 2, 3, 3]
    save_file({"w": torch.ones(1)}, tmp_path / "lora.safetensors")
    assert again(dtype="bfloat16") == 4


def test_a_stopped_training_is_saved_and_a_limit_in_minutes_becomes_a_number_of_steps(tmp_path, monkeypatch):
    try:
        create_task("spoken_digits").length("test")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("mmcompress.zoo.train.PACE", 1)
    arguments = ["audio", "--scale", "0.007", "--threads", "1", "--dtype", "float32", "--out", str(tmp_path), "--tokens", "300"]
    read, calls = Reader.read, []

    def third_time_stopped(self, packed):
        calls.append(len(packed.owner))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, packed)

    monkeypatch.setattr(Reader, "read", third_time_stopped)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--steps", "9"])
    assert json.loads((tmp_path / "answer.json").read_text())["step"] == 2
    main([*arguments, "--minutes", "0", "--resume"])
    assert json.loads((tmp_path / "run.json").read_text())["answer"]["steps"] == 5  # two of old, two to take the time, one more
    assert max(calls) < 1024  # --tokens


def test_items_are_arranged_where_their_rows_cost_least():
    assert arranged([170] * 6) == ([0, 170, 340, 512, 682, 852], (2, 512))
    assert arranged([250, 250]) == ([0, 256], (2, 256))
    starts, (rows, width) = arranged([1400, 30, 700])
    assert (rows, width) == (2, 1408) and starts == [0, 1408, 1438]


def test_encoded_scenes_are_kept(tmp_path):
    model, processor = _build("image-single")
    sense, task = sense_of("image-single", model, processor), create_task("relations")
    first = store(sense, task, "train", 2, 0, tmp_path)
    sense.eye = None  # nothing is computed again
    again = store(sense, task, "train", 2, 0, tmp_path)
    assert all(torch.equal(a.features, b.features) and torch.equal(a.shows, b.shows) for a, b in zip(first, again, strict=True))
    assert [q.prompt for s in first for q in s.questions] == [q.prompt for s in again for q in s.questions]


@pytest.mark.parametrize(("name", "task"), [("image", "easy_vqa"), ("mrope", "relations"), ("audio", "sound_order")])
def test_scenes_encoded_together_are_those_encoded_one_by_one(name, task, tmp_path):
    model, processor = _build(name)
    sense, of = sense_of(name, model, processor), create_task(task)
    for a, b in zip(encode(sense, of, "train", 3, 0), store(sense, of, "train", 3, 0, tmp_path), strict=True):
        assert a.length == b.length and a.questions == b.questions and a.marks == b.marks
        assert torch.equal(a.order, b.order) and torch.equal(a.position, b.position) and torch.equal(a.shows, b.shows)
        torch.testing.assert_close(a.features, b.features, rtol=1e-2, atol=1e-2)


def test_lora_merges_to_the_same_output():
    base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    state = {f"m.{n}": v.clone() for n, v in base.state_dict().items()}
    layers = add_lora_(base, torch.Generator().manual_seed(0), rank=3)
    for layer in layers.values():
        layer.b.data.normal_()
    x = torch.randn(3, 6)
    expected = base(x)
    merge_lora(state, lora_state(layers, "m."))
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    plain.load_state_dict({n.removeprefix("m."): v for n, v in state.items()})
    torch.testing.assert_close(plain(x), expected)
    with pytest.raises(ValueError, match="known weights"):
        merge_lora({}, lora_state(layers, "m."))


def test_a_summary_counts_questions_and_items():
    got = summary([[True, False], [True, True]], 0, {"b": [True], "a": [False, True, True]})
    assert (got["accuracy"], got["n"], got["items"], got["by_topic"]) == (0.75, 4, 2, {"a": 0.6667, "b": 1.0})
    assert got["interval"] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("right", "n", "meets"),
    [(50, 50, True), (47, 50, True), (44, 50, False), (395, 400, True), (400, 400, False), (389, 400, False)],
)
def test_verify_takes_what_the_card_makes_likely(monkeypatch, capsys, right, n, meets):
    card = {"sha256": {}, "measure_seed": 0, "measured": {"sounds": {"accuracy": 0.99, "interval": [0.975, 0.9975], "n": 400}}}
    monkeypatch.setattr(verify, "card_of", lambda name: card)
    monkeypatch.setattr(verify, "load", lambda name, cache_dir: (None, None))
    monkeypatch.setattr(verify, "measure", lambda *_, **__: {"accuracy": right / n, "n": n, "interval": [right / n] * 2})
    problems = verify.verify("audio", n, None)
    assert bool(problems) != meets and f"{right / n:.3f}" in capsys.readouterr().out
    if problems:
        assert "card 0.990 [0.975, 0.998]" in problems[0]


def test_verify_goes_on_behind_a_changed_part(monkeypatch, capsys):
    card = {"sha256": {"lora.safetensors": "0" * 64}, "measured": {}}
    monkeypatch.setattr(verify, "card_of", lambda name: card)
    assert verify.main(["audio", "image"]) == 1
    told = capsys.readouterr().err
    assert "audio: lora.safetensors has the hash" in told and "image: lora.safetensors has the hash" in told
    with pytest.raises(SystemExit):
        verify.main(["imagine"])
    assert "NAME must be one of asr, audio" in capsys.readouterr().err


def test_a_guess_knows_the_most_frequent_answer_of_a_wording_and_of_a_topic():
    class Coins(Task):
        def scene(self, split, seed, index):
            wording = "heads?" if split == "train" or index % 2 else "never heard?"
            said = "yes" if (index % 4 if split == "train" else index % 3) else "no"  # training: three in four
            return Scene(None, [TaskQuestion(wording, said, "coin"), TaskQuestion(split, split, split)])

    got = guess(Coins(), 12, 0, learned=16)
    assert (got["n"], got["items"]) == (12, 6)
    assert got["by_topic"] == {
        "coin": round(4 / 6, 4),
        "test": 0.0,
    }  # 0 and 3 say no; nobody taught "test"


def test_a_tenth_of_the_tokens_keeps_newlines_and_the_evidence_first():
    seen = hidden(next(create_task("detail").scenes("train", 1)))
    seen.order = torch.arange(205)[:, None]
    seen.order[[100, 204]] = -1
    seen.shows = torch.zeros(205, dtype=torch.bool)
    seen.shows[30:45] = True
    random, evidence = (kept(seen, 0.1, np.random.default_rng(0), e).tolist() for e in (False, True))
    for keep in (random, evidence):
        assert len(keep) == 20 + 2 and {100, 204} <= set(keep) and keep == sorted(set(keep))
    assert set(range(30, 45)) <= set(evidence) and len(set(random) & set(range(30, 45))) < 8
