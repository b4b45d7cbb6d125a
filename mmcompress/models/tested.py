"""Which releases of transformers the whole test suite ran on, and a word to whoever uses another.

The seam asks signatures and attributes, never a version number, so other releases may well work; only these are known to.
`make test-versions` runs the tests on each of them and writes benchmarks/results/versions.json; a test compares that with
TESTED.
"""

from __future__ import annotations

import functools
import warnings

RELEASES = ("5.16.1", "5.17.0", "5.20.2", "5.24.0")
"""What `make test-versions` runs, oldest first."""

TESTED = ("5.16.1", "5.17.0", "5.24.0")
"""Those of RELEASES on which all suites were green in the committed result, oldest first."""


MODEL_TYPES: frozenset[str] = frozenset()
"""Model types whose tiny model keeps the contract of a family (`make test-families`), beside those with an adapter."""


def is_tested(installed: str) -> bool:
    """Whether this release of transformers lies between the oldest and the newest of TESTED, ends included."""
    from packaging.version import Version

    return Version(TESTED[0]) <= Version(installed) <= Version(TESTED[-1])


def advice(installed: str) -> str:
    """What to say to a user of a release outside of the range."""
    return f"mmcompress is tested with transformers {TESTED[0]} to {TESTED[-1]}, {installed} is installed and may give errors"


def warn_untested() -> None:
    """UserWarning, once in a process, where the transformers in use lies outside of the tested range.

    Called by `_install` in patch.py: the warning points at the caller of `compress_` or at the `with` line.
    """
    import transformers

    _warn_once(transformers.__version__)


@functools.cache
def _warn_once(installed: str) -> None:
    if not is_tested(installed):
        warnings.warn(advice(installed), stacklevel=5)
