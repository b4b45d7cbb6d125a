"""Saving compressors: JSON for the configuration, safetensors for parameters; nothing executable.

The same JSON may travel inside a model's own config (`config.mmcompress`), which transformers saves and ignores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmcompress.compressor import Compressor, from_config

CONFIG, WEIGHTS = "mmcompress.json", "mmcompress.safetensors"


def save_pretrained(compressor: Compressor, folder: str | Path) -> None:
    """Write `mmcompress.json` and, where the compressor has parameters, `mmcompress.safetensors` into `folder`."""
    from safetensors.torch import save_file

    if not isinstance(compressor, Compressor):
        raise TypeError(f"compressor must be a Compressor, got {compressor!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().contiguous() for k, v in compressor.state_dict().items()}
    if state:
        save_file(state, folder / WEIGHTS)
    else:
        (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / CONFIG).write_text(json.dumps(compressor.config(), indent=2) + "\n")


def from_pretrained(folder: str | Path) -> Compressor:
    """The compressor that `save_pretrained` wrote into a folder, or "zoo:NAME" for one that ships trained ("zoo:vq_hash", for
    the zoo's video model). Raises ValueError where the files are missing, broken or do not fit each other."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = folder_of(folder)
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"folder must hold {CONFIG}, got {str(folder)!r}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    compressor = from_config(config)
    weights = folder / WEIGHTS
    try:
        state = load_file(weights) if weights.exists() else {}
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a whole safetensors file: {error}") from error
    expected = set(compressor.state_dict())
    if set(state) != expected:
        raise ValueError(f"{WEIGHTS} must hold the parameters {sorted(expected)}, got {sorted(state)}")
    try:
        compressor.load_state_dict(state)
    except RuntimeError as error:  # a shape
        raise ValueError(f"{weights} does not fit {path}: {error}") from error
    return compressor


def folder_of(name: str | Path) -> Path:
    """The folder itself, or of "zoo:NAME" the one that ships. Raises ValueError for a NAME that does not."""
    if not str(name).startswith("zoo:"):
        return Path(name)
    shipped = Path(__file__).parent / "zoo" / "parts"
    known = sorted(f"zoo:{file.parent.name}" for file in shipped.glob(f"*/{CONFIG}"))
    if name not in known:
        raise ValueError(f"folder must be one that holds {CONFIG} or one of {known}, got {str(name)!r}")
    return shipped / str(name).removeprefix("zoo:")


def is_trained(name: str) -> bool:
    """Whether this names a trained compressor, "zoo:NAME" or a folder that holds one, and no method."""
    return name.startswith("zoo:") or (Path(name) / CONFIG).is_file()


def named(name: str, **fields: Any) -> Compressor:
    """A new compressor of a method's name and fields, or a trained one: a folder, or "zoo:NAME", which takes no fields."""
    from mmcompress.registry import create

    if not is_trained(name):
        return create(name, **fields)
    if fields:
        raise ValueError(f"{name} is trained as it stands and takes no fields, got {', '.join(fields)}")
    return from_pretrained(name)


def apply_from_config(model: Any) -> Any:
    """Install the compressor that the model's config remembers from an earlier `compress_`; returns the model.

    Raises ValueError where the config holds none, or one with trained parameters: a config does not carry those.
    """
    from mmcompress.patch import compress_

    config = getattr(getattr(model, "config", None), "mmcompress", None)
    if config is None:
        raise ValueError(f"model.config.mmcompress must hold a configuration, {type(model).__name__} has none; use compress_")
    compressor = from_config(config)
    if names := sorted(compressor.state_dict()):
        raise ValueError(
            f"model.config.mmcompress must describe a compressor without parameters, got {type(compressor).__name__} with "
            f"{len(names)} ({names[0]}, …): keep it with save_pretrained, install it with compress_(model, from_pretrained(…))"
        )
    return compress_(model, compressor)
