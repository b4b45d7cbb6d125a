"""Families that are close kin of one in the other tables."""

# ruff: noqa: C408
from __future__ import annotations

import torch

from mmcompress.testing.grids import GLM, IDS, WINDOWS, glm_text, glm_tower
from mmcompress.testing.parts import (
    AUDIO,
    BARE,
    GRIDS,
    IMAGE,
    MROPE,
    SIDE,
    VIDEO,
    VISION,
    WIDTH,
    Family,
    Item,
    entry,
    grid,
    item_types,
    marked,
    noise,
    qwen_tower,
    sound,
    text,
    tower,
    view,
)
from mmcompress.testing.views import VIEW

LINES = ((32, 32), (16, 32), (32, 16))


def _lighton(size: tuple[int, int], generator: torch.Generator) -> Item:
    """Pixtral's tower, two by two patches of 4 to a row, no breaks."""
    pixels = {"pixel_values": noise(generator, 1, 3, SIDE, SIDE), "image_sizes": torch.tensor([size])}
    return Item(marked(size[0] * size[1] // 64), pixels)


def _kimi(size: tuple[int, int, int], generator: torch.Generator) -> Item:
    t, h, w = size
    tensors = {"pixel_values": noise(generator, t * h * w, 3, 4, 4), "image_grid_thw": torch.tensor([size])}
    return Item(marked(h * w // 4), tensors)


def _paddle(size: tuple[int, int, int], generator: torch.Generator) -> Item:
    t, h, w = size
    tensors = {"pixel_values": noise(generator, t * h * w, 3, 4, 4), "image_grid_thw": torch.tensor([size])}
    return Item(marked(t * h * w // 4), tensors)


def _stacked(size: int, generator: torch.Generator) -> Item:
    """Fun-ASR: seven spectrogram columns to a frame."""
    real = torch.arange(16) < size
    spectrum = noise(generator, 1, 16, 16 * 7) * real[:, None]
    return Item(sound(size), {"input_features": spectrum, "input_features_mask": real[None]})


_ALTERNATE = dict(head_dim=8, sliding_window=256, layer_types=["sliding_attention", "full_attention"] * 2)
_PADDLE_TOWER = {**VISION, "patch_size": 4, "spatial_merge_size": 2}
_FUN_EAR = dict(num_mel_bins=16, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=48, num_hidden_layers=2)
_FUN_ADAPTOR = dict(
    hidden_size=WIDTH, num_attention_heads=4, intermediate_size=8, num_hidden_layers=1, projector_hidden_size=48
)

# fmt: off
MORE: dict[str, Family] = {
    "lighton_ocr": entry(
        "LightOnOcrForConditionalGeneration", _lighton, LINES, vision_config=tower("pixtral", patch_size=4, head_dim=8),
        text_config=text("qwen3", head_dim=8), image_token_id=IMAGE, spatial_merge_size=2,
    ),
    "exaone4_5": entry(
        "Exaone4_5_ForConditionalGeneration", grid(), GRIDS, vision_config={**qwen_tower(**WINDOWS),
        "num_key_value_heads": 2}, text_config=text("exaone4", **_ALTERNATE), image_token_id=IMAGE, video_token_id=VIDEO,
    ),
    "glm_ocr": entry(
        "GlmOcrForConditionalGeneration", grid(), GRIDS, batch_tensors=item_types, vision_config=glm_tower(),
        text_config=glm_text(), **GLM,
    ),
    "qianfan_ocr": entry(
        "QianfanOCRForConditionalGeneration", view(16, marks=True), vision_config={**VIEW, "image_size": [SIDE, SIDE],
        "patch_size": [4, 4]}, text_config=text("qwen3", head_dim=8), image_token_id=IMAGE, downsample_ratio=0.5,
    ),
    "paddleocr_vl": entry(
        "PaddleOCRVLForConditionalGeneration", _paddle, GRIDS, batch_tensors=item_types, vision_config=_PADDLE_TOWER,
        text_config={**BARE, "head_dim": 8, "rope_parameters": MROPE}, **IDS,
    ),
    "kimi_k25": entry(
        "Kimi_K25ForConditionalGeneration", _kimi, GRIDS, vision_config=dict(patch_size=4, pos_emb_height=8, pos_emb_width=8,
        pos_emb_time=4, num_attention_heads=4, num_hidden_layers=2, hidden_size=WIDTH, intermediate_size=48),
        text_config=text(), projection_hidden_size=WIDTH, **IDS,
    ),
    "fun_asr_nano": entry(
        "FunAsrNanoForConditionalGeneration", _stacked, (16, 10, 14), kinds="audio", audio_config=_FUN_EAR,
        adaptor_config=_FUN_ADAPTOR, text_config=text("qwen3", head_dim=8), audio_token_id=AUDIO,
    ),
}
# fmt: on
"""Name -> family."""
