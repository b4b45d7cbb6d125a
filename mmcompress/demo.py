"""The demonstration: questions about pictures, pages, clips and recordings, uncompressed and with every registered method
that the model of a section supports.

Which methods run, with which fields, follows from the registry alone: a new method appears by itself.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcompress.registry import create, did_you_mean, list_methods

if TYPE_CHECKING:
    from PIL import Image

    from mmcompress.eval.tasks import Sample, Task
    from mmcompress.tokens import Layout
    from mmcompress.viz import View

RATIOS = (0.25, 0.1)
CONTROL = "none"
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Section:
    """A part of the demonstration: `num_questions` questions of `tasks` in turn, answered by one model."""

    name: str
    title: str
    model: str
    tasks: tuple[str, ...]
    num_questions: int


SECTIONS = (
    Section("photographs", "Photographs", "zoo:image", ("detail", "relations", "easy_vqa"), 3),
    Section("document", "A document", "zoo:image", ("document",), 1),
    Section("video", "Clips", "zoo:video", ("video_order", "video_event"), 2),
    Section("audio", "Recordings", "zoo:audio", ("sound_order",), 2),
)


@dataclass(frozen=True)
class Setting:
    """A method as it is run: at one of RATIOS, or at its defaults where it has no keep_ratio (ratio None)."""

    method: str
    ratio: float | None

    @property
    def label(self) -> str:
        if self.method == CONTROL:
            return "uncompressed"
        return self.method if self.ratio is None else f"{self.method} {self.ratio:g}"

    def make(self) -> Any:
        return create(self.method) if self.ratio is None else create(self.method, keep_ratio=self.ratio)


MEANS = ("tokens_in", "tokens_kept", "separators", "sequence", "kv_bytes", "flops", "prefill_ms")


@dataclass
class Run:
    """One question answered in one setting.

    tokens_kept, sequence: what a layer sees, mean over the layers. kv_bytes, flops: nan where the ledger counts none.
    prefill_ms: from the call to the first token.
    """

    setting: Setting
    answer: str
    correct: bool
    tokens_in: int
    tokens_kept: float
    separators: int
    sequence: float
    kv_bytes: float
    flops: float
    prefill_ms: float
    views: list[View] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        values = {n: getattr(self, n) for n in ("answer", "correct", *MEANS)}
        return {"method": self.setting.method, "keep_ratio": self.setting.ratio, **values}


@dataclass(frozen=True)
class Spot:
    """A place of the answer: a box (left, top, right, bottom; pixels) on picture number `picture`; None: all of it."""

    picture: int
    box: tuple[float, float, float, float] | None


@dataclass
class Asked:
    """A question of a task, the answers that count, what it is about, where the answer shows, and all runs.

    kind: "image", "video" or "audio". pictures: what lies under the views (`viz.backdrops`). evidence: spots on them.
    """

    task: str
    kind: str
    prompt: str
    answers: list[str]
    pictures: list[Image.Image] = field(default_factory=list, repr=False)
    evidence: list[Spot] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        runs = [r.to_json() for r in self.runs]
        return {"task": self.task, "kind": self.kind, "prompt": self.prompt, "answers": self.answers, "runs": runs}


@dataclass
class Part:
    """What a section showed. skipped: method -> why it did not run on this model."""

    section: Section
    asked: list[Asked]
    settings: list[Setting]
    skipped: dict[str, str]

    def of(self, setting: Setting) -> list[Run]:
        return [r for a in self.asked for r in a.runs if r.setting == setting]

    def mean(self, setting: Setting, name: str) -> float:
        runs = self.of(setting)
        return sum(getattr(r, name) for r in runs) / len(runs)

    def num_correct(self, setting: Setting) -> int:
        return sum(r.correct for r in self.of(setting))

    def to_json(self) -> dict[str, Any]:
        summary = [
            {
                "method": s.method,
                "keep_ratio": s.ratio,
                "correct": self.num_correct(s),
                "questions": len(self.of(s)),
                **{n: self.mean(s, n) for n in MEANS},
            }
            for s in self.settings
        ]
        return {
            "name": self.section.name,
            "model": self.section.model,
            "skipped": self.skipped,
            "summary": summary,
            "questions": [a.to_json() for a in self.asked],
        }


@dataclass
class Result:
    """Everything the demo saw. left_out: name of a section -> why it could not run here."""

    parts: list[Part]
    left_out: dict[str, str]
    seconds: float
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
            "left_out": self.left_out,
            "sections": [p.to_json() for p in self.parts],
        }


def settings() -> list[Setting]:
    """The uncompressed control first, then every method ratio by ratio, at last those with a rule of their own."""
    from mmcompress.cards import has_ratio

    names = [name for name in list_methods() if name != CONTROL]
    out = [Setting(name, ratio) for ratio in RATIOS for name in names if has_ratio(name)]
    return [Setting(CONTROL, None), *out, *(Setting(name, None) for name in names if not has_ratio(name))]


def chosen(names: str | None) -> list[Section]:
    """The sections named, separated by commas; None: all. Raises ValueError for an unknown name or one given twice."""
    known = {s.name: s for s in SECTIONS}
    wanted = list(known) if names is None else [n.strip() for n in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ValueError(f"--sections must be among {', '.join(known)}; got {name!r}{did_you_mean(name, known)}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"--sections must name each section once, got {names!r}")
    return [known[name] for name in wanted]


def questions(names: Sequence[str], n: int) -> list[tuple[Task, Sample]]:
    """n questions of the test split, one task after the other; each is about another item."""
    from mmcompress.eval.tasks import Sample, create_task

    tasks = [create_task(name) for name in names]
    out = []
    for i in range(n):
        task, turn = tasks[i % len(tasks)], i // len(tasks)
        (scene,) = task.scenes("test", 1, seed=0, start=turn)
        q = scene.questions[turn % len(scene.questions)]
        out.append((task, Sample(scene.item, q.prompt, q.answers, q.evidence, q.topic)))
    return out


def run(sections: Iterable[Section], num_questions: int | None = None, say: Callable[[str], None] | None = None) -> Result:
    """Ask every question of every section in every setting; progress goes to `say` (stderr by default).

    num_questions: of each section, in place of its own number. A section whose model or task is not here is left out and named;
    where that leaves none, ValueError.
    """
    import torch

    from mmcompress.ask import load_model

    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    start = time.perf_counter()
    parts, left_out, loaded = [], {}, ""
    model: Any = None
    processor: Any = None
    for section in sections:
        try:
            todo = questions(section.tasks, num_questions or section.num_questions)
            if section.model != loaded:
                say(f"loading {section.model}")
                model, processor = load_model(section.model)
                loaded = section.model
        except (ValueError, OSError, ImportError) as error:
            left_out[section.name] = f"{section.model} with {', '.join(section.tasks)}: {error}"
            say(f"the section {section.name} is left out: {left_out[section.name]}")
            continue
        say(f"{section.title}: {len(todo)} question{'' if len(todo) == 1 else 's'}")
        parts.append(
            _part(section, model, processor, todo, lambda text: say(f"{text}, {time.perf_counter() - start:.0f} s so far"))
        )
    if not parts:
        raise ValueError(f"no section of the demo can run here: {'; '.join(left_out.values())}")
    environment = {
        "device": str(model.device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return Result(parts, left_out, time.perf_counter() - start, environment)


def _part(section: Section, model: Any, processor: Any, todo: list[tuple[Task, Sample]], say: Callable[[str], None]) -> Part:
    """All questions of a section in all settings that its model supports."""
    from mmcompress.ask import ask, prepare
    from mmcompress.viz import views

    warm = prepare(model, processor, question(*todo[0]))
    part = Part(section, [], [], {})
    for setting in settings():  # one short run of each method: warms up, and finds out which ones this model supports
        if setting.method in part.skipped:
            continue
        if all(s.method != setting.method for s in part.settings):
            try:
                ask(model, processor, warm, setting.make(), 1)
            except ValueError as error:
                part.skipped[setting.method] = str(error)
                continue
        part.settings.append(setting)
    for i, (task, sample) in enumerate(todo):
        asked = Asked(task.name, task.kind, sample.prompt, sorted(sample.answers))
        part.asked.append(asked)
        inputs = prepare(model, processor, question(task, sample))
        for setting in part.settings:
            answer = ask(model, processor, inputs, setting.make(), MAX_NEW_TOKENS)
            ledger, item = answer.ledger, answer.items[0]
            if not asked.runs:
                asked.pictures, asked.evidence = _shown(processor, task, sample, item.layout, inputs)
            asked.runs.append(
                Run(
                    setting=setting,
                    answer=answer.text,
                    correct=bool(task.score(sample, answer.text)),
                    tokens_in=ledger.tokens_in,
                    tokens_kept=ledger.tokens_kept,
                    separators=ledger.separators,
                    sequence=ledger.sequence_kept,
                    kv_bytes=math.nan if ledger.kv_bytes is None else ledger.kv_bytes,
                    flops=math.nan if ledger.flops is None else ledger.flops,
                    prefill_ms=answer.prefill_ms,
                    views=views(item),
                )
            )
        right = sum(r.correct for r in asked.runs)
        say(f"  question {i + 1} of {len(todo)}: {right} of {len(part.settings)} settings answer right")
    return part


def question(task: Task, sample: Sample) -> Any:
    """A sample as `ask.Question`."""
    import numpy as np

    from mmcompress.ask import Question

    if task.kind == "image":
        return Question(sample.prompt, images=[sample.item])
    if task.kind == "audio":
        return Question(sample.prompt, audio=[sample.item])
    frames = np.stack([np.asarray(frame) for frame in sample.item])
    return Question(sample.prompt, videos=[(frames, list(range(len(frames))), task.fps)])


def _shown(
    processor: Any, task: Task, sample: Sample, layout: Layout, inputs: dict[str, Any]
) -> tuple[list[Image.Image], list[Spot]]:
    """The pictures under the views of a sample's item, and the spots of its evidence on them."""
    from mmcompress.ask import seen
    from mmcompress.viz import HOP, backdrops, frames_per_step

    pictures = backdrops(seen(processor, sample.item, layout, inputs), layout, task.sampling_rate)
    spots = []
    for e in sample.evidence:
        if e.seconds is not None:
            start, end = (seconds / HOP for seconds in e.seconds)
            spots.append(Spot(0, (start, 0, min(end, pictures[0].width), pictures[0].height)))
        elif e.frames is not None:
            per_step = frames_per_step(len(sample.item), layout)  # only the first frame of a step is shown
            spots += [Spot(f // per_step, None if f % per_step else e.box) for f in range(*e.frames)]
        elif e.box is not None:
            spots += [Spot(i, e.box) for i in range(len(pictures))]
    return pictures, list(dict.fromkeys(spots))


HEADERS = ["setting", "answer", "", "kept/in", "sequence", "KV MiB", "prefill GFLOP", "prefill ms"]


def text(result: Result) -> str:
    """For every section the questions, the table of all runs and the summary; then what was left out."""
    lines = []
    for part in result.parts:
        lines += [f"{part.section.title} ({part.section.model})", *_part_lines(part), ""]
    lines += [f"Left out: {name}: {why}" for name, why in result.left_out.items()]
    return "\n".join(lines).rstrip()


def _part_lines(part: Part) -> list[str]:
    from mmcompress.report import count, gflop, mib, table

    rows: list[list[str]] = []
    for i, asked in enumerate(part.asked):
        for r in asked.runs:
            mark = "right" if r.correct else "wrong"
            answer = r.answer.replace("\n", " ") or "(nothing)"
            rows.append(
                [
                    f"{i + 1}",
                    r.setting.label,
                    answer if len(answer) <= 24 else answer[:23] + "…",
                    mark,
                    f"{count(r.tokens_kept)}/{r.tokens_in}",
                    f"{r.sequence:.0f}",
                    mib(r.kv_bytes),
                    gflop(r.flops),
                    f"{r.prefill_ms:.0f}",
                ]
            )
    return [
        *(f"{i + 1:>3}. {a.prompt}  →  {' or '.join(a.answers)}" for i, a in enumerate(part.asked)),
        "",
        table(["no", *HEADERS], rows, "rlllrrrrr"),
        "",
        "Means over the questions",
        summary(part),
        *(f"Not run: {name}: {why}" for name, why in part.skipped.items()),
    ]


def summary(part: Part) -> str:
    """One line per setting."""
    from mmcompress.report import gflop, mib, percent, table

    rows = []
    for s in part.settings:
        m = lambda name, s=s: part.mean(s, name)  # noqa: E731
        rows.append(
            [
                s.label,
                f"{part.num_correct(s)} of {len(part.asked)}",
                percent(m("tokens_kept"), m("tokens_in")),
                f"{m('separators'):.0f}",
                f"{m('sequence'):.0f}",
                mib(m("kv_bytes")),
                gflop(m("flops")),
                f"{m('prefill_ms'):.0f}",
            ]
        )
    return table(["setting", "right", "kept", "separators", *HEADERS[4:]], rows, "lrrrrrrr")


def write(result: Result, folder: Path) -> Path:
    """Write the page into `folder`; returns its path."""
    from mmcompress.page import page

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page(result), encoding="utf-8")
    return path
