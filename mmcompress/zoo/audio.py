"""Sound: the encoder of Whisper tiny.en and SmolLM2 as a Qwen2-Audio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmcompress.zoo.common import LANGUAGE, assemble, chat_template, smollm2
from mmcompress.zoo.wheels import part_dir

MARKS = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
TOWER = "model.audio_tower."


def audio(cache_dir: str | Path | None, parts: Path | None) -> tuple[Any, Any]:
    """Qwen2Audio: 25 tokens a second of mono sound at 16 kHz, 750 at most (30 s)."""
    from transformers import (
        LlamaConfig,
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer, text_config, state = smollm2(list(MARKS.values()), cache_dir)
    folder = part_dir("whisper-tiny-en", cache_dir)
    whisper, prefix = json.loads((folder / "config.json").read_text()), "model.encoder."
    for name, value in load_file(folder / "model.safetensors").items():
        if name.startswith(prefix):
            state[TOWER + name.removeprefix(prefix)] = value
    width, inner = whisper["d_model"], state[LANGUAGE + "embed_tokens.weight"].shape[1]
    weight = torch.randn(inner, width, generator=torch.Generator().manual_seed(0)) * width**-0.5
    state["model.multi_modal_projector.linear.weight"] = weight
    state["model.multi_modal_projector.linear.bias"] = torch.zeros(inner)
    state["lm_head.weight"] = state["lm_head.weight"].clone()  # the class does not tie it
    text_config["tie_word_embeddings"] = False
    shared = ("num_mel_bins", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "d_model", "max_source_positions")
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(**{name: whisper[name] for name in shared}),
        text_config=LlamaConfig(**text_config),
        audio_token_index=tokenizer.convert_tokens_to_ids(MARKS["audio_token"]),
    )
    processor = Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=whisper["num_mel_bins"]),
        tokenizer,
        chat_template=chat_template(audio="<|audio_bos|><|AUDIO|><|audio_eos|>"),
        **MARKS,
    )
    return assemble(Qwen2AudioForConditionalGeneration, config, state, tokenizer, parts), processor
