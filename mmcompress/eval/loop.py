"""The evaluation loop: how often a model answers right with a compressor, against the uncompressed model and random_keep.

Every compressor answers the same questions, and one item's questions go through all of them before the next item comes, so
that its encoder runs once. Questions about one item are not independent: intervals come from a bootstrap over items. A
difference is paired, question by question, and drawn by the same bootstrap.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.compressor import Compressor
from mmcompress.eval.tasks import Sample, Task, create_task
from mmcompress.ledger import Ledger
from mmcompress.registry import create

DRAWS, LEVEL = 10_000, 0.95
LEAST_ITEMS = 6
"""Items below which no interval is told: six of one sign are what 95 % takes (2 / 2⁶ = 3 %)."""
MAX_NEW_TOKENS, TRANSCRIPT = 8, 200
UNCOMPRESSED, RANDOM = "none", "random_keep"


# statistics


def bootstrap(
    values: Sequence[float] | np.ndarray, items: Sequence[int] | np.ndarray, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` [n] under redrawing whole items; items [n] says whose a value is."""
    value, item = np.asarray(values, dtype=float), np.unique(np.asarray(items), return_inverse=True)[1]
    if value.shape != item.shape or not len(value):
        raise ValueError(f"values and items must be of one length >= 1, got {len(value)} and {len(item)}")
    total, count = np.bincount(item, value), np.bincount(item)
    rng = np.random.default_rng(seed)
    means = []
    for part in np.array_split(np.arange(draws), max(1, draws * len(total) // 10_000_000)):
        picks = rng.integers(len(total), size=(len(part), len(total)))
        means.append(total[picks].sum(1) / count[picks].sum(1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def interval(values: Sequence[float] | np.ndarray, items: Sequence[int] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """`bootstrap`, or (nan, nan) of fewer than LEAST_ITEMS items."""
    return bootstrap(values, items, seed) if len(set(items)) >= LEAST_ITEMS else (float("nan"), float("nan"))


def rounded(value: float, digits: int = 5) -> float | None:
    """As JSON takes it: None for nan."""
    return round(value, digits) if value == value else None


@dataclass(frozen=True)
class Difference:
    """Mean of a − b over the same questions, with its 95 % interval; nan of fewer than LEAST_ITEMS items."""

    mean: float
    low: float
    high: float

    @property
    def beyond(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, Any]:
        return {"mean": round(self.mean, 5), "interval": [rounded(self.low), rounded(self.high)], "beyond": self.beyond}


def paired(a: Sequence[Result] | Result, b: Sequence[Result] | Result, seed: int = 0, topic: str | None = None) -> Difference:
    """How much better a is than b, question by question; of several results (seeds) the mean score of each question.

    topic: of its questions alone.
    Raises ValueError where they did not answer the same samples.
    """
    first, second = ([r] if isinstance(r, Result) else list(r) for r in (a, b))
    if len({r.samples for r in (*first, *second)}) != 1:
        raise ValueError(
            f"results must be of the same samples to be paired, got {sorted({r.samples for r in (*first, *second)})}"
        )
    asked = np.array([topic in (None, t) for t in first[0].topics])
    gap = (mean_scores(first) - mean_scores(second))[asked]
    return Difference(float(gap.mean()), *interval(gap, np.array(first[0].items)[asked], seed))


def mean_scores(results: Sequence[Result]) -> np.ndarray:
    """[n] score of each question, mean over results of the same samples."""
    return np.mean([r.scores for r in results], axis=0)


# results


@dataclass
class Result:
    """What one compressor reached on one task.

    scores [n]: 1 right, 0 wrong, or what the task's score gives. items [n]: which item each question is about. topics [n].
    recall [n]: share of the evidence tokens that were kept, nan where it is unknown. ledger: one prefill per question.
    samples: a fingerprint of the questions. seconds: spent on this compressor. shared: items read once for all questions.
    differences: to the controls, by name. error: why it did not run; all lists are empty then.
    """

    model: str
    task: str
    compressor: dict[str, Any]
    seed: int
    samples: str
    scores: list[float] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    shared: bool = False
    error: str | None = None
    chance: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def accuracy(self) -> float:
        """Mean score; nan where it did not run."""
        return float(np.mean(self.scores)) if self.scores else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the accuracy; nan of fewer than LEAST_ITEMS items."""
        return interval(self.scores, self.items)

    @property
    def by_topic(self) -> dict[str, tuple[float, int]]:
        """topic -> mean score and number of questions."""
        of = {t: [s for s, u in zip(self.scores, self.topics, strict=True) if u == t] for t in sorted(set(self.topics))}
        return {t: (float(np.mean(v)), len(v)) for t, v in of.items()}

    @property
    def evidence_recall(self) -> float:
        """Mean over the questions whose evidence is known; nan where there are none."""
        known = [r for r in self.recall if r == r]
        return float(np.mean(known)) if known else float("nan")

    @property
    def key(self) -> dict[str, Any]:
        """What makes two results the same measurement."""
        run = {k: self.environment.get(k) for k in ("weights", "dtype")}
        return {"model": self.model, **run, "task": self.task, "samples": self.samples, "compressor": self.compressor}

    def to_json(self) -> dict[str, Any]:
        """One JSON line. Right and wrong are a string of 1 and 0, other scores a list; so are items, by their lengths."""
        binary = all(s in (0, 1) for s in self.scores)
        out: dict[str, Any] = {"model": self.model, "task": self.task, "compressor": self.compressor, "seed": self.seed}
        if self.error is not None:
            return {**out, "samples": self.samples, "error": self.error, "environment": self.environment}
        return {
            **out,
            "accuracy": round(self.accuracy, 5),
            "interval": [rounded(v) for v in self.interval],
            "n": self.n,
            "items": len(set(self.items)),
            "chance": round(self.chance, 5),
            "topics": {t: {"accuracy": round(a, 5), "n": n} for t, (a, n) in self.by_topic.items()},
            "evidence_recall": rounded(self.evidence_recall),
            "ledger": self.ledger,
            "differences": {name: d.to_json() for name, d in self.differences.items()},
            "seconds": round(self.seconds, 2),
            "shared": self.shared,
            "environment": self.environment,
            "samples": self.samples,
            "scores": "".join(str(int(s)) for s in self.scores) if binary else [round(s, 6) for s in self.scores],
            "questions_per_item": [len(list(same)) for _, same in groupby(self.items)],
            "topic_per_question": self.topics,
            "recall_per_question": [rounded(r) for r in self.recall],
        }

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Result:
        """The result that `to_json` described."""
        common = {k: line[k] for k in ("model", "task", "compressor", "seed", "samples", "environment")}
        if line.get("error") is not None:
            return cls(**common, error=line["error"])
        return cls(
            **common,
            scores=[float(s) for s in line["scores"]],
            items=[i for i, n in enumerate(line["questions_per_item"]) for _ in range(n)],
            topics=line["topic_per_question"],
            recall=[float("nan") if r is None else r for r in line["recall_per_question"]],
            ledger=line["ledger"],
            seconds=line["seconds"],
            shared=line["shared"],
            chance=line["chance"],
            differences={
                k: Difference(d["mean"], *(float("nan") if v is None else v for v in d["interval"]))
                for k, d in line["differences"].items()
            },
        )


def join(parts: Sequence[Result], samples: str) -> Result:
    """One result of those of pieces, in order; `samples` is the fingerprint of the whole. The first error is the whole's."""
    whole = replace(parts[0], samples=samples, scores=[], items=[], topics=[], recall=[], ledger={}, seconds=0.0)
    for part in parts:
        if part.error is not None:
            return replace(whole, scores=[], items=[], topics=[], recall=[], error=part.error)
        first = whole.items[-1] + 1 if whole.items else 0
        whole.items += [first + i for i in part.items]
        whole.scores += part.scores
        whole.topics += part.topics
        whole.recall += part.recall
        whole.seconds += part.seconds
        whole.shared = whole.shared or part.shared
    names = [k for k in parts[0].ledger if k != "kept_ratio"]
    whole.ledger = {k: None if parts[0].ledger[k] is None else sum(part.ledger[k] for part in parts) for k in names}
    whole.ledger["kept_ratio"] = whole.ledger["tokens_kept"] / whole.ledger["tokens_in"]
    return whole


def fingerprint(samples: Iterable[Sample]) -> str:
    """A short hash of items, prompts and answers."""
    hashed, last = hashlib.sha256(), None
    for s in samples:
        if s.item is not last:
            for part in s.item if isinstance(s.item, (list, tuple)) else [s.item]:
                hashed.update(part.tobytes())
            last = s.item
        hashed.update(json.dumps([s.prompt, sorted(s.answers)]).encode())
    return hashed.hexdigest()[:16]


def weights_of(model: Any) -> str:
    """A short hash of a few numbers of every parameter: another training is another model."""
    hashed = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        flat = p.detach().flatten()
        some = flat[:: max(1, len(flat) // 8)][:16].float().cpu().numpy()
        hashed.update(f"{name}{tuple(p.shape)}".encode() + some.tobytes())
    return hashed.hexdigest()[:16]


@cache
def code_version() -> str:
    """A short hash of the package's Python source: results of other code are other results."""
    folder = Path(__file__).parents[1]
    hashed = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        hashed.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return hashed.hexdigest()[:16]


def described(compressor: Compressor) -> dict[str, Any]:
    """Its configuration, and of one with parameters a fingerprint of them."""
    return compressor.config() | ({"weights": weights_of(compressor)} if compressor.state_dict() else {})


def environment(model: Any) -> dict[str, Any]:
    """Versions (code: of the source), machine, device and dtype as plain JSON values."""
    import torch
    import transformers

    import mmcompress
    from mmcompress.doctor import cpu_name

    device = model.device
    return {
        "mmcompress": mmcompress.__version__,
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_of(model),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


# the loop


def run(
    model: Any,
    tasks: str | Task | Sequence[str | Task],
    compressor: Compressor | None = None,
    n: int = 200,
    seed: int = 0,
    *,
    processor: Any = None,
    dtype: str = "float32",
    control_seeds: Sequence[int] = (0,),
    out: str | Path | None = None,
    **settings: Any,
) -> list[Result]:
    """Measure a compressor on n test questions of each task, with the uncompressed model and `random_keep` beside it.

    model: a name (`zoo:NAME`, a folder, a hub id), or a model with its `processor`. compressor: None measures the uncompressed
    model alone. seed: of the samples; control_seeds: of random_keep, which stands for their mean. dtype: of a model that is
    loaded here, see `load`. out: a file that gets one JSON line per result. settings: of `sweep`.
    Returns one result per task, with `differences` to "none" and "random_keep". Raises ValueError for a task whose items the
    model does not take, and for a compressor that does not work on it.
    """
    name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if isinstance(model, str):
        model, processor = load(model, dtype)
    elif processor is None:
        raise ValueError("processor must be given with a model object, got None")
    results = []
    for task in [tasks] if isinstance(tasks, (str, Task)) else tasks:
        task = create_task(task) if isinstance(task, str) else task
        made: list[Compressor] = [create(UNCOMPRESSED)]
        ratio = ratio_of(compressor)
        if compressor is not None:
            made += [compressor] if ratio is None else [compressor, *(controls(ratio, control_seeds))]
        found = sweep(model, processor, task, made, n, seed, model_name=name, **settings)
        mine = found[0 if compressor is None else 1]
        if mine.error:
            raise ValueError(mine.error)
        compare(mine, found[0], found[2:])
        results.append(mine)
        if out is not None:
            append(out, [mine])
    return results


def ratio_of(compressor: Compressor | None) -> float | None:
    """The keep_ratio of the first stage that listens to one; None where there is none."""
    stages = () if compressor is None else compressor.stages
    return next((float(s.keep_ratio) for s in stages if s.has_ratio), None)


def controls(ratio: float, seeds: Sequence[int]) -> list[Compressor]:
    return [create(RANDOM, keep_ratio=ratio, seed=s) for s in seeds]


def compare(result: Result, uncompressed: Result | None, random: Sequence[Result]) -> None:
    """Note the paired differences to the controls on a result."""
    if uncompressed is not None and uncompressed is not result:
        result.differences[UNCOMPRESSED] = paired(result, uncompressed)
    if random:
        result.differences[RANDOM] = paired(result, random)


def append(path: str | Path, results: Sequence[Result]) -> None:
    """Add one JSON line per result to a file; a last line that was cut off gives way."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not (held := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(held[: held.rfind(b"\n") + 1])
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r.to_json(), ensure_ascii=False) + "\n" for r in results)


def load(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """A model and its processor in "float32", "bfloat16" or "float16"; "auto": bfloat16 where this CPU multiplies it fast."""
    from mmcompress.ask import load_model

    model, processor = load_model(name)
    return model.to(pick_dtype(dtype)), processor


DTYPES = ("float32", "bfloat16", "float16", "auto")


def pick_dtype(dtype: str) -> Any:
    """The torch dtype of a name in DTYPES. Raises ValueError for another name."""
    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, dtype)


def question(task: Task, sample: Sample, processor: Any) -> Any:
    """A sample as a question to a model. Raises ValueError where a recording's sampling rate is not the model's."""
    from mmcompress.ask import Question

    if task.kind == "image":
        return Question(sample.prompt, images=[sample.item])
    if task.kind == "video":
        frames = np.stack([np.asarray(f.convert("RGB")) for f in sample.item])
        return Question(sample.prompt, videos=[(frames, list(range(len(frames))), float(task.fps))])
    rate = processor.feature_extractor.sampling_rate
    if rate != task.sampling_rate:
        raise ValueError(f"sampling_rate of {task.name} must be the model's {rate} Hz, got {task.sampling_rate}")
    return Question(sample.prompt, audio=[sample.item])


def size_of(item: Any) -> Any:
    """(width, height) of a picture or of a clip's frames, samples of a recording."""
    if isinstance(item, (list, tuple)):
        return item[0].size
    return item.size


def check_task(model: Any, task: Task) -> None:
    """Raise ValueError where the model does not take the task's items."""
    from mmcompress.models import family

    takes = family(model).modalities
    if task.kind not in takes:
        raise ValueError(f"task {task.name} asks about {task.kind} items, {type(model).__name__} takes {' and '.join(takes)}")


def sweep(
    model: Any,
    processor: Any,
    task: Task,
    compressors: Sequence[Compressor],
    n: int = 200,
    seed: int = 0,
    *,
    model_name: str = "",
    split: str = "test",
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    progress: Any = True,
    samples: Sequence[Sample] | None = None,
) -> list[Result]:
    """Every compressor on the same n questions; one result each, in order, without differences.

    max_new_tokens: of a reply; by default 8, of a speech recogniser 200. samples: in place of those of (split, n, seed).
    progress: whether to show a bar on stderr, or a bar of tqdm that is there already.
    A compressor that does not work on this model or item gets a result with `error`, the others go on.
    """
    import torch

    from mmcompress.ask import check_kinds, prepare
    from mmcompress.eval.answers import answer, reads_text, shared_length
    from mmcompress.eval.encoder import encode_once

    check_task(model, task)
    asked = list(task.samples(split, n, seed) if samples is None else samples)
    length = max_new_tokens or (TRANSCRIPT if getattr(model.config, "is_encoder_decoder", False) else MAX_NEW_TOKENS)
    where, print_of = environment(model), fingerprint(asked)
    name = task_name(task)
    results = [
        Result(model_name, name, described(c), seed, print_of, chance=task.chance, environment=where) for c in compressors
    ]
    ledgers: dict[int, Ledger] = {}
    for result, compressor in zip(results, compressors, strict=True):  # what cannot run is known before anything is computed
        try:
            check_kinds(compressor, [task.kind])
            with compressor(model) as installed:
                ledgers[id(result)] = Ledger(installed.ledger.decoder)
        except ValueError as error:
            result.error = str(error)
    scenes = [list(same) for _, same in groupby(asked, key=lambda s: id(s.item))]
    total = len(asked) * sum(r.error is None for r in results)
    bar = progress_bar(total, name, progress) if isinstance(progress, bool) else contextlib.nullcontext(progress)
    with encode_once(model), torch.inference_mode(), bar as shown:
        for index, scene in enumerate(scenes):
            prompts = [prepare(model, processor, question(task, s, processor)) for s in scene]
            shares = len(scene) > 1 and shared_length(model, prompts) > 0
            for result, compressor in zip(results, compressors, strict=True):
                if result.error is not None:
                    continue
                start = time.perf_counter()
                try:
                    replies = answer(model, processor, prompts, compressor, length, batch_size)
                except ValueError as error:
                    result.error = str(error)
                    result.scores, result.items, result.topics, result.recall = [], [], [], []
                    continue
                result.seconds += time.perf_counter() - start
                result.shared = result.shared or (shares and not reads_text(compressor))
                for sample, inputs, reply in zip(scene, prompts, replies, strict=True):
                    result.scores.append(float(task.score(sample, reply.text)))
                    result.items.append(index)
                    result.topics.append(sample.topic)
                    result.recall.append(_recall(reply.item, task, sample, processor, inputs))
                    ledgers[id(result)].add(reply.counts)
                shown.update(len(scene))
    for result in results:
        if result.error is None:
            result.ledger = ledgers[id(result)].totals()
    return results


def progress_bar(total: int, name: str, shown: bool) -> Any:
    """A progress bar on stderr; in a log file a line every half minute."""
    from tqdm import tqdm

    pause = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=name, unit="answer", disable=not shown, mininterval=pause)


def task_name(task: Task) -> str:
    """The name that `create_task` takes: "detail:small" of Detail("small")."""
    value = getattr(task, task.setting, None) if task.setting else None
    return task.name if value is None else f"{task.name}:{value}"


def _recall(item: Any, task: Task, sample: Sample, processor: Any, inputs: Any) -> float:
    """Evidence recall on what the model saw of the item: its processor may cut a picture's sides away, or fill a window up."""
    from mmcompress.ask import seen
    from mmcompress.eval.evidence import evidence_recall

    if item is None or not sample.evidence:
        return float("nan")
    whole, size = size_of(sample.item), size_of(seen(processor, sample.item, item.layout, inputs))
    corner = (0.0, 0.0) if task.kind == "audio" else ((whole[0] - size[0]) / 2, (whole[1] - size[1]) / 2)
    return evidence_recall(item, sample, size, task.sampling_rate, corner)
