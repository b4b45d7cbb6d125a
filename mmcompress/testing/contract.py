"""The contract of a model family: what has to hold for any method on any model, checked from outside.

    report = check_family(model, lambda rows: tiny_inputs("llava", 4, rows=rows))
    print(report)

Every check compares with the stock model. Where one fails, the stock model is asked for the same thing alone: what it cannot do
either is no fault of the library and says "stock".
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcompress.testing.checks import Checks
from mmcompress.testing.harness import NotRun, Refused, first_line
from mmcompress.testing.oracle import Direction

CHECKS = {
    "install": "a compressor goes in and out",
    "identity": "keep_ratio 1: bit for bit the stock model",
    "text only": "a prompt without items: bit for bit the stock model",
    "machinery": "all rows through the whole path: the stock model",
    "batch": "a padded batch = its samples one by one",
    "mask": "dropping rows = hiding their columns from the stock model",
    "generate": "generated = the stock model's with these columns hidden",
    "uncached": "with a cache = without",
    "static": "a static cache = a dynamic one",
    "turns": "a second turn on the returned cache = one run",
    "beams": "beams of a batch = beams one by one, with the right scores",
    "answers": "each of several answers has the logits of its own prompt",
    "restore": "nothing is left afterwards, also after an exception",
    "ledger": "counts = placeholder rows, and the rows that each layer got",
    "items": "the items are the real ones, one each",
    "layer batch": "at a decoder layer: batch",
    "layer mask": "at a decoder layer: mask",
    "layer generate": "at a decoder layer: generate",
}
"""The checks and what they ask, in order."""


@dataclass
class Report:
    """verdicts: check -> "pass", "fail: what", "stock: why the stock model cannot", "refused: a sentence", "not run: why"."""

    model: str
    verdicts: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and nothing was refused but a place inside the decoder."""
        return not any(v.startswith("fail") or (v.startswith("refused") and not n.startswith("layer")) for n, v in self)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.verdicts.items())

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "ok": self.ok, "checks": dict(self.verdicts)}

    def __str__(self) -> str:
        from mmcompress.report import table

        rows = [[name, CHECKS.get(name, ""), verdict] for name, verdict in self]
        return table(["check", "what it asks", "result"], rows, "lll", wrap=(1, 2))


def check_family(
    model: Any,
    inputs: Callable[..., Mapping[str, Tensor]] | Mapping[str, Tensor],
    *,
    samples: int = 3,
    text_only: Mapping[str, Tensor] | None = None,
    items: Sequence[Sequence[int]] | None = None,
    placeholders: Sequence[int] | None = None,
    layer: int = 2,
    keep_ratio: float = 0.4,
    tolerance: float = 1e-4,
    checks: Sequence[str] = tuple(CHECKS),
    progress: Callable[[str], None] | None = None,
    **install: Any,
) -> Report:
    """Run the contract on one model, through the public interface only.

    inputs: inputs(rows) gives the left-padded batch of these samples (numbers below `samples`) for `model(**inputs)`; with an
    argument `padding_side` it is asked for right padding too. A plain dict is one sample, and what takes several is not run.
    text_only: a batch without items. items: for each sample how many placeholder rows each of its items has.
    placeholders: the ids that stand for rows of items (default: those that the model's configuration names).
    layer: the decoder layer of the layer checks. progress: is told the name of each check.
    tolerance: relative to the largest logit.
    install: goes to the installing context (`seam=…`).
    Raises ValueError for unknown checks.
    """
    if unknown := [c for c in checks if c not in CHECKS]:
        raise ValueError(f"checks must be of {', '.join(CHECKS)}; got {', '.join(unknown)}")
    if isinstance(inputs, Mapping):
        alone, samples = inputs, 1
        inputs = lambda rows: alone  # noqa: E731
    contract = Checks(model, inputs, samples, text_only, items, placeholders, layer, keep_ratio, tolerance, install)
    report = Report(f"{type(model).__name__} ({getattr(model.config, 'model_type', '?')})")
    with torch.no_grad():
        if "restore" in checks:
            contract.remember()
        for name in CHECKS:
            if name in checks:
                if progress is not None:
                    progress(name)
                report.verdicts[name] = judge(contract, name)
                if name == "install" and report.verdicts[name] != "pass":
                    break
    return report


def check_tiny(family: str, checks: Sequence[str] = tuple(CHECKS), **options: Any) -> Report:
    """The contract on the tiny random model of a family of `FAMILIES`. options: as `check_family` takes them."""
    from mmcompress.testing.tiny import FAMILIES, tiny_inputs, tiny_items, tiny_model

    model, spec = tiny_model(family), FAMILIES[family]
    size = 4 if spec.text_row else 3

    def inputs(rows: Sequence[int], padding_side: str = "left") -> Mapping[str, Tensor]:
        return tiny_inputs(family, size, rows=rows, padding_side=padding_side)

    text_only = tiny_inputs(family, 2, items=[[], []]) if spec.text_row else None
    told = {"text_only": text_only, "items": tiny_items(family, size), "placeholders": spec.placeholders}
    return check_family(model, inputs, samples=size, checks=checks, **{**told, **options})


def judge(contract: Checks, name: str) -> str:
    """The verdict of one check."""
    at_layer = name.startswith("layer ")
    what = name.removeprefix("layer ").replace(" ", "_")
    check = getattr(contract, f"check_{what}")
    stage = Direction(keep_ratio=contract.keep_ratio, layer=contract.layer if at_layer else None)
    try:
        wrong = check(stage)
    except NotRun as error:
        return f"not run: {error}"
    except Refused as error:
        return f"refused: {error}"
    except Exception as error:
        if refusal(error):
            return f"refused: {first_line(error)}"
        wrong = f"{type(error).__name__}: {first_line(error)}"
    if wrong is None:
        return "pass"
    stock = asked(check, None)
    if (
        stock and what in ("beams", "answers") and contract.narrow()
    ):  # the items of a prompt are mixed up: those with one are not
        with contract.narrowed():
            alone, stock_alone = asked(check, stage), asked(check, None)
        if alone and not stock_alone:
            wrong, stock = f"prompts with one item: {alone}", None
    return f"fail: {wrong}" if stock is None else f"stock: {stock}"


def asked(check: Callable, stage: Any) -> str | None:
    """What is wrong, an error in one line too."""
    try:
        return check(stage)
    except NotRun:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"


def refusal(error: BaseException) -> bool:
    """Whether the library itself refused: a ValueError or TypeError that it raised."""
    if not isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    package = Path(__file__).parents[1]
    return package in Path(last).parents and package / "testing" not in Path(last).parents
