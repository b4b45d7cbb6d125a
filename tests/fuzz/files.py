"""Folders of saved compressors, damaged on purpose: loaded right, or refused in one sentence; saving again is whole."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import mmcompress
from mmcompress.io import CONFIG, WEIGHTS

from .outcome import Failure, refusal
from .values import method, value

Damage = Callable[[Path, int, Any], None]
DAMAGE: dict[str, Damage] = {}


def damage(name: str) -> Callable[[Damage], Damage]:
    def enter(function: Damage) -> Damage:
        DAMAGE[name] = function
        return function

    return enter


def _edit(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the JSON, where it still is JSON."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    path.write_text(json.dumps(change(config)))


def _plain(given: Any) -> Any:
    made = value(given)
    return made if isinstance(made, (int, float, str, list, dict, type(None))) else str(made)


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / WEIGHTS
    if path.is_file():
        try:
            state = load_file(path)
        except Exception:
            return
        save_file(change(state), path)


def _cut(path, at):
    if path.is_file():
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * at // 1000])


@damage("cut the JSON")
def _(folder, at, given):
    _cut(folder / CONFIG, at)


@damage("change a byte of the JSON")
def _(folder, at, given):
    path = folder / CONFIG
    if path.is_file() and (data := bytearray(path.read_bytes())):
        data[len(data) * at // 1000] ^= 1 << at % 8
        path.write_bytes(data)


@damage("JSON of another value")
def _(folder, at, given):
    (folder / CONFIG).write_text(json.dumps(_plain(given)))


@damage("JSON that nests without end")
def _(folder, at, given):
    (folder / CONFIG).write_text("[" * 100_000)


@damage("JSON that is no text")
def _(folder, at, given):
    (folder / CONFIG).write_bytes(bytes([0xFF, 0xFE, at % 256, 0xD8]))


@damage("no JSON")
def _(folder, at, given):
    (folder / CONFIG).unlink(missing_ok=True)


@damage("a folder in the place of the JSON")
def _(folder, at, given):
    (folder / CONFIG).unlink(missing_ok=True)
    (folder / CONFIG).mkdir(exist_ok=True)


@damage("a field more")
def _(folder, at, given):
    _edit(folder, lambda c: {**c, "unknown": _plain(given)} if isinstance(c, dict) else c)


@damage("a field less")
def _(folder, at, given):
    _edit(
        folder, lambda c: {k: v for i, (k, v) in enumerate(c.items()) if i != at % len(c)} if isinstance(c, dict) and c else c
    )


@damage("another value of a field")
def _(folder, at, given):
    _edit(folder, lambda c: {**c, sorted(c)[at % len(c)]: _plain(given)} if isinstance(c, dict) and c else c)


@damage("a format from the future")
def _(folder, at, given):
    _edit(folder, lambda c: {**c, "format": 99, "format_version": 99} if isinstance(c, dict) else c)


@damage("cut the weights")
def _(folder, at, given):
    _cut(folder / WEIGHTS, at)


@damage("change a byte of the weights' head")
def _(folder, at, given):
    path = folder / WEIGHTS
    if path.is_file() and (data := bytearray(path.read_bytes())):
        data[at % min(len(data), 300)] ^= 1 << at % 8
        path.write_bytes(data)


@damage("no weights")
def _(folder, at, given):
    (folder / WEIGHTS).unlink(missing_ok=True)


@damage("weights that nobody needs")
def _(folder, at, given):
    save_file({"weight": torch.zeros(2)}, folder / WEIGHTS)


@damage("a tensor less")
def _(folder, at, given):
    _weights(folder, lambda s: {k: v for i, (k, v) in enumerate(sorted(s.items())) if i != at % len(s)} if s else s)


@damage("a tensor of another name")
def _(folder, at, given):
    _weights(folder, lambda s: {k + "_" * (i == at % len(s)): v for i, (k, v) in enumerate(sorted(s.items()))} if s else s)


@damage("a tensor of another shape")
def _(folder, at, given):
    _weights(
        folder,
        lambda s: {k: torch.cat([v, v]) if i == at % len(s) else v for i, (k, v) in enumerate(sorted(s.items()))} if s else s,
    )


@damage("a tensor of whole numbers")
def _(folder, at, given):
    _weights(folder, lambda s: {k: v.long() for k, v in s.items()})


@damage("a tensor of NaN")
def _(folder, at, given):
    _weights(folder, lambda s: {k: v * float("nan") if v.is_floating_point() else v for k, v in s.items()})


@damage("a folder in the place of the weights")
def _(folder, at, given):
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / WEIGHTS).mkdir(exist_ok=True)


def run_files(case: dict[str, Any]) -> str:
    """Save, damage, load; what loads can be saved and loaded once more with the same configuration and weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "saved"
        try:
            mmcompress.save_pretrained(method(case["method"]), folder)
        except Exception as error:
            return refusal(error)
        for one in case["damage"]:
            DAMAGE[one["how"]](folder, one["at"], one.get("value"))
        try:
            made = mmcompress.from_pretrained(folder)
        except Exception as error:
            return refusal(error)
        mmcompress.save_pretrained(made, Path(name) / "again")
        again = mmcompress.from_pretrained(Path(name) / "again")
        if again.config() != made.config():
            raise Failure(f"configuration after a round trip is {made.config()}, got {again.config()}")
        a, b = made.state_dict(), again.state_dict()
        if a.keys() != b.keys() or not all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a):
            raise Failure("weights after a round trip are the same")
        if any(not v.isfinite().all() for v in a.values() if v.is_floating_point()):
            raise Failure("weights that are not finite are refused")
    return "right"
