"""Command lines in process: exit code 0, or 2 with one sentence on stderr; never a traceback."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
from hypothesis import strategies as st

from mmcompress.cli import COMMANDS, main
from mmcompress.registry import list_methods

from .outcome import LONGEST, Failure

DATA = Path(__file__).parent.parent / "data"
MODEL, FILES = "MODEL", "FILES/"
"""In a case: the folder of a tiny LLaVA, and the folder of the files below."""


@functools.cache
def _folder() -> Path:
    """The tiny model and the files of all command lines of this process."""
    holder = tempfile.TemporaryDirectory()
    _folder.holder = holder  # type: ignore[attr-defined]  # until the process ends
    root = Path(holder.name)
    checkpoints.save("llava", root / "model")
    files = root / "files"
    files.mkdir()
    photo = (DATA / "coffee.jpg").read_bytes()
    (files / "photo.jpg").write_bytes(photo)
    (files / "half.jpg").write_bytes(photo[:9000])
    (files / "text.png").write_text("no picture")
    (files / "empty.jpg").write_bytes(b"")
    (files / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    (files / "noise.wav").write_bytes(b"RIFF" + bytes(range(256)))
    (files / "broken.json").write_text("{")
    (files / "k_center").mkdir()
    (files / "garbage").mkdir()
    (files / "garbage" / "mmcompress.json").write_text('{"method": "nothing"}')
    (root / "work").mkdir()
    return root


PATHS = [
    FILES + n
    for n in (
        "photo.jpg",
        "photo.jpg",
        "half.jpg",
        "text.png",
        "empty.jpg",
        "noise.mp4",
        "noise.wav",
        "none.jpg",
        "garbage",
        "",
    )
]
WORDS = [
    "",
    "w20 w21",
    "what is it?",
    "<image>",
    "<image> <image>",
    "ä 🙂",
    "w20 " * 200,
    "--json",
    "-1",
    "\n",
    "a,b",
    "0",
    "nan",
    "1e999",
    "{}",
]
RATIOS = ["0.25", "0.5", "1", "0", "-1", "2", "nan", "half", "", "1e-9", "0.5,0.1", "1e999", "True"]
LAYERS = ["0", "1", "2", "0.5", "7", "-1", "1.0", "late", "nan", "1e400", ""]
SETS = [
    "metric=sqeuclidean",
    "metric=x",
    "metric",
    "=1",
    "first=maxmin",
    "seed=1",
    "seed=-1",
    "seed=null",
    "keep_ratio=0.5",
    "layer=1",
    "a=b=c",
    'first={"a":1}',
]
METHOD = st.sampled_from(
    [*list_methods(), "k_centre", "", "pooling,tome", "pooling,pooling", ",", "zoo:none", FILES + "garbage", FILES + "k_center"]
)
BAD_BENCH = [
    ["--tasks", "detial"], ["--methods", "k_centre"], ["--keep-ratio", "0"], ["--n", "0"], ["--n", "x"], ["--seeds", "one"],
    ["--dtype", "half"], ["--preset", "imag"], ["--preset", FILES + "broken.json"], ["--models", "./no/such/folder"],
    ["--methods", ""],
    ["--tasks", ""], ["--keep-ratio", ""], ["--seeds", ""], ["--n", "-3"], ["--preset", ""], ["--keep-ratio", "nan"],
]  # fmt: skip
BAD_DEMO = [
    ["--num-questions", "0"],
    ["--num-questions", "x"],
    ["--sections", "vidoe"],
    ["--sections", ","],
    ["--sections", "image,,x"],
    ["--what"],
]


@st.composite
def arguments(draw: Any) -> list[str]:
    """A command line. What would take long is left out: demo and bench come with something that they refuse."""
    name = draw(st.sampled_from(["run", "run", "run", "inspect", "inspect", "bench", "demo", "methods", "models", "other"]))
    out = [name]
    if name == "other":
        out = draw(st.lists(st.sampled_from([*WORDS, "rnu", "--version", "--help", *COMMANDS, "-h"]), max_size=2))
        out = [a for a in out if a not in ("demo", "bench", "doctor")]
    elif name in ("bench", "demo"):
        out += draw(st.sampled_from(BAD_BENCH if name == "bench" else BAD_DEMO))
    elif name in ("run", "inspect"):
        if draw(st.integers(0, 9)):
            out += ["--prompt", draw(st.sampled_from(["w20 w21", *WORDS]))]
        for _ in range(draw(st.sampled_from([1, 1, 1, 1, 0, 2]))):
            kind = draw(st.sampled_from(["--image", "--image", "--image", "--image", "--video", "--audio"]))
            out += [kind, draw(st.sampled_from(PATHS))]
        out += ["--model", draw(st.sampled_from([MODEL, MODEL, MODEL, "./no/such/folder", FILES + "garbage", "zoo:imge", ""]))]
        options = {
            "--method": METHOD, "--keep-ratio": st.sampled_from(RATIOS), "--layer": st.sampled_from(LAYERS),
            "--set": st.sampled_from(SETS),
            "--num-frames": st.sampled_from(["0", "1", "x", "-1", "99999999999999999999"]),
        }  # fmt: skip
        if name == "run":
            options["--max-new-tokens"] = st.sampled_from(["1", "2", "0", "-1", "x", "1.5"])
        for option in draw(st.lists(st.sampled_from(sorted(options)), max_size=3)):
            out += [option, draw(options[option])]
        if "--max-new-tokens" not in out and name == "run":
            out += ["--max-new-tokens", "2"]
        out += draw(st.sampled_from([[], [], ["--compare"], ["--out", "drawn"], ["--out", ""], ["--keep", "1"]]))
    return out + draw(st.sampled_from([[], [], ["--json"]]))


def run_command(case: dict[str, Any]) -> str:
    """One command line in a folder of its own."""
    root = _folder()
    places = {MODEL: str(root / "model")}
    given = [places.get(a) or a.replace(FILES, f"{root / 'files'}/", 1) for a in case["arguments"]]
    out, err, here = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(root / "work")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: Any = main(given)
            except SystemExit as leave:  # --help, --version
                code = leave.code or 0
    finally:
        os.chdir(here)
    said, told = err.getvalue(), out.getvalue()
    if code == 0:
        if "--json" in given and "--help" not in given and "-h" not in given and "--version" not in given:
            json.loads(told)
        return "right"
    if code != 2:
        raise Failure(f"exit code 0 or 2, got {code}: {said[:300]}")
    if not said.startswith("mmcompress: ") or said.count("\n") != 1 or "Traceback" in said or len(said) > LONGEST + 200:
        raise Failure(f"one sentence on stderr, got {said[:600]!r}")
    if "--json" in given:
        if list(json.loads(told)) != ["error"]:
            raise Failure(f"an error as JSON, got {told[:200]!r}")
    elif told:
        raise Failure(f"nothing on stdout beside an error, got {told[:200]!r}")
    return f"refused: {said.removeprefix('mmcompress: ').strip()}"
