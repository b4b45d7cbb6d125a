"""The evaluation loop and the benchmark on tiny models. Oracles: the stock `generate` loop, one question at a time, and
intervals that can be worked out by hand."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image

from mmcompress import create
from mmcompress.ask import Question, prepare
from mmcompress.compressor import Scorer
from mmcompress.eval import answers, bench, bootstrap, loop, paired, run, sweep
from mmcompress.eval.answers import answer, reads_text, shared_length
from mmcompress.eval.bench import Sweep
from mmcompress.eval.encoder import encode_once
from mmcompress.eval.evidence import evidence_recall
from mmcompress.eval.tasks import Evidence, Scene, Task
from mmcompress.eval.tasks.base import Box
from mmcompress.eval.tasks.base import Question as Asked
from mmcompress.io import save_pretrained
from mmcompress.ledger import Decoder

WORDS = ("w20 w21", "w30 w31 w32 w33 w34", "w40", "w50 w51 w52")
STEPS = 6


class Tiny(Task):
    """Noise with four questions of different lengths; every second answer is what the uncompressed model says."""

    name, chance = "tiny", 0.25

    def __init__(self, kind="image", known=None):
        self.kind, self.known = kind, known or {}

    def scene(self, split, seed, index):
        rng = np.random.default_rng([seed, index])
        if self.kind == "audio":
            item = rng.normal(size=12000).astype("float32")
        else:
            pictures = [Image.fromarray(rng.integers(0, 255, (40 + 4 * index, 56, 3), dtype=np.uint8)) for _ in range(4)]
            item = pictures if self.kind == "video" else pictures[0]
        seen = (Evidence(Box(0, 0, 9, 9)),)
        said = [self.known.get((index, q), "nothing") if i % 2 else "nothing" for i, q in enumerate(WORDS)]
        return Scene(item, [Asked(q, a, f"topic {i % 2}", seen) for i, (q, a) in enumerate(zip(WORDS, said, strict=True))])


class Reads(Scorer):
    """Scores by one encoder signal."""

    signal: str = "keys"

    @property
    def reads(self):
        return (self.signal,)

    def score(self, tokens):
        s = tokens.signals[self.signal].float()
        return s if s.dim() == 2 else s.sum(-1)


def pair(family):
    from mmcompress.testing import tiny_model

    return tiny_model(family), checkpoints.PROCESSORS[family]()


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(family):
        if family not in made:
            made[family] = pair(family)
        return made[family]

    return get


@torch.inference_mode()
def stock(model, processor, prompt, compressor, decode=None):
    """Text, ledger and trace of one question by stock `generate`."""
    with compressor(model) as installed:
        out = model.generate(**prompt, max_new_tokens=STEPS, do_sample=False)
        new = out[0, prompt["input_ids"].shape[1] :]
        text = (decode or processor.tokenizer.decode)(new, skip_special_tokens=True).strip()
        return text, installed.ledger.samples[0], installed.items[0]


def known_answers(model, processor, task, n):
    """(scene, prompt) -> the uncompressed model's first word."""
    out = {}
    for i, scene in enumerate(task.scenes("test", n)):
        for q in scene.questions:
            asked = loop.question(task, SimpleNamespace(prompt=q.prompt, item=scene.item), processor)
            out[i, q.prompt] = stock(model, processor, prepare(model, processor, asked), create("none"))[0].split()[0]
    return out


# one reading for all questions

STAGES = {
    "none": lambda: create("none"),
    "random": lambda: create("random_keep", keep_ratio=0.3),
    "cls": lambda: create("k_center", keep_ratio=0.5),
    "merge inside": lambda: create("pooling", keep_ratio=0.3, layer=2),
    "before and inside": lambda: create("k_center", keep_ratio=0.5) | create("pooling", keep_ratio=0.5, layer=2),
    "twice inside": lambda: create("tome", keep_ratio=0.5, layer=0.5) | create("uniform_keep", keep_ratio=0.5, layer=3),
    "reads the text": lambda: create("todre", keep_ratio=0.3, threshold=0.9),
}
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen2_audio")


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_reading_equals_one_by_one(models, family, stages, monkeypatch):
    """Token ids, counts and traces; the batch is padded (questions differ in length) and split (batch_size 3)."""
    model, processor = models(family)
    compressor = STAGES[stages]()
    task = Tiny("audio" if family == "qwen2_audio" else "image")
    scene = task.scene("test", 0, 1)
    ask = [loop.question(task, SimpleNamespace(prompt=q.prompt, item=scene.item), processor) for q in scene.questions]
    prompts = [prepare(model, processor, q) for q in ask]
    shared, share = [], answers._share
    monkeypatch.setattr(answers, "_share", lambda *a: shared.append(1) or share(*a))
    decode = lambda ids, **_: str([int(i) for i in ids])  # noqa: E731
    raw = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=processor.tokenizer.pad_token_id, decode=decode))
    got = answer(model, raw, prompts, compressor, STEPS, batch_size=3)
    assert bool(shared) == (stages != "reads the text") == (not reads_text(compressor))
    for reply, prompt in zip(got, prompts, strict=True):
        text, count, item = stock(model, raw, prompt, compressor, decode)
        assert (reply.text, reply.counts) == (text, [count])
        assert torch.equal(reply.item.assignment, item.assignment) and torch.equal(reply.item.anchor, item.anchor)
    assert len({r.text for r in got}) > 1


def test_prompts_that_cannot_share(models):
    model, processor = models("llava")
    a, b = (Image.new("RGB", (30, 30), c) for c in ("red", "blue"))
    one, other = (prepare(model, processor, Question("w20", [p])) for p in (a, b))
    two = prepare(model, processor, Question("w20", [a, b]))
    assert shared_length(model, [one, other]) == one["input_ids"].shape[1] - 2  # a mark and a word
    assert shared_length(model, [one, two]) == 0
    assert shared_length(model, [{**one, "attention_mask": torch.zeros_like(one["attention_mask"])}]) == 0
    ends = {k: v[:, :-2] if v.dim() == 2 else v for k, v in one.items()}
    assert shared_length(model, [one, ends]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_runs_once_and_signals_stay_the_same(models, family):
    model, processor = models(family)
    task = Tiny("audio" if family == "qwen2_audio" else "image")
    samples = task.samples("test", 8, 0)
    prompts = [prepare(model, processor, loop.question(task, s, processor)) for s in (samples[0], samples[4])]
    wanted = [r for r in ("cls_logits", "keys", "tower") if r != "cls_logits" or family.startswith("llava")]
    makes = [create("none"), *(Reads(signal=r, keep_ratio=0.4) for r in wanted)]
    plain = [[stock(model, processor, p, c)[0::2] for c in makes] for p in prompts]
    with encode_once(model) as once:
        for prompt, expected in zip(prompts, plain, strict=True):
            hits = once.hits
            for compressor, (text, item) in zip(makes, expected, strict=True):
                again, _, trace = stock(model, processor, prompt, compressor)
                assert again == text and torch.equal(trace.assignment, item.assignment)
            assert once.hits - hits == len(makes) - 1  # another item is no hit
        with pytest.raises(RuntimeError, match="inference"), create("none")(model):
            model(**{k: v.clone() for k, v in prompts[0].items()})
    assert not any("forward" in m.__dict__ for m in model.modules())


# statistics


def test_bootstrap_by_hand():
    # of 4 items one is right: k of 4 draws are right with probability C(4, k) 3^(4-k) / 256, so that
    # P(k <= 2) = 243/256 < 0.975 <= P(k <= 3)
    assert bootstrap([1, 0, 0, 0], [0, 1, 2, 3]) == (0, 0.75)
    # two items redrawn whole: both, or one of them twice with probability 1/4
    assert bootstrap([1, 1, 0, 0, 0, 0], [7, 7, 2, 2, 2, 2]) == (0, 1)
    # as if they were independent, these six could not all be right in 2.5 % of the draws
    assert bootstrap([1, 1, 0, 0, 0, 0], range(6))[1] < 1
    assert bootstrap([0.5] * 5, [0, 0, 1, 1, 1]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="one length"):
        bootstrap([1, 0], [0])


def test_bootstrap_of_single_questions_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).random(60)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1))
    assert np.allclose(bootstrap(values, range(60)), theirs.confidence_interval, atol=0.004)


def result(scores, items=None, samples="s", **more):
    items = list(range(len(scores))) if items is None else items
    common = {"model": "m", "task": "t", "compressor": {"method": "none"}, "seed": 0}
    return loop.Result(**common, samples=samples, scores=scores, items=items, topics=["a"] * len(scores), **more)


def test_a_paired_difference_by_hand(monkeypatch):
    monkeypatch.setattr(loop, "LEAST_ITEMS", 1)
    a, b = result([1, 1, 1, 0]), result([1, 0, 1, 0])
    gap = paired(a, b)  # one of four questions differs: the interval of the first case above
    assert (gap.mean, gap.low, gap.high, gap.beyond) == (0.25, 0, 0.75, False)
    assert paired(b, a).mean == -0.25
    # pairs leave no spread where every question gains the same, though each side alone varies
    gap = paired(result([1.0, 0.5, 0.75]), result([0.75, 0.25, 0.5]))
    assert (gap.mean, gap.low, gap.high, gap.beyond) == (0.25, 0.25, 0.25, True)
    # of several seeds the mean of each question
    assert paired(result([1, 0]), [result([1, 0]), result([0, 0])]).mean == 0.25
    with pytest.raises(ValueError, match="same samples"):
        paired(a, result([1, 0, 0, 0], samples="others"))


def test_few_items_tell_no_interval():
    """Of one picture every redrawing is the same: an interval without width, and a star, would say that it is certain."""
    a, b = result([1, 1, 1, 1], [0, 0, 0, 0]), result([0, 0, 0, 0], [0, 0, 0, 0])
    gap = paired(a, b)
    assert gap.mean == 1 and gap.low != gap.low and not gap.beyond and bench.gap(gap) == "+100.0"
    line = json.loads(json.dumps(a.to_json() | {"differences": {"none": gap.to_json()}}, allow_nan=False))
    assert line["interval"] == [None, None] == line["differences"]["none"]["interval"]
    again = loop.Result.from_json(line)
    assert np.isnan(again.interval).all() and np.isnan(again.differences["none"].low)
    six = result([1] * 6), result([0] * 6)
    assert paired(*six).beyond and six[0].interval == (1, 1)  # from here on the same sign six times is told


# the loop


def test_accuracy_and_counts_equal_a_stock_loop(models, tmp_path):
    model, processor = models("llava_next")
    task = Tiny(known=known_answers(model, processor, Tiny(), 3))
    compressor, n = create("k_center", keep_ratio=0.25), 10
    out = tmp_path / "lines.jsonl"
    (got,) = run(model, task, compressor, n, processor=processor, out=out, max_new_tokens=STEPS, progress=False)
    scores, recall, flops, kept = {}, [], 0, 0
    for s in task.samples("test", n):
        prompt = prepare(model, processor, Question(s.prompt, [s.item]))
        for name, c in {"mine": compressor, "none": create("none"), "random": create("random_keep", keep_ratio=0.25)}.items():
            text, count, item = stock(model, processor, prompt, c)
            scores.setdefault(name, []).append(float(task.score(s, text)))
            if name == "mine":
                flops += Decoder.of(model.config.text_config).flops(count.rows(4))
                kept += len(item.anchor)
                recall.append(evidence_recall(item, s, s.item.size))
    assert got.recall == recall and 0 < got.evidence_recall < 1
    assert got.scores == scores["mine"] and got.items == [0] * 4 + [1] * 4 + [2] * 2 and got.shared
    assert np.mean(scores["none"]) == 0.5 != got.accuracy
    assert got.accuracy == np.mean(scores["mine"])
    assert got.differences["none"].mean == pytest.approx(np.mean(scores["mine"]) - 0.5)
    assert got.differences["random_keep"].mean == pytest.approx(np.mean(scores["mine"]) - np.mean(scores["random"]))
    assert (got.ledger["flops"], got.ledger["tokens_kept"], got.ledger["prefills"]) == (flops, kept, n)
    assert got.by_topic["topic 0"] == (0, 5) and got.by_topic["topic 1"][1] == 5
    line = json.loads(out.read_text())
    assert line["n"] == n and line["compressor"] == compressor.config() and line["questions_per_item"] == [4, 4, 2]
    assert {"torch", "transformers", "cpu", "threads", "dtype", "device", "weights"} <= set(line["environment"])
    again = loop.Result.from_json(line)
    assert again.key == got.key and again.scores == got.scores
    np.testing.assert_equal(again.interval, got.interval)
    assert again.differences["none"].mean == pytest.approx(got.differences["none"].mean, abs=1e-4)


def test_evidence_recall_is_the_mean_of_what_is_known():
    assert result([1, 0, 1], recall=[0.5, float("nan"), 1.0]).evidence_recall == 0.75
    assert np.isnan(result([1], recall=[float("nan")]).evidence_recall)


@pytest.mark.parametrize(("family", "kind"), [("qwen2_5_vl", "video"), ("qwen2_audio", "audio")])
def test_clips_and_recordings_and_scores_between_0_and_1(models, family, kind):
    model, processor = models(family)

    class Soft(Tiny):
        def score(self, sample, text):
            return 0.25 if sample.prompt == WORDS[0] else 0.5

    found = sweep(model, processor, Soft(kind), [create("none"), create("pooling", keep_ratio=0.5)], 5, progress=False)
    for one in found:
        assert one.scores == [0.25, 0.5, 0.5, 0.5, 0.25] and one.accuracy == 0.4
        assert loop.Result.from_json(json.loads(json.dumps(one.to_json()))).scores == one.scores
    assert found[0].ledger["tokens_kept"] > found[1].ledger["tokens_kept"]


def test_what_does_not_run(models):
    model, processor = models("llava")
    with pytest.raises(ValueError, match="asks about audio items, LlavaForConditionalGeneration takes image"):
        run(model, Tiny("audio"), processor=processor)
    with pytest.raises(ValueError, match="vidcom2 compresses video"):
        run(model, Tiny(), create("vidcom2"), 2, processor=processor, progress=False)
    with pytest.raises(ValueError, match="processor"):
        run(model, Tiny())
    with pytest.raises(ValueError, match="dtype must be one of"):
        loop.pick_dtype("float8")
    found = sweep(model, processor, Tiny(), [create("global_guided"), create("none")], 2, progress=False)
    assert "crops" in found[0].error and found[0].n == 0 and found[1].error is None and found[1].n == 2


def test_what_fails_on_a_later_item_has_no_half_result(models, monkeypatch):
    from mmcompress.eval import answers

    model, processor = models("llava")
    real, calls = answers.answer, []

    def second_time_refused(*given):
        calls.append(given)
        if len(calls) == 2:
            raise ValueError("no tokens left")
        return real(*given)

    monkeypatch.setattr(answers, "answer", second_time_refused)
    (found,) = sweep(model, processor, Tiny(), [create("none")], 8, progress=False)
    assert len(calls) == 2 and found.error == "no tokens left"
    assert found.n == 0 and not found.items and not found.topics and not found.recall and found.accuracy != found.accuracy


def test_auto_takes_bfloat16_only_where_it_is_fast(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert loop.pick_dtype("auto") == (torch.bfloat16 if fast else torch.float32)


# the benchmark


@pytest.fixture
def bencher(models, monkeypatch, tmp_path):
    """bencher(**changes) -> a report of the tiny task, and the compressors that were measured for it."""
    model, processor = models("llava_next")
    task = Tiny(known=known_answers(model, processor, Tiny(), 2))
    monkeypatch.setattr("mmcompress.eval.tasks.create_task", lambda name: {"tiny": task, "sound": Tiny("audio")}[name])
    monkeypatch.setattr(loop, "MAX_NEW_TOKENS", STEPS)
    real = sweep

    def go(load=None, timing=False, fresh=False, progress=False, plans=None, **changes):
        measured = []

        def counted(model, processor, task, compressors, *rest, **more):
            measured.extend((c.config()["method"], c.config()["keep_ratio"]) for c in compressors)
            return real(model, processor, task, compressors, *rest, **more)

        monkeypatch.setattr(loop, "sweep", counted)
        plan = {"models": ["m"], "tasks": ["tiny"], "methods": ["pooling"], "keep_ratio": [0.5, 0.25], "n": 8, **changes}
        load = load or (lambda name, dtype: (model, processor))
        sweeps = [Sweep(**plan | more) for more in plans or [{}]]
        report = bench.bench(sweeps, tmp_path, load=load, timing=timing, fresh=fresh, progress=progress)
        return report, measured

    go.folder, go.model, go.processor = tmp_path, model, processor
    return go


ALL = [("none", 0.25), *((m, r) for m in ("random_keep", "uniform_keep", "pooling") for r in (0.5, 0.25))]


def test_a_benchmark_adds_its_controls_and_resumes(bencher):
    report, measured = bencher()
    assert measured == ALL
    table = (bencher.folder / "table.md").read_text()
    again, measured = bencher()
    assert measured == [] and (bencher.folder / "table.md").read_text() == table
    assert [r.accuracy for r in again.rows] == [r.accuracy for r in report.rows]
    lines = bencher.folder / "results.jsonl"
    kept = lines.read_text().splitlines()
    lines.write_text("\n".join(kept[:5]) + "\n" + kept[5][:40])  # stopped while it wrote
    assert bencher()[1] == ALL[5:]
    assert bencher(n=7)[1] == ALL  # other questions
    assert bencher(keep_ratio=[0.5, 0.1])[1] == [(m, 0.1) for m in ("random_keep", "uniform_keep", "pooling")]
    assert bencher(fresh=True)[1] == ALL
    from mmcompress.testing import tiny_model

    assert bencher(load=lambda name, dtype: (tiny_model("llava_next", seed=1), bencher.processor))[1] == ALL  # other weights


def test_what_is_not_measured_again_is_named(bencher, capsys, monkeypatch):
    bencher(progress=True, keep_ratio=[0.25])
    assert "--fresh" not in capsys.readouterr().err
    bencher(progress=True, keep_ratio=[0.25, 0.5])
    told = capsys.readouterr().err
    assert "4 measurements were taken from" in told and "other" not in told and "--fresh measures them again" in told
    monkeypatch.setattr(loop, "code_version", lambda: "another")
    bencher(progress=True, keep_ratio=[0.25])
    assert "4 of them by another state of the code" in capsys.readouterr().err


def test_two_sweeps_that_ask_the_same_count_once(bencher):
    once = bencher(seeds=[0, 1, 2])[0]
    twice = bencher(plans=[{"seeds": [0]}, {"seeds": [0, 1, 2]}])[0]
    assert [(r.label, r.ratio, r.seeds, r.accuracy) for r in once.rows] == [
        (r.label, r.ratio, r.seeds, r.accuracy) for r in twice.rows
    ]
    apart = bencher(plans=[{"n": 8}, {"n": 7}])[0]
    assert "m, tiny: 8 questions" in bench.text(apart) and "m, tiny: 7 questions" in bench.text(apart)


def test_pieces_of_other_code_are_measured_again(bencher, monkeypatch):
    monkeypatch.setattr(bench, "PIECE", 1)
    real, calls = loop.append, []

    def stop(path, results):
        real(path, results)
        calls.append(path.name)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        bencher()
    monkeypatch.setattr(loop, "code_version", lambda: "another")
    assert bencher()[1] == ALL + ALL  # both items


def test_a_sweep_that_was_stopped_goes_on_item_by_item(bencher, monkeypatch):
    whole = bencher()[0]
    monkeypatch.setattr(bench, "PIECE", 1)
    real, calls = loop.append, []

    def stop(path, results):
        calls.append(path.name)
        real(path, results)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "append", stop)
    (bencher.folder / "results.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        bencher()
    assert calls == ["results.pieces.jsonl"]
    again, measured = bencher()
    assert measured == ALL  # the second item only: each compressor once
    assert not (bencher.folder / "results.pieces.jsonl").exists()
    for (_, a), (_, b) in zip(again.results, whole.results, strict=True):
        assert (a.scores, a.items, a.topics, a.key) == (b.scores, b.items, b.topics, b.key)
        assert a.ledger == b.ledger and a.recall == pytest.approx(b.recall, abs=1e-5)  # a file holds five decimals
        assert a.shared


def test_rows_average_seeds_and_pair_with_the_controls(bencher):
    report, _ = bencher(seeds=[0, 1], methods=["pooling", {"method": "k_center", "seed": 3}], keep_ratio=[0.25])
    rows = {r.label: r for r in report.rows}
    assert list(rows) == ["none", "random_keep", "uniform_keep", "pooling", "k_center"]
    assert [r.seeds for r in rows.values()] == [1, 2, 1, 1, 1]
    of = {(s.label, r.compressor.get("seed")): r for s, r in report.results}
    random = np.mean([of["random_keep", 0].scores, of["random_keep", 1].scores], 0)
    assert of["random_keep", 0].scores != of["random_keep", 1].scores
    assert rows["random_keep"].accuracy == random.mean() and rows["none"].accuracy == 0.5
    assert rows["k_center"].to_random.mean == pytest.approx(np.mean(of["k_center", 3].scores) - random.mean())
    assert rows["k_center"].to_none.mean == pytest.approx(rows["k_center"].accuracy - 0.5)
    assert rows["none"].to_none is None and rows["random_keep"].to_random is None
    none, few = rows["none"], rows["pooling"]
    assert none.tokens_kept == none.tokens_in and none.flops_share == 1
    assert few.separators > 0 and few.sequence_in - few.sequence == few.tokens_in - few.tokens_kept


def test_a_benchmark_reports_what_did_not_run(bencher):
    report, _ = bencher(methods=["vidcom2", "pooling"], keep_ratio=[0.25])
    assert [(o["label"], o["ratio"]) for o in report.not_run] == [("vidcom2", 0.25)]
    assert "not run: vidcom2 at 0.25 on m, tiny: vidcom2 compresses video" in bench.text(report)
    with pytest.raises(ValueError, match="task tiny asks about audio items"):
        bencher(tasks=["sound"])
    (bencher.folder / "results.jsonl").unlink()
    with pytest.raises(ValueError, match="task tiny asks about audio items"):
        bencher(tasks=["tiny", "sound"])
    assert not (bencher.folder / "results.jsonl").exists()  # told before anything is measured
    with pytest.raises(ValueError, match="task sound asks about audio items, which none of"):
        bencher(models=["m", "o"], tasks=["tiny", "sound"])
    for name, wrong in {"n": 0, "seeds": [], "keep_ratio": [2], "methods": ["nothing"], "models": "m"}.items():
        with pytest.raises(ValueError, match=name if name != "methods" else "unknown method"):
            bencher(**{name: wrong})


def test_the_files_of_a_benchmark(bencher):
    report, _ = bencher(timing=True, keep_ratio=[0.25])
    shown = json.loads((bencher.folder / "results.json").read_text())
    assert [r["label"] for r in shown["rows"]] == ["none", "random_keep", "uniform_keep", "pooling"]
    assert shown["rows"][3]["to_none"]["mean"] == pytest.approx(report.rows[3].to_none.mean, abs=1e-4)
    assert all(set(r["scores"]) <= {"0", "1"} and len(r["scores"]) == 8 for r in shown["results"])
    assert Image.open(bencher.folder / "plot.png").size[0] > 400
    table = (bencher.folder / "table.md").read_text()
    header = next(line for line in table.splitlines() if line.startswith("| method"))
    assert all(name in header for name in ("95 %", "separators", "FLOPs %", "evidence %", "to random_keep", "own cost"))
    times = {t["label"]: t for t in shown["timing"]}
    assert times["none"]["share"] == 1 and times["none"]["own"] == 0
    assert 0 < times["pooling"]["own_ms"] < times["pooling"]["ms"] and times["pooling"]["sequence"] < times["none"]["sequence"]
    assert not any("forward" in m.__dict__ for m in bencher.model.modules())


def test_presets(tmp_path):
    for path in bench.PRESETS.glob("*.json"):
        sweeps, stem, dtype = bench.load_preset(path.stem)
        assert sweeps and stem.name == path.stem and stem.parent.name == "results"
    own = tmp_path / "mine.json"
    own.write_text(json.dumps({"sweeps": [{"models": ["image"], "tasks": ["detail"], "methods": ["tome"]}]}))
    (one,), stem, dtype = bench.load_preset(str(own))
    assert dtype == "float32"
    assert stem == Path("runs/bench/mine") and [s.label for s in one.settings()][-1] == "tome"
    own.write_text(json.dumps({"sweeps": [{"modles": ["image"]}]}))
    with pytest.raises(ValueError, match="modles"):
        bench.load_preset(str(own))
    own.write_text('{"sweeps": [')
    with pytest.raises(ValueError, match=r"mine\.json is not valid JSON"):
        bench.load_preset(str(own))
    own.write_text('{"sweeps": []}')
    with pytest.raises(ValueError, match=r"must hold 'sweeps', a list of .*: got \[\]"):
        bench.load_preset(str(own))
    with pytest.raises(ValueError, match="preset must be"):
        bench.load_preset("no_such_preset")


def test_a_chain_and_fields_in_a_plan():
    chain = {
        "chain": [{"method": "k_center", "keep_ratio": 0.5}, {"method": "pooling", "keep_ratio": 0.5, "layer": 2}],
        "ratio": 0.25,
    }
    plan = Sweep(["m"], ["t"], [chain, {"method": "pooling", "layer": 4, "label": "late"}, "relevance_drop"], [0.5])
    made = {(s.label, s.ratio): s.compressor for s in plan.settings()}
    controls = [(m, r) for m in ("random_keep", "uniform_keep") for r in (0.25, 0.5)]
    assert list(made) == [("none", None), *controls, ("k_center | pooling", 0.25), ("late", 0.5), ("relevance_drop", None)]
    assert made["late", 0.5].layer == 4 and len(made["k_center | pooling", 0.25].stages) == 2


def test_one_label_is_one_configuration(bencher):
    """Two configurations under one label would be averaged as if they were seeds."""
    other = {"method": "dpc_knn", "num_neighbors": 3, "label": "dpc_knn"}
    with pytest.raises(ValueError, match="label must be of one configuration at one ratio, but for its seed, got 'dpc_knn'"):
        Sweep(["m"], ["t"], ["dpc_knn", other])
    chains = [{"chain": [{"method": "pooling", "keep_ratio": r}, {"method": "k_center", "layer": 2}]} for r in (0.5, 0.25)]
    with pytest.raises(ValueError, match=r"got 'pooling \| k_center'"):
        Sweep(["m"], ["t"], chains)
    for name in ("random_keep", "none"):
        with pytest.raises(ValueError, match=f"label must not be that of a control, got '{name}'"):
            Sweep(["m"], ["t"], [{"method": "pooling", "label": name}])
    assert Sweep(["m"], ["t"], [chains[0], {**chains[1], "label": "other"}, {**other, "label": "dpc_knn of 3"}, "dpc_knn"])
    seeds = [{"method": "random_keep", "seed": seed, "label": "mine"} for seed in (1, 2)]
    assert bencher(methods=seeds, keep_ratio=[0.5])[0].rows[-1].seeds == 2
    plans = [{"methods": ["pooling"]}, {"methods": [{"method": "pooling", "stride": 2, "label": "pooling"}]}]
    with pytest.raises(ValueError, match="label must be of one configuration"):
        bencher(plans=plans)
    assert bencher(plans=[plans[0], {**plans[1], "n": 7}], keep_ratio=[0.5])  # other questions, another table


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"models": [1]}, "models must be names, got 1"),
        ({"tasks": [""]}, "tasks must be names, got ''"),
        ({"methods": [5]}, "methods must be names, or dicts"),
        ({"methods": [{"keep_ratio": 0.5}]}, "methods must be names, or dicts"),
        ({"methods": [{"method": "pooling", "chain": []}]}, "methods must be names, or dicts"),
        ({"methods": [{"method": "pooling", "label": 5}]}, "label must be a text, got 5"),
        ({"methods": [{"chain": [{"method": "pooling"}], "ratio": "0.5"}]}, "ratio must be a number"),
        ({"methods": [{"chain": [{"method": "pooling"}], "keep_ratio": 0.5}]}, "takes no fields, got keep_ratio"),
        ({"methods": [{"chain": [{"stride": 2}]}]}, "config must hold 'method' or 'chain'"),
        ({"methods": [""]}, "unknown method ''"),
    ],
)
def test_what_is_no_plan(wrong, says):
    with pytest.raises((ValueError, TypeError), match=says):
        Sweep(**{"models": ["m"], "tasks": ["t"], "methods": ["pooling"], **wrong})


@pytest.mark.parametrize("line", ["[]", "5", '{"model": "m"}', "null", "{"])
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    (tmp_path / "results.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1, is not a result"):
        bench.read_lines(tmp_path / "results.jsonl")


def test_a_trained_method_in_a_plan(bencher, tmp_path):
    shapes = {"num_codes": 2, "mapper": True, "width": bencher.model.get_input_embeddings().weight.shape[1], "num_heads": 1}
    method = create("vq_hash", **shapes)
    save_pretrained(method, tmp_path / "a")
    torch.nn.init.normal_(method.hash_mapper.attention.out_proj.weight)
    save_pretrained(method, tmp_path / "b")
    plan = Sweep(["m"], ["t"], [str(tmp_path / "a"), {"trained": str(tmp_path / "b"), "label": "b", "ratio": 0.25}])
    made = {s.label: s for s in plan.settings()}
    assert made["b"].ratio == 0.25 and made[str(tmp_path / "a")].ratio is None and len(made) == 5
    a, b = (loop.described(made[label].compressor) for label in (str(tmp_path / "a"), "b"))
    assert a.pop("weights") != b.pop("weights") and a == b  # another training is another measurement
    for label, wrong in {"zoo:nothing": "zoo:nothing", "nowhere": "unknown method"}.items():
        with pytest.raises(ValueError, match=wrong):
            Sweep(["m"], ["t"], [label])


def test_blind_accuracy_comes_from_the_card(tmp_path, monkeypatch):
    from mmcompress import zoo

    card = {"blind": {"easy_vqa": {"accuracy": 0.6}, "detail:small": {"accuracy": 0.1}, "detail:large": {"accuracy": 0.3}}}
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "card.json").write_text(json.dumps(card))
    (tmp_path / "image" / "card-image-single.json").write_text(json.dumps({"blind": {"easy_vqa": {"accuracy": 0.5}}}))
    monkeypatch.setattr(zoo, "parts_dir", lambda name: tmp_path / "image")
    assert bench.blind_accuracy("zoo:image-single", "easy_vqa") == 0.5
    assert bench.blind_accuracy("zoo:image", "easy_vqa") == 0.6 and bench.blind_accuracy("zoo:image", "detail:small") == 0.1
    assert bench.blind_accuracy("zoo:image", "detail:mixed") == pytest.approx(0.2)
    assert bench.blind_accuracy("zoo:image", "relations") is None and bench.blind_accuracy("a/folder", "easy_vqa") is None


def test_real_questions_on_the_zoo_model(tmp_path):
    """Four questions about one picture: reads it once, keeps a quarter, and the controls are there."""
    report = bench.bench([Sweep(["image"], ["detail:large"], ["k_center"], [0.25], n=4)], tmp_path, load=_zoo, progress=False)
    rows = {r.label: r for r in report.rows}
    assert list(rows) == ["none", "random_keep", "uniform_keep", "k_center"] and all(r.shared for _, r in report.results)
    assert rows["none"].evidence_recall == 1 and 0 <= rows["random_keep"].evidence_recall < 1
    assert abs(rows["k_center"].tokens_kept / rows["k_center"].tokens_in - 0.25) < 0.001
    assert rows["k_center"].flops_share < 0.3 and re.search(r"zoo:image, detail:large: 4 questions", bench.text(report))


def _zoo(name, dtype):
    from mmcompress import zoo

    return zoo.load(name.removeprefix("zoo:"))
