"""The demonstration: questions about real pictures, uncompressed and with every registered method that the model supports.

Which methods run, with which fields, follows from the registry alone: a new method appears by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcompress.registry import create, list_methods

if TYPE_CHECKING:
    from mmcompress.viz import View

RATIOS = (0.25, 0.1)
MODEL = "zoo:image"
CONTROL = "none"
MAX_NEW_TOKENS = 8


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


@dataclass
class Run:
    """One question answered in one setting.

    tokens_kept, sequence: what a layer sees, mean over the layers. prefill_ms: from the call to the first token.
    """

    setting: Setting
    answer: str
    correct: bool
    tokens_in: int
    tokens_kept: float
    separators: int
    sequence: float
    kv_bytes: int
    flops: int
    prefill_ms: float
    views: list[View] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        names = ("answer", "correct", "tokens_in", "tokens_kept", "separators", "sequence", "kv_bytes", "flops", "prefill_ms")
        return {"method": self.setting.method, "keep_ratio": self.setting.ratio, **{n: getattr(self, n) for n in names}}


@dataclass
class Asked:
    """A question of a task, its picture, the answers that count, and all runs."""

    task: str
    prompt: str
    answers: list[str]
    picture: Any
    evidence: tuple[int, ...] | None
    runs: list[Run] = field(default_factory=list)


@dataclass
class Result:
    """Everything the demo saw. skipped: method -> why it did not run on this model."""

    model: str
    asked: list[Asked]
    settings: list[Setting]
    skipped: dict[str, str]
    seconds: float
    environment: dict[str, Any]

    def of(self, setting: Setting) -> list[Run]:
        return [r for a in self.asked for r in a.runs if r.setting == setting]

    def mean(self, setting: Setting, name: str) -> float:
        runs = self.of(setting)
        return sum(getattr(r, name) for r in runs) / len(runs)

    def num_correct(self, setting: Setting) -> int:
        return sum(r.correct for r in self.of(setting))

    def to_json(self) -> dict[str, Any]:
        questions = [
            {"task": a.task, "prompt": a.prompt, "answers": a.answers, "runs": [r.to_json() for r in a.runs]}
            for a in self.asked
        ]
        names = ("tokens_in", "tokens_kept", "separators", "sequence", "kv_bytes", "flops", "prefill_ms")
        summary = [
            {
                "method": s.method,
                "keep_ratio": s.ratio,
                "correct": self.num_correct(s),
                "questions": len(self.of(s)),
                **{n: self.mean(s, n) for n in names},
            }
            for s in self.settings
        ]
        return {
            "model": self.model,
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
            "skipped": self.skipped,
            "summary": summary,
            "questions": questions,
        }


def settings() -> list[Setting]:
    """The uncompressed control first, then every method ratio by ratio, at last those with a rule of their own."""
    from mmcompress.cards import has_ratio

    names = [name for name in list_methods() if name != CONTROL]
    out = [Setting(name, ratio) for ratio in RATIOS for name in names if has_ratio(name)]
    return [Setting(CONTROL, None), *out, *(Setting(name, None) for name in names if not has_ratio(name))]


def questions(n: int) -> list[tuple[Any, Asked]]:
    """n questions of the test split with the task that judges them: of three, two about details of photographs and one about
    a shape."""
    from mmcompress.eval.tasks import create_task

    detail, shapes = create_task("detail"), create_task("easy_vqa")
    few = n // 3
    samples = [(detail, s) for s in detail.samples("test", n - few, seed=0)]
    samples += [(shapes, s) for s in shapes.samples("test", few, seed=0)] if few else []
    return [
        (
            (task, s),
            Asked(task.name, s.prompt, sorted(s.answers), s.item, s.evidence[0].box if s.evidence else None),
        )
        for task, s in samples
    ]


def run(num_questions: int, model_name: str, say: Callable[[str], None] | None = None) -> Result:
    """Ask every question in every setting; progress goes to `say` (stderr by default)."""
    import torch

    from mmcompress.ask import Question, ask, load_model, prepare
    from mmcompress.viz import views

    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    start = time.perf_counter()
    say(f"loading {model_name}")
    model, processor = load_model(model_name)
    todo = questions(num_questions)
    wanted, skipped = settings(), {}
    warm = prepare(model, processor, Question(todo[0][1].prompt, [todo[0][1].picture]))
    kept: list[Setting] = []
    for setting in wanted:  # one short run each: warms up, and finds out which methods this model supports
        if any(s.method == setting.method for s in kept):
            kept.append(setting)
        if setting.method in skipped or setting in kept:
            continue
        try:
            ask(model, processor, warm, setting.make(), 1)
            kept.append(setting)
        except ValueError as error:
            skipped[setting.method] = str(error)
            say(f"{setting.method} does not run on this model: {error}")
    for i, ((task, sample), asked) in enumerate(todo):
        inputs = prepare(model, processor, Question(asked.prompt, [asked.picture]))
        for setting in kept:
            answer = ask(model, processor, inputs, setting.make(), MAX_NEW_TOKENS)
            ledger = answer.ledger
            asked.runs.append(
                Run(
                    setting=setting,
                    answer=answer.text,
                    correct=bool(task.score(sample, answer.text)),
                    tokens_in=ledger.tokens_in,
                    tokens_kept=ledger.tokens_kept,
                    separators=ledger.separators,
                    sequence=ledger.sequence_kept,
                    kv_bytes=ledger.kv_bytes,
                    flops=ledger.flops,
                    prefill_ms=answer.prefill_ms,
                    views=views(answer.items[0]),
                )
            )
        right = sum(r.correct for r in asked.runs)
        seconds = time.perf_counter() - start
        say(f"question {i + 1} of {len(todo)}: {right} of {len(kept)} settings answer right, {seconds:.0f} s so far")
    environment = {
        "device": str(model.device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return Result(model_name, [a for _, a in todo], kept, skipped, time.perf_counter() - start, environment)


HEADERS = ["setting", "answer", "", "kept/in", "sequence", "KV MiB", "prefill GFLOP", "prefill ms"]


def text(result: Result) -> str:
    """The table of all runs, and the summary."""
    from mmcompress.report import count, gflop, mib, table

    rows: list[list[str]] = []
    for i, asked in enumerate(result.asked):
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
    asked_lines = [f"{i + 1:>3}. {a.prompt}  →  {' or '.join(a.answers)}" for i, a in enumerate(result.asked)]
    lines = [
        "Questions and the answers that count",
        *asked_lines,
        "",
        table(["no", *HEADERS], rows, "rlllrrrrr"),
        "",
        "Summary (means over the questions)",
        summary(result),
        *(f"Not run: {name}: {why}" for name, why in result.skipped.items()),
    ]
    return "\n".join(lines)


def summary(result: Result) -> str:
    """One line per setting."""
    from mmcompress.report import gflop, mib, percent, table

    rows = []
    for s in result.settings:
        m = lambda name, s=s: result.mean(s, name)  # noqa: E731
        rows.append(
            [
                s.label,
                f"{result.num_correct(s)} of {len(result.asked)}",
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
