"""Instance wrappers: bound methods in a module's `__dict__`, undone exactly. Hooks and class changes are ignored by
compiled models, these are not."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


@torch.compiler.disable
def _run(make: Callable, module: nn.Module, name: str, inherited: Callable | None, args: tuple, kwargs: dict) -> Any:
    """Call a wrapper. Under torch.compile it runs as it stands, with all that it calls: traced, decoder stages were skipped
    without a word. Decode steps carry no wrapper and stay compiled."""
    original = inherited or inspect.getattr_static(type(module), name).__get__(module, type(module))
    return make(module, original)(*args, **kwargs)


class Wrapper:
    """One replaced method of one module. `make(original)` gives the replacement; `self` inside is whatever module (or
    deep copy) is called."""

    def __init__(self, module: nn.Module, name: str, make: Callable[[nn.Module, Callable], Callable], owner: Any):
        inherited = module.__dict__.get(name)  # another library (accelerate) may have put one there

        @functools.wraps(getattr(type(module), name))  # keeps the signature for Trainer and generate
        def method(self, *args, **kwargs):
            return _run(make, self, name, inherited, args, kwargs)

        method.mmcompress = owner  # type: ignore[attr-defined]
        self.module, self.name, self.inherited = module, name, inherited
        self.bound = types.MethodType(method, module)  # bound: a deep copy binds to the copy
        self.paused = False
        setattr(module, name, self.bound)

    def pause(self) -> None:
        """Step aside for a while; stays where something else was wrapped around it since."""
        if self.module.__dict__.get(self.name) is self.bound:
            self._remove()
            self.paused = True

    def resume(self) -> None:
        """Back after `pause`."""
        if self.paused:
            setattr(self.module, self.name, self.bound)
            self.paused = False

    def check(self) -> None:
        """Raise RuntimeError where something else was wrapped around it since: `undo` would take off the wrong layer."""
        if not self.paused and self.module.__dict__.get(self.name) is not self.bound:
            raise RuntimeError(f"{type(self.module).__name__}.{self.name} was wrapped again after compress_; undo that first")

    def undo(self) -> None:
        """Remove it, bit for bit. Raises as `check` does."""
        self.check()
        if self.paused:
            self.paused = False
        else:
            self._remove()

    def _remove(self) -> None:
        if self.inherited is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self.inherited)


def base_model(model: Any) -> Any:
    """The transformers model itself, inside a PEFT wrapper where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def owner_of(module: nn.Module, name: str = "forward") -> Any:
    """The seam that wrapped this module's method, or None."""
    return getattr(module.__dict__.get(name), "mmcompress", None)


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` is on the model or a part of it; cannot see a wrapper that `torch.compile(model)`
    returned elsewhere."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not loaded: nothing was compiled
    compiled = dynamo.OptimizedModule if dynamo else ()
    return any(
        isinstance(m, compiled) or m._compiled_call_impl is not None or hasattr(m.forward, "_torchdynamo_orig_callable")
        for m in model.modules()
    )
