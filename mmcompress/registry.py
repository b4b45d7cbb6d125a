"""Names of methods: `register`, `create`, `list_methods`. A method's file in `mmcompress/methods/` carries the
registry's name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

_methods: dict[str, Callable] = {}
_loaded = False


def register(method: Callable) -> Callable:
    """Enter a Compressor class under its name in snake_case (or its own `name`), or a function that returns a chain (a
    preset) under its own name.

    Raises ValueError where the name is taken by something else.
    """
    name = (
        method.__dict__.get("name") or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", method.__name__).lower()
    )
    other = _methods.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(f"register: the name {name!r} is taken by {other.__module__}.{other.__qualname__}")
    _methods[name] = method
    method.name = name  # type: ignore[attr-defined]
    return method


def list_methods() -> list[str]:
    """The names of all registered methods, sorted."""
    _load()
    return sorted(_methods)


def get_method(name: str) -> Callable:
    """The registered class or preset. Raises ValueError that suggests the nearest name."""
    _load()
    if not isinstance(name, str):
        raise TypeError(f"method must be a name, one of {', '.join(sorted(_methods))}; got {name!r}")
    if name not in _methods:
        raise ValueError(f"unknown method {name!r}{did_you_mean(name, _methods)}; methods: {', '.join(sorted(_methods))}")
    return _methods[name]


def create(name: str, **config: Any):
    """A compressor by name: `create("k_center", keep_ratio=0.25, layer=None)`.

    Raises ValueError for an unknown name or field and for a value outside its range, TypeError for a value of the wrong type.
    """
    method = get_method(name)
    allowed = field_names(method)
    for key in config:
        if key not in allowed:
            raise ValueError(f"{name} has no field {key!r}{did_you_mean(key, allowed)}; fields: {', '.join(allowed)}")
    return method(**config)


def field_names(method: Callable) -> list[str]:
    """The configuration fields of a registered method, in order."""
    if isinstance(method, type):
        return [f.name for f in fields(method)]
    code = method.__code__  # type: ignore[attr-defined]
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """', did you mean …?' or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _load() -> None:
    global _loaded
    if not _loaded:
        package = importlib.import_module("mmcompress.methods")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"mmcompress.methods.{module.name}")
        _loaded = True
