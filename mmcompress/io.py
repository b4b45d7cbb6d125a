"""Saving compressors: JSON for the configuration, safetensors for parameters; nothing executable.

The same two files stand beside a model or an adapter that was saved with a compressor in it (`save_beside`). The JSON alone
also travels inside a model's own config (`config.mmcompress`), which transformers saves and ignores.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mmcompress.compressor import Compressor, from_config

CONFIG, WEIGHTS, MODEL_CONFIG = "mmcompress.json", "mmcompress.safetensors", "config.json"
FORMAT = 1
"""The version of the two files that is written, and the newest that is read; files without one are of version 1."""


def save_pretrained(compressor: Compressor, folder: str | Path) -> None:
    """Write `mmcompress.json` and, where the compressor has parameters, `mmcompress.safetensors` into `folder`.

    A save that fails leaves what an earlier one wrote. Raises TypeError for what is no compressor, ValueError for a
    configuration that JSON cannot hold.
    """
    if not isinstance(compressor, Compressor):
        raise TypeError(f"compressor must be a Compressor, got {compressor!r}")
    save_beside(compressor, folder)


def save_beside(compressor: Compressor, folder: str | Path) -> None:
    """The files of `save_pretrained` beside those that a model or an adapter writes into `folder`, which are left alone."""
    from safetensors.torch import save

    try:
        config = json.dumps({"format_version": FORMAT, **compressor.config()}, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"compressor must have a configuration of plain JSON values, got {compressor!r}: {error}") from error
    state = {k: v.detach().cpu().contiguous().clone() for k, v in compressor.state_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {WEIGHTS: save(state) if state else None, CONFIG: config.encode()})


def _write(folder: Path, files: dict[str, bytes | None]) -> None:
    """Put all files in place, or take away those that are None; where one cannot be, all stay as they were."""
    with tempfile.TemporaryDirectory(prefix=".mmcompress-", dir=folder) as room:
        new, old = Path(room) / "new", Path(room) / "old"
        for part in (new, old):
            part.mkdir()
        for name, content in files.items():
            if content is not None:
                with (new / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            if (folder / name).exists():
                shutil.copy2(folder / name, old)
        try:
            for name, content in files.items():
                if content is not None:
                    os.replace(new / name, folder / name)
            for name, content in files.items():  # last: a stop before here leaves more than is read, never less
                if content is None:
                    (folder / name).unlink(missing_ok=True)
        except BaseException:
            for name in files:
                if (old / name).exists():
                    os.replace(old / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            raise


def from_pretrained(folder: str | Path) -> Compressor:
    """The compressor that `save_pretrained` wrote into a folder, or "zoo:NAME" for one that ships trained ("zoo:vq_hash", for
    the zoo's video model). The folder may be that of a model or an adapter which was saved with the compressor in it.

    Raises ValueError where the files are missing, broken, of a newer format, or do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = folder_of(folder)
    path, config = _read(folder)
    compressor = from_config(config)
    weights = folder / WEIGHTS
    try:
        state = load_file(weights) if weights.exists() else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is not a whole safetensors file: {error}") from error
    expected = set(compressor.state_dict())
    if set(state) != expected:
        raise ValueError(f"{WEIGHTS} must hold the parameters {some(expected)}, got {some(set(state))}")
    try:
        compressor.load_state_dict(state)
    except RuntimeError as error:  # a shape
        raise ValueError(f"{weights} does not fit {path}: {error}") from error
    return compressor


def some(names: set[str], most: int = 4) -> str:
    """Names as a list, of many the first few."""
    first = sorted(names)[:most]
    return str(first) if len(names) <= most else f"{str(first)[:-1]}, … {len(names)} in all]"


def _read(folder: Path) -> tuple[Path, Any]:
    """The file that holds a folder's configuration, and what it says: mmcompress.json, else the config of a saved model."""
    for path in (folder / CONFIG, folder / MODEL_CONFIG):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if path.name == CONFIG:
            return path, _known(config, path)
        if isinstance(config, dict) and "mmcompress" in config:
            return path, _known(config["mmcompress"], path)
    raise ValueError(f"folder must hold {CONFIG}, got {str(folder)!r}")


def _known(config: Any, where: Any) -> Any:
    """A configuration without its format version. Raises ValueError for a format that is newer than FORMAT."""
    if not isinstance(config, dict):
        return config  # from_config says what it wants
    version = config.get("format_version", 1)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise ValueError(
            f"{where} must be of a format_version from 1 to {FORMAT}, got {version!r}: a newer mmcompress may have written it"
        )
    return {k: v for k, v in config.items() if k != "format_version"}


def folder_of(name: str | Path) -> Path:
    """The folder itself, or of "zoo:NAME" the one that ships. Raises ValueError for a NAME that does not, and for ""."""
    if not str(name).strip():
        raise ValueError(f"folder must be one that holds {CONFIG}, got {name!r}")
    if not str(name).startswith("zoo:"):
        return Path(name)
    shipped = Path(__file__).parent / "zoo" / "parts"
    known = sorted(f"zoo:{file.parent.name}" for file in shipped.glob(f"*/{CONFIG}"))
    if name not in known:
        raise ValueError(f"folder must be one that holds {CONFIG} or one of {known}, got {str(name)!r}")
    return shipped / str(name).removeprefix("zoo:")


def is_trained(name: str) -> bool:
    """Whether this names a trained compressor, "zoo:NAME" or a folder written with a separator ("./NAME"), and no method: a
    folder that happens to be called like a method does not stand before it."""
    return name.startswith("zoo:") or any(mark in name for mark in (os.sep, os.altsep) if mark)


def named(name: str, **fields: Any) -> Compressor:
    """A new compressor of a method's name and fields, or a trained one: a folder ("./NAME"), or "zoo:NAME", which takes no
    fields."""
    from mmcompress.registry import create, list_methods

    if is_trained(name):
        if fields:
            raise ValueError(f"{name} is trained as it stands and takes no fields, got {', '.join(fields)}")
        return from_pretrained(name)
    if name not in list_methods() and name and (Path(name) / CONFIG).is_file():
        raise ValueError(f"method must be a method's name, zoo:NAME, or a folder as './{name}', got {name!r}")
    return create(name, **fields)


def apply_from_config(model: Any, folder: str | Path | None = None) -> Any:
    """Install the compressor that the model's config remembers from an earlier `compress_`; returns the model.

    Parameters come from `folder`, where the model or its adapter was saved, by default the one that the model was loaded from.
    A folder that is given may also tell the compressor of a model whose config remembers none (an adapter's).
    Raises ValueError where nothing is remembered, where there are no parameters to a compressor that needs them, and where
    folder and config remember different compressors.
    """
    from mmcompress.patch import compress_

    config = getattr(getattr(model, "config", None), "mmcompress", None)

    def install(compressor: Compressor) -> Any:
        before = model.config.__dict__.pop("mmcompress", None)  # that of this very compressor: `restore_` takes it out too
        try:
            return compress_(model, compressor)
        except BaseException:
            if before is not None:
                model.config.mmcompress = before
            raise

    if config is None and folder is None:
        raise ValueError(f"model.config.mmcompress must hold a configuration, {type(model).__name__} has none; use compress_")
    remembered = None if config is None else from_config(_known(config, "model.config.mmcompress"))
    if remembered is not None and folder is None:
        names = sorted(remembered.state_dict())
        if not names:
            return install(remembered)
        folder = getattr(model.config, "_name_or_path", None) or ""
        if not folder or not (Path(folder) / WEIGHTS).is_file():
            raise ValueError(
                "model.config.mmcompress must describe a compressor without parameters, got "
                f"{type(remembered).__name__} with {len(names)} ({names[0]}, …) and no {WEIGHTS} in the model's folder "
                f"{str(folder)!r}: name the folder that holds it, or install it with compress_(model, from_pretrained(…))"
            )
    assert folder is not None
    compressor = from_pretrained(folder)
    if remembered is not None and json.dumps(compressor.config()) != json.dumps(remembered.config()):
        raise ValueError(
            f"folder must hold the compressor that model.config.mmcompress remembers, {remembered!r}; got {compressor!r}"
        )
    return install(compressor)
