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
    """The compressor that `save_pretrained` wrote. Raises ValueError where the files are missing, broken or do not fit
    each other."""
    from safetensors.torch import load_file

    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"folder must hold {CONFIG}, got {str(folder)!r}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    compressor = from_config(config)
    weights = Path(folder) / WEIGHTS
    state = load_file(weights) if weights.exists() else {}
    expected = set(compressor.state_dict())
    if set(state) != expected:
        raise ValueError(f"{WEIGHTS} must hold the parameters {sorted(expected)}, got {sorted(state)}")
    compressor.load_state_dict(state)
    return compressor


def apply_from_config(model: Any) -> Any:
    """Install the compressor that the model's config remembers from an earlier `compress_`; returns the model.

    Raises ValueError where the config holds none.
    """
    from mmcompress.patch import compress_

    config = getattr(getattr(model, "config", None), "mmcompress", None)
    if config is None:
        raise ValueError(f"model.config.mmcompress must hold a configuration, {type(model).__name__} has none; use compress_")
    return compress_(model, from_config(config))
