"""Run one case: "right", "refused: sentence", or an exception that says what is wrong."""

from __future__ import annotations

import contextlib
import io
import os
import re
import traceback
import warnings
from typing import Any

import torch

from . import commands, files, models, values

RUN = {
    "model": models.run_model, "values": values.run_values, "config": values.run_config, "files": files.run_files,
    "command": commands.run_command,
}  # fmt: skip


def run_case(case: dict[str, Any]) -> str:
    """The outcome of a case. Raises what the library must not: other exceptions, or `Failure` for a wrong result."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RUN[case["kind"]](case)


def quiet() -> None:
    """Transformers talks a lot about odd calls."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    from transformers.utils import logging

    logging.set_verbosity(50)
    logging.disable_progress_bar()


def outcome_of(case: dict[str, Any]) -> tuple[str, BaseException | None]:
    """(outcome, None), or ("failed", the exception)."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return run_case(case), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return "failed", error


def signature(error: BaseException) -> str:
    """What two failures of one fault have in common: type, place, and message without numbers."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "mmcompress/" in f.filename or "/fuzz/" in f.filename] or frames
    at = f"{own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].name}" if own else "?"
    what = re.sub(r"[-+]?[0-9][0-9.e+-]*", "#", str(error).split(", got ")[0])
    return f"{type(error).__name__} at {at}: {re.sub(r'[(#, )]+$', '', what[:90])}"
