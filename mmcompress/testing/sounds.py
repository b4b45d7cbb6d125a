"""Families that hear."""

# ruff: noqa: C408
from __future__ import annotations

from typing import Any

import torch

from mmcompress.testing.grids import half
from mmcompress.testing.parts import (
    AUDIO,
    BREAK,
    STOP,
    WIDTH,
    Family,
    Item,
    entry,
    mel,
    noise,
    qformer,
    sound,
    text,
)  # fmt: skip


def ear(model_type: str, **changes: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_mel_bins=16)
    return {"model_type": model_type, **sizes, "max_source_positions": 32, **changes}


def _granite(size: int, generator: torch.Generator) -> Item:
    """Blocks of 15 columns give three rows each."""
    rows = -(-size // 15) * 3
    spectrum = noise(generator, 1, 60, 16) * (torch.arange(60) < size)[:, None]
    return Item([AUDIO] * rows, {"input_features": spectrum, "input_features_mask": (torch.arange(12) < rows)[None]})


def _vibe(size: Any, generator: torch.Generator) -> Item:
    wave = noise(generator, 1, 1, 64)
    return Item(sound(16), {"input_values": wave, "padding_mask": torch.ones(1, 64, dtype=torch.bool)})


def _granite_config(encoder: str) -> dict[str, Any]:
    return dict(
        text_config=text("granite"), projector_config={**qformer(), "model_type": "blip_2_qformer"}, has_lora_adapter=False,
        audio_token_index=AUDIO, encoder_config=dict(
            model_type=encoder, input_dim=16, num_layers=2, hidden_dim=WIDTH, feedforward_mult=2, num_heads=4, dim_head=8,
            output_dim=16, context_size=20, max_pos_emb=64, conv_kernel_size=3,
        ),
    )  # fmt: skip


_TOKENIZER = dict(
    model_type="vibevoice_acoustic_tokenizer_encoder", channels=1, hidden_size=8, kernel_size=3, num_filters=4,
    downsampling_ratios=[2, 2], depths=[1, 1, 1], vae_std=0.0,
)  # fmt: skip
_QWEN3_EAR = dict(
    model_type="qwen3_asr_encoder", d_model=WIDTH, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
    num_mel_bins=16, output_dim=WIDTH, n_window=50, n_window_infer=100, downsample_hidden_size=16,
)  # fmt: skip
_GLM_EAR = dict(
    model_type="glmasr_encoder", hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
    num_mel_bins=16, max_position_embeddings=64,
)  # fmt: skip

# fmt: off
SOUNDS: dict[str, Family] = {
    "voxtral": entry(
        "VoxtralForConditionalGeneration", mel(64, lambda n: n // 8), (64, ), kinds="audio", audio_config=ear("voxtral_encoder",
        intermediate_size=4 * WIDTH), text_config=text(), audio_token_id=AUDIO,
    ),
    "audioflamingo3": entry(
        "AudioFlamingo3ForConditionalGeneration", mel(64, half, "input_features_mask"), (64, 40, 56), kinds="audio",
        audio_config=ear("audioflamingo3_encoder"), text_config=text("qwen2"), audio_token_id=AUDIO,
    ),
    "glmasr": entry(
        "GlmAsrForConditionalGeneration", mel(64, lambda n: n // 8, "input_features_mask"), (64, 40, 56), kinds="audio",
        audio_config=_GLM_EAR, text_config=text(), audio_token_id=AUDIO,
    ),
    "granite_speech": entry(
        "GraniteSpeechForConditionalGeneration", _granite, (60, 30, 45), kinds="audio",
        **_granite_config("granite_speech_encoder"),
    ),
    "granite_speech_plus": entry(
        "GraniteSpeechPlusForConditionalGeneration", _granite, (60, 30, 45), kinds="audio",
        **_granite_config("granite_speech_plus_encoder"),
    ),
    "qwen3_asr": entry(
        "Qwen3ASRForConditionalGeneration", mel(100, lambda n: -(-n // 8), "input_features_mask"), (100, 60, 84), kinds="audio",
        audio_config=_QWEN3_EAR, text_config=text("qwen3", head_dim=8), audio_token_id=AUDIO, pad_token_id=0, eos_token_id=2,
    ),
    "vibevoice_asr": entry(
        "VibeVoiceAsrForConditionalGeneration", _vibe, kinds="audio", acoustic_tokenizer_encoder_config=_TOKENIZER,
        semantic_tokenizer_encoder_config=_TOKENIZER, text_config=text("qwen2"), audio_token_id=AUDIO, audio_bos_token_id=BREAK,
        audio_eos_token_id=STOP, acoustic_tokenizer_chunk_size=64,
    ),
}
# fmt: on
"""Name -> family."""
