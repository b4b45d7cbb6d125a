"""Measuring what a reduction costs in quality: `run(model, tasks, compressor, n, seed)`, and `mmcompress bench` for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcompress.eval.loop import Difference, Result, bootstrap, paired, run, sweep

__all__ = ["Difference", "Result", "bootstrap", "paired", "run", "sweep"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("mmcompress.eval.loop"), name)
