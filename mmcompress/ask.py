"""Asking a model one question with and without a compressor: what `run`, `inspect` and `demo` share."""

from __future__ import annotations

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
    """The model and processor of `zoo:NAME`, of a folder or of a hub id; never with code from the hub.

    Raises ValueError for a model of a family that is not supported, before its weights are read.
    """
    quiet()
    if name.startswith(ZOO):
        from mmcompress import zoo

        return zoo.load(name.removeprefix(ZOO))
    from transformers import AutoConfig, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor

    from mmcompress.models import ADAPTERS

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if not Path(name).is_dir():
            known = "zoo:NAME, a folder with a transformers model, or a hub id that can be reached from here"
            raise ValueError(f"model must be {known}; got {name!r}") from error
        raise ValueError(f"model must be a folder with a transformers config.json, got {name!r}") from error
    if config.model_type not in ADAPTERS:
        raise ValueError(f"model must be of a supported family ({', '.join(ADAPTERS)}), got {name!r} of {config.model_type!r}")
    try:
        processor = AutoProcessor.from_pretrained(name)
        kind = AutoModelForSpeechSeq2Seq if config.is_encoder_decoder else AutoModelForMultimodalLM
        return kind.from_pretrained(name, dtype="auto").eval(), processor
    except OSError as error:
        raise ValueError(f"model must hold a processor and weights that transformers can load, got {name!r}") from error


def prepare(model: Any, processor: Any, question: Question) -> Any:
    """The inputs of `model.generate` for one question. Raises ValueError for what this model does not take.

    A speech recogniser (Whisper) has no chat and answers no question: a prompt is the text said before, which it goes on from
    as stock transformers does (`prompt_ids`); an empty one is left out.
    """
    from mmcompress.models import family

    takes = family(model).modalities
    if not question.modalities:
        raise ValueError("a question needs an image, a video or a recording, got text only: there is nothing to compress")
    if wrong := [kind for kind in question.modalities if kind not in takes]:
        raise ValueError(f"{type(model).__name__} takes {' and '.join(takes)}, got {wrong[0]}")
    content = [{"type": kind} for kind in ("image", "video", "audio") for _ in getattr(question, _FIELDS[kind])]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.prompt}]}]
    arguments: dict[str, Any] = {}
    if question.images:
        arguments["images"] = list(question.images)
    if question.videos:
        frames, numbers, fps = zip(*question.videos, strict=True)
        arguments["videos"] = list(frames)
        arguments["do_sample_frames"] = False
        arguments["video_metadata"] = [
            {"total_num_frames": n[-1] + 1, "fps": f, "frames_indices": n, "duration": (n[-1] + 1) / f}
            for n, f in zip(numbers, fps, strict=True)
        ]
    if len(question.audio):
        arguments["audio"] = list(question.audio)
        arguments["sampling_rate"] = sampling_rate(processor)
    if getattr(model.config, "is_encoder_decoder", False):
        if len(question.audio) != 1:
            raise ValueError(f"{type(model).__name__} takes one recording a question, got {len(question.audio)}")
        inputs = processor(return_tensors="pt", **arguments)
        if question.prompt.strip():
            inputs["prompt_ids"] = processor.get_prompt_ids(question.prompt, return_tensors="pt")
        return _fit(model, inputs)
    if getattr(processor, "chat_template", None):
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        marks = [getattr(processor, f"{c['type']}_token") + "\n" for c in content]
        text = "".join(marks) + question.prompt
    return _fit(model, processor(text=[text], return_tensors="pt", **arguments))


def _fit(model: Any, inputs: Any) -> dict[str, Any]:
    """The inputs on the model's device and, but for numbers that are no pixels or sound, in its dtype."""
    inputs, dtype = inputs.to(model.device), next(model.parameters()).dtype
    return {k: v.to(dtype) if v.is_floating_point() and k not in _KEEP_DTYPE else v for k, v in inputs.items()}


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

    check_kinds(compressor, [kind for kind, argument in family(model).inputs.items() if argument in inputs])
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
        window = getattr(processor.feature_extractor, "n_samples", len(media))
        silence = max(0, window - len(media)) if "feature_attention_mask" not in inputs else 0
        return np.pad(media[:window], (0, silence))
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
