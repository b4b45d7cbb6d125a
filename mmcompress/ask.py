"""Asking a model one question with and without a compressor: what `run`, `inspect` and `demo` share."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.compressor import Compressor
from mmcompress.ledger import Ledger
from mmcompress.tokens import Layout

ZOO = "zoo:"


@dataclass
class Answer:
    """The reply, the ledger of its prefill, the traces of its items, and the time until the first and the last token."""

    text: str
    ledger: Ledger
    items: list[Any]
    prefill_ms: float
    total_ms: float

    def numbers(self) -> dict[str, Any]:
        """The ledger's totals and the times as plain JSON values."""
        times = {"prefill_ms": round(self.prefill_ms, 1), "total_ms": round(self.total_ms, 1)}
        return {"answer": self.text, **times, **self.ledger.totals()}


@dataclass
class Question:
    """A prompt about pictures, clips (frames, frame numbers, frames per second) and recordings (mono float32)."""

    prompt: str
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    audio: Sequence[Any] = field(default_factory=tuple)

    @property
    def modalities(self) -> list[str]:
        named = {"image": self.images, "video": self.videos, "audio": self.audio}
        return [kind for kind, items in named.items() if len(items)]


def load_model(name: str) -> tuple[Any, Any]:
    """The model and processor of `zoo:NAME`, of a folder or of a hub id; never with code that comes with them.

    Raises ValueError for a model of a family that is not supported, before its weights are read, for one that lacks weights,
    and for files that transformers cannot load without running their code.
    """
    quiet()
    if name.startswith(ZOO):
        from mmcompress import zoo

        return zoo.load(name.removeprefix(ZOO))
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq
    from transformers.models.auto import modeling_auto

    from mmcompress.models import ADAPTERS

    model_type = _model_type(name)
    if model_type not in ADAPTERS and model_type not in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        raise ValueError(f"model must be of a supported family ({', '.join(ADAPTERS)}), got {name!r} of {model_type!r}")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        processor = _processor(name, config)
        kind = AutoModelForSpeechSeq2Seq if config.is_encoder_decoder else AutoModelForMultimodalLM
        options: dict[str, Any] = {"config": config, "dtype": "auto", "trust_remote_code": False, "output_loading_info": True}
        model, report = kind.from_pretrained(name, **options)
    except Exception as error:  # whatever files that are cut off, mixed up or made by others make transformers raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"model must hold a processor and weights that transformers can load, got {name!r} ({why})") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model must hold all its weights, got {name!r} without {missing[0]} ({len(missing)} are missing)")
    return model.eval(), processor


def _model_type(name: str) -> Any:
    """What config.json says, read as JSON and nothing else."""
    folder = Path(name)
    if not name.strip() or folder.is_file():
        raise ValueError(f"model must be {_MODELS}; got {name!r}")
    if folder.is_dir():
        try:
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"model must be a folder with a transformers config.json, got {name!r}") from error
    from transformers import PretrainedConfig

    try:
        return PretrainedConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"model must be {_MODELS}; got {name!r}") from error


_MODELS = "zoo:NAME, a folder with a transformers model, or a hub id that can be reached from here"


def _processor(name: str, config: Any) -> Any:
    """The processor of the class that its files name, else of the family's. AutoProcessor would forget on the way to the
    family's that no code is trusted, and ask on stdin whether to run what the tokenizer brings."""
    import transformers
    from transformers.utils import cached_file

    kind: Any = None
    for part in (
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "tokenizer_config.json",
    ):
        missing = "_raise_exceptions_for_gated_repo", "_raise_exceptions_for_missing_entries"
        file = cached_file(name, part, **dict.fromkeys(missing, False))
        told = json.loads(Path(file).read_text(encoding="utf-8")).get("processor_class") if file else None
        kind = kind or getattr(transformers, str(told), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.ProcessorMixin)):
        kind = transformers.PROCESSOR_MAPPING[type(config)]
    return kind.from_pretrained(name, trust_remote_code=False)


def prepare(model: Any, processor: Any, question: Question) -> Any:
    """The inputs of `model.generate` for one question. Raises ValueError for what this model does not take.

    A speech recogniser (Whisper) has no chat and answers no question: a prompt is the text said before, which it goes on from
    as stock transformers does (`prompt_ids`); an empty one is left out. It reads a recording longer than its window in windows,
    by their time stamps; for other models a longer one is refused.
    """
    from mmcompress.models import family

    takes = family(model).modalities
    if not question.modalities:
        raise ValueError("a question needs an image, a video or a recording, got text only: there is nothing to compress")
    if wrong := [kind for kind in question.modalities if kind not in takes]:
        raise ValueError(f"{type(model).__name__} takes {' and '.join(takes)}, got {wrong[0]}")
    _check_prompt(processor, question.prompt)
    content = [{"type": kind} for kind in ("image", "video", "audio") for _ in getattr(question, _FIELDS[kind])]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.prompt}]}]
    arguments: dict[str, Any] = {}
    if question.images:
        arguments["images"] = list(question.images)
    if question.videos:
        frames, numbers, fps = zip(*question.videos, strict=True)
        arguments["videos"] = [
            np.moveaxis(f, -1, 1) for f in frames
        ]  # of a frame 1 or 3 high the last axis would be guessed wrong
        arguments["do_sample_frames"] = False
        arguments["video_metadata"] = [
            {"total_num_frames": n[-1] + 1, "fps": f, "frames_indices": n, "duration": (n[-1] + 1) / f}
            for n, f in zip(numbers, fps, strict=True)
        ]
    if len(question.audio):
        arguments["audio"] = list(question.audio)
        arguments["sampling_rate"] = sampling_rate(processor)
    long = [wave for wave in question.audio if len(wave) > (window(processor) or len(wave))]
    if getattr(model.config, "is_encoder_decoder", False):
        if len(question.audio) != 1:
            raise ValueError(f"{type(model).__name__} takes one recording a question, got {len(question.audio)}")
        if long and getattr(model.generation_config, "no_timestamps_token_id", None) is not None:
            whole = {"truncation": False, "padding": "longest", "return_attention_mask": True}
            inputs, long = processor(return_tensors="pt", **arguments, **whole), []
            inputs["return_timestamps"] = True
        else:
            inputs = processor(return_tensors="pt", **arguments)
        if question.prompt.strip():
            inputs["prompt_ids"] = processor.get_prompt_ids(question.prompt, return_tensors="pt")
    elif getattr(processor, "chat_template", None):
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], return_tensors="pt", **arguments)
    else:
        marks = [getattr(processor, f"{c['type']}_token") + "\n" for c in content]
        inputs = processor(text=["".join(marks) + question.prompt], return_tensors="pt", **arguments)
    if long:
        most, got = (n / sampling_rate(processor) for n in (window(processor) or 0, max(map(len, long))))
        raise ValueError(f"audio must be at most {most:g} s for {type(model).__name__}, got {got:.1f} s")
    return _fit(model, inputs)


def _check_prompt(processor: Any, prompt: str) -> None:
    """Refuse the marks that stand for items: a processor would take one in the text for a further item."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt must be text in UTF-8, got {prompt[error.start : error.end]!r} in it") from error
    marks = {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    if found := sorted(mark for mark in marks if mark in prompt):
        raise ValueError(f"prompt must not hold {found[0]!r}, which stands for an item of {type(processor).__name__}")


def _fit(model: Any, inputs: Any) -> dict[str, Any]:
    """The inputs on the model's device and, but for numbers that are no pixels or sound, in its dtype."""
    import torch

    _check_length(model, inputs)
    inputs, dtype = inputs.to(model.device), next(model.parameters()).dtype
    out: dict[str, Any] = {}
    for name, value in inputs.items():
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        out[name] = value.to(dtype) if floats and name not in _KEEP_DTYPE else value
        if floats and not bool(torch.isfinite(out[name]).all()):
            raise ValueError(
                f"{name} must be finite in {dtype}, got NaN or infinity: the recording or picture is beyond measure"
            )
    return out


def _check_length(model: Any, inputs: Any) -> None:
    """Refuse a prompt that is longer than the language model's positions reach: it would answer at random."""
    import torch

    from mmcompress.models import family

    config = getattr(model.config, "text_config", model.config)
    most, ids = getattr(config, "max_position_embeddings", None), inputs.get("input_ids")
    if most is None or ids is None:
        return
    taken = ids.shape[1]
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):  # an item takes as many positions as it is wide
        adapter = family(model)
        marks = torch.tensor([adapter.placeholder(kind) for kind in adapter.modalities], device=ids.device)
        taken -= int(torch.isin(ids, marks).sum())
    if taken > most:
        raise ValueError(f"a question must be of at most {most} tokens for {type(model).__name__}, got {taken} with its items")


_FIELDS = {"image": "images", "video": "videos", "audio": "audio"}
_KEEP_DTYPE = ("second_per_grid_ts",)


def ask(model: Any, processor: Any, inputs: dict[str, Any], compressor: Compressor, max_new_tokens: int = 32) -> Answer:
    """The model's greedy reply with `compressor` installed; use the method `none` for the uncompressed model.

    Raises ValueError where the compressor met no item at all.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    from mmcompress.models import family

    class FirstToken(StoppingCriteria):
        """Never stops; notes when the first token was there."""

        at: float | None = None

        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            if self.at is None:
                _wait(model)
                self.at = time.perf_counter()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    check_kinds(compressor, family(model).brought(inputs))
    first = FirstToken()
    with torch.inference_mode(), compressor(model) as run:
        _wait(model)
        start = time.perf_counter()
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=StoppingCriteriaList([first])
        )
        _wait(model)
        end = time.perf_counter()
    if not run.ledger.samples:
        raise ValueError("the model saw no image, video or audio tokens: there is nothing to compress")
    start_of_reply = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # encoder-decoders give the reply alone
    text = processor.tokenizer.decode(out[0, start_of_reply:], skip_special_tokens=True).strip()
    return Answer(text, run.ledger, run.items, 1000 * ((first.at or end) - start), 1000 * (end - start))


def check_kinds(compressor: Compressor, kinds: Sequence[str]) -> None:
    """Raise ValueError where no part of the compressor works on items of these kinds: it would change nothing."""
    wanted = [getattr(part, "kinds", None) for part in compressor.stages]
    if all(w is not None and not set(w) & set(kinds) for w in wanted):
        names = " | ".join(type(part).name or type(part).__name__ for part in compressor.stages)
        known = sorted({kind for w in wanted for kind in w or ()})
        raise ValueError(f"{names} compresses {' and '.join(known)} only, got {' and '.join(kinds)}")


def seen(processor: Any, media: Any, layout: Layout, inputs: Mapping[str, Any]) -> Any:
    """What a model sees or hears of a picture, a clip (a sequence of pictures) or a recording (mono waveform).

    A processor that crops to the centre cuts the rest of a picture away, but for the crops of an AnyRes image; one with a
    window cuts a longer recording. inputs (of `prepare`): without a mask of the recording, silence fills the window up.
    """
    if layout.kind == "audio":
        most = window(processor) or len(media)
        silence = max(0, most - len(media)) if "feature_attention_mask" not in inputs else 0
        return np.pad(media[:most], (0, silence))
    if layout.kind == "video":
        return [_centre(getattr(processor, "video_processor", None), frame) for frame in media]
    return media if layout.crops else _centre(getattr(processor, "image_processor", None), media)


def _centre(part: Any, picture: Any) -> Any:
    from PIL import ImageOps

    size = getattr(part, "crop_size", None)
    if not getattr(part, "do_center_crop", False) or not size:
        return picture
    w, h = size["width"], size["height"]
    scale = min(picture.width / w, picture.height / h)
    return ImageOps.fit(picture, (max(1, round(w * scale)), max(1, round(h * scale))))


def sampling_rate(processor: Any) -> int:
    """Samples a second of the recordings that a model hears; 16,000 where it hears none."""
    return getattr(getattr(processor, "feature_extractor", None), "sampling_rate", 16000)


def window(processor: Any) -> int | None:
    """The most samples that a processor's feature extractor reads at once; None where it has no such bound."""
    return getattr(getattr(processor, "feature_extractor", None), "n_samples", None)


def quiet() -> None:
    """No progress bars, advice or warnings of transformers: stderr belongs to the command."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)\b")


def _wait(model: Any) -> None:
    """Let an accelerator finish, so that a clock means something."""
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.device)
