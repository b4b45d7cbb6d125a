"""What the builders share: SmolLM2 with placeholder tokens, the DINOv2 tower, the untrained projector, the last steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmcompress.zoo.lora import apply_parts_
from mmcompress.zoo.wheels import part_dir

State = dict[str, torch.Tensor]

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
FEATURE_LAYERS = [2, 4, 6, 8, 10, 12]  # shallow layers still show strokes and colours, deep ones what things are
SIDE, PATCH = 224, 14  # pixels of a view's edge and of a patch's
PIXELS: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
LANGUAGE = "model.language_model."


def chat_template(**marks: str) -> str:
    """ChatML in which an item of a message stands as its kind's mark (image="<image>", …) and a line break, text as itself."""
    items = "".join(f"{{% elif part['type'] == '{kind}' %}}{mark}\n" for kind, mark in marks.items())
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'text' %}}{{{{ part['text'] }}}}{items}{{% endif %}}"
        "{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def smollm2(tokens: Sequence[str], cache_dir: str | Path | None) -> tuple[Any, dict[str, Any], State]:
    """Tokenizer with additional special tokens, text configuration, and the weights as those of `model.language_model` and
    `lm_head`. The embedding of a new token is the mean of all."""
    from transformers import AutoTokenizer

    folder = part_dir("smollm2-135m-instruct", cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, padding_side="left", clean_up_tokenization_spaces=False, trust_remote_code=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = len(tokenizer)
    state = {LANGUAGE + n.removeprefix("model."): v for n, v in load_file(folder / "model.safetensors").items()}
    words = state[LANGUAGE + "embed_tokens.weight"]
    extra = words.mean(0, keepdim=True).expand(len(tokenizer) - len(words), -1)
    state["lm_head.weight"] = state[LANGUAGE + "embed_tokens.weight"] = torch.cat([words, extra])
    return tokenizer, config, state


def dinov2(cache_dir: str | Path | None) -> tuple[dict[str, Any], State]:
    """Configuration and weights of the tower as those of `model.vision_tower`."""
    folder = part_dir("dinov2-small-focus", cache_dir)
    state = {f"model.vision_tower.{n}": v for n, v in load_file(folder / "model.safetensors").items()}
    return json.loads((folder / "config.json").read_text()), state


def add_projector_(state: State, tokenizer: Any, newline: bool) -> None:
    """The untrained start of a LLaVA: a random projector with a fixed seed, and a line break's embedding as the newline."""
    words = state[LANGUAGE + "embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    width, inner = 384 * len(FEATURE_LAYERS), words.shape[1]
    for layer, columns in (("linear_1", width), ("linear_2", inner)):
        weight = torch.randn(inner, columns, generator=generator) * columns**-0.5
        state[f"model.multi_modal_projector.{layer}.weight"] = weight
        state[f"model.multi_modal_projector.{layer}.bias"] = torch.zeros(inner)
    if newline:
        state["model.image_newline"] = words[tokenizer.convert_tokens_to_ids("Ċ")].clone()


def assemble(kind: Any, config: Any, state: State, tokenizer: Any, parts: Path | None) -> Any:
    """The model in float32 and eval mode, with the trained parts of a folder; it answers greedily."""
    from transformers import GenerationConfig

    if parts is not None:
        apply_parts_(state, parts)
    model, report = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True)
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise RuntimeError(f"the converted parts must hold exactly the weights of {kind.__name__}, they differ in {wrong}")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model.eval()
