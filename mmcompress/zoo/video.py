"""Clips: DINOv2-small and SmolLM2 as a LLaVA-OneVision, which pools a frame's 256 tokens to 64; also pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcompress.zoo.common import (
    FEATURE_LAYERS,
    IMAGE_TOKEN,
    PATCH,
    PIXELS,
    SIDE,
    VIDEO_TOKEN,
    add_projector_,
    assemble,
    chat_template,
    dinov2,
    smollm2,
)
from mmcompress.zoo.image import PINPOINTS

NUM_FRAMES = 8


def video(cache_dir: str | Path | None, parts: Path | None) -> tuple[Any, Any]:
    """LlavaOnevision: 64 tokens a frame and a newline a clip; takes pictures, arrays [T, H, W, 3] and tensors [T, 3, H, W]."""
    from transformers import (
        Dinov2Config,
        LlamaConfig,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer, text_config, state = smollm2([IMAGE_TOKEN, VIDEO_TOKEN], cache_dir)
    vision_config, tower = dinov2(cache_dir)
    state.update(tower)
    add_projector_(state, tokenizer, newline=True)
    config = LlavaOnevisionConfig(
        vision_config=Dinov2Config(**vision_config),
        text_config=LlamaConfig(**text_config),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=FEATURE_LAYERS,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    square: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}, **PIXELS}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(image_grid_pinpoints=PINPOINTS, **square),
        tokenizer,
        LlavaOnevisionVideoProcessor(**square),
        num_image_tokens=(SIDE // PATCH) ** 2 + 1,  # with the tower's CLS, which the strategy then takes away
        vision_feature_select_strategy="default",
        chat_template=chat_template(image=IMAGE_TOKEN, video=VIDEO_TOKEN),
        image_token=IMAGE_TOKEN,
        video_token=VIDEO_TOKEN,
    )
    return assemble(LlavaOnevisionForConditionalGeneration, config, state, tokenizer, parts), processor
