"""Pictures: DINOv2-small and SmolLM2 as a LLaVA-NeXT (AnyRes crops) and as a LLaVA (one view, the same trained parts)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcompress.zoo.common import (
    FEATURE_LAYERS,
    IMAGE_TOKEN,
    PATCH,
    PIXELS,
    SIDE,
    add_projector_,
    assemble,
    chat_template,
    dinov2,
    smollm2,
)

PINPOINTS = [[448, 448], [224, 448], [448, 224], [224, 672], [672, 224]]  # (height, width): 2x2, 1x2, 2x1, 1x3, 3x1 crops


def image(cache_dir: str | Path | None, parts: Path | None) -> tuple[Any, Any]:
    """LlavaNext: a thumbnail of 256 tokens and up to four crops of 256 with a newline after every row."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessor, LlavaNextProcessor

    pixels = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS, **PIXELS
    )
    families = (LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor)
    return _llava(families, pixels, cache_dir, parts, image_grid_pinpoints=PINPOINTS)


def image_single(cache_dir: str | Path | None, parts: Path | None) -> tuple[Any, Any]:
    """Llava: 256 tokens of the whole picture, stretched to a square as the thumbnail of `image` is."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor, LlavaProcessor

    pixels = LlavaImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False, **PIXELS)
    families = (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor)
    return _llava(families, pixels, cache_dir, parts, image_seq_length=(SIDE // PATCH) ** 2)


def _llava(families: Any, pixels: Any, cache_dir: str | Path | None, parts: Path | None, **settings: Any) -> tuple[Any, Any]:
    from transformers import Dinov2Config, LlamaConfig

    config_class, model_class, processor_class = families
    tokenizer, text_config, state = smollm2([IMAGE_TOKEN], cache_dir)
    vision_config, tower = dinov2(cache_dir)
    state.update(tower)
    add_projector_(state, tokenizer, newline="image_grid_pinpoints" in settings)
    config = config_class(
        vision_config=Dinov2Config(**vision_config),
        text_config=LlamaConfig(**text_config),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=FEATURE_LAYERS,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **settings,
    )
    processor = processor_class(
        pixels,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the tower's CLS, which the strategy then takes away
        chat_template=chat_template(image=IMAGE_TOKEN),
    )
    return assemble(model_class, config, state, tokenizer, parts), processor
