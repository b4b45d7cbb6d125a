"""Many methods on many tasks: `mmcompress bench`. Measures what is not measured yet, and makes table, JSON and plot of it.

Every sweep has its controls: the uncompressed model (`none`), and at each ratio `random_keep` and `uniform_keep`. A line of
`results.jsonl` is one (model, task, compressor) on one set of samples; what stands there already is not measured again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmcompress.cards import has_ratio
from mmcompress.compressor import Compressor, check_ratio, from_config
from mmcompress.eval.loop import (
    LEAST_ITEMS,
    RANDOM,
    UNCOMPRESSED,
    Difference,
    Result,
    described,
    interval,
    mean_scores,
    paired,
    rounded,
)
from mmcompress.io import from_pretrained, is_trained
from mmcompress.registry import create, did_you_mean, field_names, get_method

CONTROLS = (RANDOM, "uniform_keep")
GAPS = {"to_none": UNCOMPRESSED, "to_random": RANDOM, "to_uniform": CONTROLS[1]}
"""Fields of a row that hold the paired difference to a control."""
PIECE = 8  # items after which a sweep that is stopped would go on
PRESETS = Path(__file__).parent / "presets"
"""The plans that ship with the package, NAME.json each."""
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
"""What they measured last, in a checkout of the repository."""


# what is run


@dataclass(frozen=True)
class Setting:
    """One compressor of a sweep. label: what the table calls it; ratio: None for a method with a rule of its own."""

    label: str
    ratio: float | None
    compressor: Compressor


@dataclass
class Sweep:
    """Models × tasks × methods × ratios × seeds. methods: names, or dicts: a method's fields, {"chain": […]}, or {"trained": a
    folder or "zoo:NAME"}; each may have a "label" and, where it has no keep_ratio, a "ratio" at which the controls stand."""

    models: list[str]
    tasks: list[str]
    methods: list[str | dict[str, Any]]
    keep_ratio: list[float] = field(default_factory=lambda: [0.25])
    n: int = 200
    seed: int = 0
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        for name in ("models", "tasks", "methods", "keep_ratio", "seeds"):
            if not isinstance(value := getattr(self, name), list) or not value:
                raise ValueError(f"{name} must be a list of at least one, got {value!r}")
        for name in ("models", "tasks"):
            if wrong := [v for v in getattr(self, name) if not isinstance(v, str) or not v.strip()]:
                raise ValueError(f"{name} must be names, got {wrong[0]!r}")
        for ratio in self.keep_ratio:
            check_ratio(ratio)
        for name, least in (("n", 1), ("seed", 0)):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        _check_labels(self.settings())

    def settings(self) -> list[Setting]:
        """Controls first, then the methods in their order, each once."""
        asked = [s for m in self.methods for s in _settings(m, self.keep_ratio, self.seeds)]
        ratios = list(dict.fromkeys(s.ratio for s in asked if s.ratio is not None))
        made = [s for name in (UNCOMPRESSED, *CONTROLS) for s in _settings(name, ratios, self.seeds)] + asked
        return list({json.dumps([s.label, described(s.compressor)]): s for s in made}.values())


def _check_labels(settings: Iterable[Setting]) -> None:
    """Raise ValueError where one line of the table would be the mean of different things: configurations of one label that
    differ in more than a seed, or a method that is called like a control."""
    first: dict[tuple[str, float | None], dict[str, Any]] = {}
    for s in settings:
        mine = _without_seed(described(s.compressor))
        if s.label in (UNCOMPRESSED, *CONTROLS) and mine.get("method") != s.label:
            raise ValueError(f"label must not be that of a control, got {s.label!r} for {mine}")
        other = first.setdefault((s.label, s.ratio), mine)
        if other != mine:
            told = f"got {s.label!r} for {other} and for {mine}"
            raise ValueError(
                f'label must be of one configuration at one ratio, but for its seed, {told}: give each a "label" of its own'
            )


def _without_seed(config: Any) -> Any:
    if isinstance(config, dict):
        return {k: _without_seed(v) for k, v in config.items() if k != "seed"}
    return [_without_seed(v) for v in config] if isinstance(config, (list, tuple)) else config


def _settings(method: str | dict[str, Any], ratios: Sequence[float], seeds: Sequence[int]) -> list[Setting]:
    """A method at every ratio, where it has one, and with every seed, where it has that field; a field given is not varied.
    A trained method, a folder or "zoo:NAME", runs as it stands."""
    if isinstance(method, str):
        method = {"trained" if is_trained(method) else "method": method}
    if not isinstance(method, dict) or len(kinds := method.keys() & {"method", "chain", "trained"}) != 1:
        raise ValueError(f"methods must be names, or dicts with one of method, chain and trained; got {method!r}")
    fields: dict[str, Any] = dict(method)
    label, ratio = fields.pop("label", None), fields.pop("ratio", None)
    if label is not None and not isinstance(label, str):
        raise ValueError(f"label must be a text, got {label!r}")
    if ratio is not None:
        check_ratio(ratio, "ratio")
    if more := sorted(fields.keys() - kinds) if "method" not in kinds else []:
        raise ValueError(f"a method that is a {min(kinds)} runs as it stands and takes no fields, got {', '.join(more)}")
    if "chain" in fields:
        made = from_config(fields)
        return [Setting(label or " | ".join(type(part).name for part in made.stages), ratio, made)]
    if "trained" in fields:
        return [Setting(label or fields["trained"], ratio, from_pretrained(fields["trained"]))]
    name: str = fields.pop("method", None)
    known = field_names(get_method(name))
    label = label or " ".join([name, *(f"{k}={v}" for k, v in fields.items() if k != "seed")])
    out: list[Setting] = []
    for keep in ratios if has_ratio(name) and "keep_ratio" not in fields else [None]:
        for seed in seeds if "seed" in known and "seed" not in fields else [None]:
            varied = {} if keep is None else {"keep_ratio": keep}
            varied |= {} if seed is None else {"seed": seed}
            mine = fields.get("keep_ratio", ratio if keep is None else keep)
            out.append(Setting(label, mine, create(name, **fields, **varied)))
    return out


class Preset(NamedTuple):
    """A file of sweeps. stem: path of the results without their endings; dtype: of the models."""

    sweeps: list[Sweep]
    stem: Path
    dtype: str


def load_preset(name: str) -> Preset:
    """A plan of `PRESETS`, or another .json file. Results go to `runs/bench`, in a checkout a preset's to `benchmarks/results`.
    Raises ValueError for an unknown name, and for a file that holds no sweeps."""
    path = Path(name) if name.endswith(".json") else PRESETS / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in PRESETS.glob("*.json"))
        raise ValueError(f"preset must be a .json file or one of {', '.join(known)}; got {name!r}{did_you_mean(name, known)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    try:
        sweeps = [Sweep(**sweep) for sweep in config["sweeps"]]
        if not sweeps:
            raise TypeError("got []")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold 'sweeps', a list of {list(Sweep.__dataclass_fields__)}: {error}") from error
    folder = RESULTS if path.parent == PRESETS and RESULTS.is_dir() else Path("runs/bench")
    return Preset(sweeps, folder / path.stem, config.get("dtype", "float32"))


# running it


@dataclass
class Report:
    """Everything that was asked for. rows: one per (model, task, label, ratio). not_run: the same with the reason.
    timing: one per (model, task, label, ratio), see `mmcompress.eval.timing`."""

    results: list[tuple[Setting, Result]]
    rows: list[Row]
    not_run: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    blind: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Rows, and every result without its lists per question, scores apart."""
        dropped = ("topic_per_question", "recall_per_question")
        return {
            "rows": [r.to_json() for r in self.rows],
            "not_run": self.not_run,
            "timing": self.timing,
            "blind": self.blind,
            "results": [{k: v for k, v in r.to_json().items() if k not in dropped} for _, r in self.results],
        }


@dataclass
class Row:
    """A line of the table: the mean over the seeds of a method at one ratio. Tokens, rows and FLOPs are means per question.
    topics: accuracy by topic, and the paired differences to the controls on its questions alone."""

    model: str
    task: str
    label: str
    ratio: float | None
    seeds: int
    n: int
    accuracy: float
    interval: tuple[float, float]
    tokens_in: float
    tokens_kept: float
    separators: float
    sequence_in: float
    sequence: float
    flops_share: float
    evidence_recall: float
    seconds: float
    to_none: Difference | None = None
    to_random: Difference | None = None
    to_uniform: Difference | None = None
    topics: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, setting: Setting, results: Sequence[Result]) -> Row:
        first = results[0]
        total = {k: sum(r.ledger[k] for r in results) for k in first.ledger if first.ledger[k] is not None}
        score, n = mean_scores(results), len(results) * first.n
        return cls(
            model=first.model,
            task=first.task,
            label=setting.label,
            ratio=setting.ratio,
            seeds=len(results),
            n=first.n,
            accuracy=float(score.mean()),
            interval=interval(score, first.items),
            tokens_in=total["tokens_in"] / n,
            tokens_kept=total["tokens_kept"] / n,
            separators=total["separators"] / n,
            sequence_in=total["sequence_in"] / n,
            sequence=total["sequence_kept"] / n,
            flops_share=total["flops"] / total["flops_in"] if "flops" in total else math.nan,
            evidence_recall=float(np.mean([r.evidence_recall for r in results])),
            seconds=sum(r.seconds for r in results),
        )

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in GAPS:
                gap = getattr(self, name)
                value = None if gap is None else gap.to_json()
            elif isinstance(value, float):
                value = rounded(value)
            elif isinstance(value, tuple):
                value = [rounded(v) for v in value]
            out[name] = value
        return out


def bench(
    sweeps: Sequence[Sweep],
    out: Path,
    *,
    stem: str = "results",
    dtype: str = "float32",
    timing: bool = False,
    fresh: bool = False,
    progress: bool = True,
    load: Callable[[str, str], tuple[Any, Any]] | None = None,
) -> Report:
    """Measure what the lines of earlier runs do not hold yet, and write JSON, table and plot.

    out: a folder, for results.jsonl, results.json, table.md and plot.png; stem: another name than "results", of all four.
    fresh: measure all of it again. load(name, dtype): in place of `mmcompress.eval.loop.load`.
    Raises ValueError for unknown names, and for a task that none of the models takes.
    """
    from mmcompress.eval import loop
    from mmcompress.eval.tasks import create_task

    _plotting()
    _check_sweeps(sweeps)
    lines, pieces = out / f"{stem}.jsonl", out / f"{stem}.pieces.jsonl"
    if fresh:
        pieces.unlink(missing_ok=True)
    done = {} if fresh else {_key(r): r for r in read_lines(lines)}
    tasks = {name: create_task(name) for sweep in sweeps for name in sweep.tasks}
    names = list(dict.fromkeys(_model_name(m) for sweep in sweeps for m in sweep.models))
    found: list[tuple[Setting, Result]] = []
    not_run: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    taken: set[tuple[int, str]] = set()
    told: set[tuple[str, str, float | None]] = set()
    measured: set[str] = set()
    reused: dict[str, Result] = {}
    for name in names:
        model, processor = (load or loop.load)(name, dtype)
        where = loop.environment(model)
        for sweep in sweeps:  # before anything is measured
            for task_name in sweep.tasks if list(map(_model_name, sweep.models)) == [name] else []:
                loop.check_task(model, tasks[task_name])
        for number, sweep in enumerate(sweeps):
            for task_name in sweep.tasks if name in map(_model_name, sweep.models) else []:
                task = tasks[task_name]
                try:
                    loop.check_task(model, task)
                except ValueError as error:
                    not_run.append({"model": name, "task": loop.task_name(task), "label": "every method", "why": str(error)})
                    continue
                taken.add((number, task_name))
                settings = sweep.settings()
                samples = task.samples("test", sweep.n, sweep.seed)
                blank = Result(name, loop.task_name(task), {}, sweep.seed, loop.fingerprint(samples), environment=where)
                keys = [_key(blank, s.compressor) for s in settings]
                missing = {k: s for k, s in zip(keys, settings, strict=True) if k not in done}
                reused |= {k: done[k] for k in keys if k in done and done[k].error is None and k not in measured}
                measured |= missing.keys()
                if missing:
                    wanted = [s.compressor for s in missing.values()]
                    new = _in_pieces(model, processor, task, wanted, samples, blank, pieces, progress)
                    loop.append(lines, [r for r in new if r.error is None])
                    pieces.unlink(missing_ok=True)
                    done |= dict(zip(missing, new, strict=True))
                for key, setting in zip(keys, settings, strict=True):
                    result = done[key]
                    if (key, setting.label, setting.ratio) in told:
                        continue  # another sweep asked for the same
                    told.add((key, setting.label, setting.ratio))
                    if result.error is None:
                        found.append((setting, result))
                    else:
                        one = {"model": name, "task": result.task, "label": setting.label, "ratio": setting.ratio}
                        not_run.append({**one, "why": result.error})
                if timing:
                    from mmcompress.eval.timing import prefill_times

                    times += prefill_times(model, processor, task, samples, settings, name, progress=progress)
        del model, processor
    report = Report(found, rows_of(found), not_run, times, {})
    report.blind = {f"{r.model} {r.task}": b for r in report.rows if (b := blind_accuracy(r.model, r.task)) is not None}
    write(report, out, stem)
    if reused and progress:
        print(_reused(list(reused.values()), lines), file=sys.stderr)
    for number, sweep in enumerate(sweeps):
        if lost := [t for t in sweep.tasks if (number, t) not in taken]:
            raise ValueError(f"task {lost[0]} asks about {tasks[lost[0]].kind} items, which none of {sweep.models} takes")
    return report


def _check_sweeps(sweeps: Sequence[Sweep]) -> None:
    """`_check_labels` over all sweeps that ask one model the same questions: their results share a table."""
    asked: dict[tuple, list[Setting]] = {}
    for sweep in sweeps:
        settings = sweep.settings()
        for model in map(_model_name, sweep.models):
            for task in sweep.tasks:
                asked.setdefault((model, task, sweep.n, sweep.seed), []).extend(settings)
    for together in asked.values():
        _check_labels(together)


def _reused(results: Sequence[Result], file: Path) -> str:
    """What was not measured because it stands in a file: how much, since when, where, and whether by this code."""
    from mmcompress.eval.loop import code_version

    seen = dict.fromkeys((r.environment.get("date"), r.environment.get("cpu")) for r in results)
    other = sum(r.environment.get("code") != code_version() for r in results)
    by = f", {other} of them by another state of the code" if other else ""
    when = "; ".join(f"{date}, {cpu}" for date, cpu in seen)
    return f"{len(results)} measurements were taken from {file} ({when}{by}): --fresh measures them again"


def _in_pieces(
    model: Any,
    processor: Any,
    task: Any,
    compressors: Sequence[Compressor],
    samples: Sequence[Any],
    blank: Result,
    file: Path,
    progress: bool,
) -> list[Result]:
    """One result per compressor, PIECE items at a time: what is done stands in `file` until the caller has it all."""
    from mmcompress.eval import loop

    items = [list(same) for _, same in groupby(samples, key=lambda s: id(s.item))]
    held = {_piece(r): r for r in read_lines(file)}
    parts: list[list[Result]] = [[] for _ in compressors]
    with loop.progress_bar(len(samples) * len(compressors), blank.task, progress) as bar:
        for start in range(0, len(items), PIECE):
            piece = [s for same in items[start : start + PIECE] for s in same]
            part = replace(blank, samples=loop.fingerprint(piece))
            keys = [_piece(part, c) for c in compressors]
            todo = [i for i, k in enumerate(keys) if k not in held and not (parts[i] and parts[i][-1].error)]
            bar.update(len(piece) * (len(compressors) - len(todo)))
            if todo:
                chosen = [compressors[i] for i in todo]
                new = loop.sweep(
                    model, processor, task, chosen, seed=blank.seed, model_name=blank.model, samples=piece, progress=bar
                )
                loop.append(file, [r for r in new if r.error is None])
                held |= {keys[i]: r for i, r in zip(todo, new, strict=True)}
            for i, key in enumerate(keys):
                if key in held:
                    parts[i].append(held[key])
    return [loop.join(p, blank.samples) for p in parts]


def _model_name(name: str) -> str:
    """zoo:NAME for a name of the zoo, else as it is."""
    from mmcompress import zoo

    return f"zoo:{name}" if name in zoo.list_models() else name


def _key(result: Result, compressor: Compressor | None = None) -> str:
    key = result.key if compressor is None else {**result.key, "compressor": described(compressor)}
    return json.dumps(key, sort_keys=True)


def _piece(result: Result, compressor: Compressor | None = None) -> str:
    """The key of a piece: one measurement is of one state of the code, on one machine."""
    return _key(result, compressor) + json.dumps([result.environment.get(k) for k in ("code", "torch", "transformers", "cpu")])


def read_lines(path: Path) -> list[Result]:
    """The results of a file; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1]):
        try:
            out.append(Result.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number + 1}, is not a result: {error}") from error
    return out


def rows_of(found: Iterable[tuple[Setting, Result]]) -> list[Row]:
    """One row per (model, task, label, ratio) with the paired differences to the controls."""
    groups: dict[tuple, list[tuple[Setting, Result]]] = {}
    for setting, result in found:
        groups.setdefault((result.model, result.task, result.samples, setting.label, setting.ratio), []).append(
            (setting, result)
        )
    rows = []
    for (model, task, samples, label, ratio), members in groups.items():
        mine = [r for _, r in members]
        row = Row.of(members[0][0], mine)
        row.topics = {t: {"accuracy": round(float(np.mean([r.by_topic[t][0] for r in mine])), 5)} for t in mine[0].by_topic}
        for name, other in GAPS.items():
            control = groups.get((model, task, samples, other, None if other == UNCOMPRESSED else ratio))
            if control and label != other:
                theirs = [r for _, r in control]
                setattr(row, name, paired(mine, theirs))
                for topic, told in row.topics.items() if len(row.topics) > 1 else ():
                    told[name] = paired(mine, theirs, topic=topic).to_json()
        rows.append(row)
    return rows


def blind_accuracy(model: str, task: str) -> float | None:
    """What a model that was trained without seeing the items reaches, from the card of a zoo model; of a mixed task the mean
    over its sizes. None where the card does not say."""
    from mmcompress import zoo

    name = model.removeprefix("zoo:")
    if name not in zoo.list_models():
        return None
    if not zoo.card_file(name).is_file():
        return None
    blind = zoo.card_of(name).get("blind", {})
    base, _, size = task.partition(":")
    names = [n for n in (task, base) if n in blind][:1]
    if not names and size in ("", "mixed"):
        names = [n for n in blind if n.partition(":")[0] == base]
    return float(np.mean([blind[n]["accuracy"] for n in names])) if names else None


# showing it

HEAD = [
    "method", "ratio", "accuracy %", "95 %", "kept %", "separators", "sequence", "FLOPs %", "evidence %",
    "to uncompressed", "to random_keep", "to uniform_keep",
]  # fmt: skip
TIMES = ["prefill ms", "of uncompressed", "own cost"]
NOTE = "* the 95 % interval of the paired difference (points; bootstrap over items) leaves out 0."
FEW = f"No intervals: fewer than {LEAST_ITEMS} items; take a larger n."


def cells(row: Row, time: dict[str, Any] | None, timed: bool) -> list[str]:
    """A row of the table as text."""
    low, high = row.interval
    out = [
        row.label,
        "–" if row.ratio is None else f"{row.ratio:g}",
        f"{100 * row.accuracy:.1f}",
        "–" if low != low else f"{100 * low:.1f} – {100 * high:.1f}",
        f"{100 * row.tokens_kept / row.tokens_in:.1f}",
        f"{row.separators:.0f}",
        f"{row.sequence:.0f}",
        "–" if row.flops_share != row.flops_share else f"{100 * row.flops_share:.1f}",
        "–" if row.evidence_recall != row.evidence_recall else f"{100 * row.evidence_recall:.1f}",
        gap(row.to_none),
        gap(row.to_random),
        gap(row.to_uniform),
    ]
    if timed:
        out += (
            ["–"] * 3 if time is None else [f"{time['ms']:.0f}", f"{100 * time['share']:.1f} %", f"{100 * time['own']:.2f} %"]
        )
    return out


def gap(difference: Difference | None) -> str:
    """'−12.5 [−18.0, −7.0] *' in points."""
    if difference is None:
        return "–"
    mean, low, high = (f"{100 * v:+.1f}".replace("-", "−") for v in (difference.mean, difference.low, difference.high))
    return mean if difference.low != difference.low else f"{mean} [{low}, {high}]" + (" *" if difference.beyond else "")


def tables(report: Report, show: Callable[[list[str], list[list[str]]], str]) -> str:
    """One table per model and task, then what did not run; `show(headers, rows)` makes a table."""
    parts = []
    timed = bool(report.timing)
    for model, task, n in dict.fromkeys((r.model, r.task, r.n) for r in report.rows):
        rows = [r for r in report.rows if (r.model, r.task, r.n) == (model, task, n)]
        blind = report.blind.get(f"{model} {task}")
        told = f"{model}, {task}: {n} questions" + (f", trained blind {100 * blind:.1f} %" if blind is not None else "")
        at = {(t["label"], t["ratio"]): t for t in report.timing if (t["model"], t["task"]) == (model, task)}
        lines = [cells(r, at.get((r.label, r.ratio)), timed) for r in rows]
        parts += [told, "", show([*HEAD, *(TIMES if timed else [])], lines), ""]
        parts += [FEW, ""] if rows[0].interval[0] != rows[0].interval[0] else []
    parts += [NOTE]
    for one in report.not_run:
        ratio = "" if one.get("ratio") is None else f" at {one['ratio']:g}"
        parts.append(f"not run: {one['label']}{ratio} on {one['model']}, {one['task']}: {one['why']}")
    return "\n".join(parts)


def text(report: Report) -> str:
    """The tables for the terminal."""
    from mmcompress.report import table

    return tables(report, lambda head, rows: table(head, rows, "l" + "r" * (len(head) - 1), wrap=(0,)))


def files(out: Path, stem: str = "results") -> dict[str, Path]:
    """Where JSON, table and plot go."""
    table, picture = ("table", "plot") if stem == "results" else (stem, stem)
    return {"json": out / f"{stem}.json", "table": out / f"{table}.md", "plot": out / f"{picture}.png"}


def write(report: Report, out: Path, stem: str = "results") -> None:
    """Write JSON, table and plot."""
    from mmcompress.cards import markdown

    out.mkdir(parents=True, exist_ok=True)
    path = files(out, stem)
    path["json"].write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path["table"].write_text(tables(report, markdown) + "\n", encoding="utf-8")
    if report.rows:
        plot(report, path["plot"])


def _plotting() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'mmcompress[viz]'") from error
    return matplotlib


def plot(report: Report, path: Path) -> None:
    """Accuracy against tokens kept, one panel per model and task, one line per method; dashed: uncompressed, trained blind."""
    _plotting()
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r.model, r.task, r.n) for r in report.rows))
    figure = Figure(figsize=(6.4 * min(2, len(panels)), 4.6 * ((len(panels) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(panels) + 1) // 2, min(2, len(panels)), squeeze=False).flatten()
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    methods = list(dict.fromkeys(r.label for r in report.rows if r.label != UNCOMPRESSED))
    for (model, task, n), axis in zip(panels, axes, strict=False):
        for number, label in enumerate(methods):
            points = sorted(
                (r.tokens_kept, r.accuracy, *r.interval)
                for r in report.rows
                if (r.model, r.task, r.n, r.label) == (model, task, n, label)
            )
            if not points:
                continue
            x, y, low, high = (100 * np.array(v) if i else np.array(v) for i, v in enumerate(zip(*points, strict=True)))
            grey = label in CONTROLS
            style: dict[str, Any] = {"color": ("0.6", "0.35")[CONTROLS.index(label)], "zorder": 1} if grey else {}
            marker = "osD^vP*Xh<>d"[number % 12]
            axis.errorbar(x, y, (y - low, high - y), marker=marker, capsize=2, lw=1.4, elinewidth=0.6, label=label, **style)
        for r in report.rows:
            if (r.model, r.task, r.n, r.label) == (model, task, n, UNCOMPRESSED):
                shown = f"uncompressed ({r.tokens_in:.0f} tokens)"
                axis.axhline(100 * r.accuracy, color="black", ls="--", lw=1, label=shown)
        if (blind := report.blind.get(f"{model} {task}")) is not None:
            axis.axhline(100 * blind, color="firebrick", ls="--", lw=1, label="trained blind")
        axis.set(title=f"{model}, {task}", xlabel="tokens kept", ylabel="accuracy %", xscale="log")
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter("{x:.0f}")
        axis.grid(alpha=0.25)
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=130)
