"""Make a failing case smaller while it fails in the same way: drop parts of lists, leave out fields, take plainer values."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from .run import outcome_of, signature

PLAIN: dict[str, Any] = {
    "model_seed": 0, "dtype": "float32", "attention": "sdpa", "seed": 0, "side": "left", "made": "create", "install": "with",
    "text": {"num_hidden_layers": 4}, "B": 1, "D": 16, "fill": "normal", "sizes": False, "start": 0, "backward": False,
    "family": "llava", "cache": "dynamic", "new": 1, "mask": True, "sample": False, "returns": 1, "turn": 1, "keep": 0,
    "row": 0, "keep_ratio": 0.5,
}  # fmt: skip
"""The plainest value of a key, wherever it stands."""
LISTS = ("calls", "stages", "rows", "damage", "arguments")
NEVER = ("kind", "method", "op", "what", "how", "config", "text")


def smaller(case: Any) -> Iterator[Any]:
    """Cases that are one step plainer, the largest steps first."""
    if isinstance(case, dict):
        for key in (k for k in LISTS if k in case):
            for i in range(len(case[key]) if len(case[key]) > 1 else 0):
                yield {**case, key: case[key][:i] + case[key][i + 1 :]}
        for key, value in case.items():
            if key in PLAIN and value != PLAIN[key]:
                yield {**case, key: PLAIN[key]}
            if "kind" not in case and key not in NEVER:
                yield {k: v for k, v in case.items() if k != key}
        for key in (k for k in case if k not in NEVER):
            for value in smaller(case[key]):
                yield {**case, key: value}
    elif isinstance(case, list):
        for i, part in enumerate(case):
            if not isinstance(part, dict | list):
                yield case[:i] + case[i + 1 :]
            for value in smaller(part):
                yield [*case[:i], value, *case[i + 1 :]]
    elif isinstance(case, int) and not isinstance(case, bool) and 1 < case < 200:
        yield case // 2


def shrink(
    case: dict[str, Any], error: BaseException, seconds: float = 20.0, tries: int = 200
) -> tuple[dict[str, Any], BaseException]:
    """The smallest case found that fails with the same signature, and its exception."""
    wanted, end, again = signature(error), time.monotonic() + seconds, True
    while again:
        again = False
        for candidate in smaller(case):
            if tries <= 0 or time.monotonic() > end:
                return case, error
            tries -= 1
            result, other = outcome_of(candidate)
            if result == "failed" and other is not None and signature(other) == wanted:
                case, error, again = candidate, other, True
                break
    return case, error
