"""Families whose pictures are views of one size or crops of it: LLaVA's kin, tilers, DeepSeek, Idefics, Llama 4, Phi-4."""

# ruff: noqa: C408
from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch

from mmcompress.testing.parts import (
    AUDIO,
    BARE,
    BREAK,
    END,
    IMAGE,
    LAYERS,
    PAD,
    ROPE,
    SIDE,
    START,
    VIDEO,
    VOCAB,
    WIDTH,
    Family,
    Item,
    clip,
    cohere,
    entry,
    frames,
    marked,
    mistral,
    noise,
    qformer,
    siglip,
    stock,
    text,
    tower,
    view,
)  # fmt: skip

PINPOINTS = [[32, 64], [64, 32], [64, 64]]
SIZES = ((32, 64), (64, 32), (64, 64))
ANYRES = dict(image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1, image_token_id=IMAGE)
VIEW = {k: v for k, v in tower("", patch_size=4).items() if k != "model_type"}
TWO = dict(image_token_id=IMAGE, video_token_id=VIDEO)
BARE_TEXT = {k: v for k, v in BARE.items() if k not in ("bos_token_id", "eos_token_id")}


def _anyres(size: tuple[int, int], generator: torch.Generator) -> Item:
    """A thumbnail of 4 x 4 rows, then each line of the crops with a newline row."""
    rows, columns = size[0] // 8, size[1] // 8
    pixels = {"pixel_values": noise(generator, 1, 5, 3, SIDE, SIDE), "image_sizes": torch.tensor([size])}
    return Item([IMAGE] * (16 + rows * (columns + 1)), pixels, num_separators=rows)


def _crops_in_layers(size: tuple[int, int], generator: torch.Generator) -> Item:
    """Granite 4: as `_anyres` with two by two rows to a view."""
    rows, columns = size[0] // 16, size[1] // 16
    return Item([IMAGE] * (4 + rows * (columns + 1)), _anyres(size, generator).tensors)


def _lines(width: int) -> Any:
    """Pixtral: a break id after every line of rows, an end id after the last; `width` pixels a row."""

    def item(size: tuple[int, int], generator: torch.Generator) -> Item:
        rows, columns = size[0] // width, size[1] // width
        ids = ([IMAGE] * columns + [BREAK]) * (rows - 1) + [IMAGE] * columns + [END]
        pixels = noise(generator, 1, 3, SIDE, SIDE)
        return Item(ids, {"pixel_values": pixels, "image_sizes": torch.tensor([size])})

    return item


def _two_resolutions(size: Any, generator: torch.Generator) -> Item:
    low, high = noise(generator, 1, 3, 16, 16), noise(generator, 1, 3, 64, 64)
    return Item([IMAGE] * 16, {"pixel_values": low, "high_res_pixel_values": high})


def _emu(size: Any, generator: torch.Generator) -> Item:
    return Item(marked(72), {"pixel_values": noise(generator, 1, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]])})


def _fuyu(size: Any, generator: torch.Generator) -> Item:
    """Three lines of four rows, a newline id after each."""
    return Item(([IMAGE] * 4 + [BREAK]) * 3, {"image_patches": noise(generator, 1, 12, 3 * 4 * 4)})


def _phi(size: tuple[int, int], generator: torch.Generator) -> Item:
    """Rows and columns of crops. The last crop stays masked: without a mask the stock tower turns causal."""
    h, w = size
    mask = torch.zeros(1, 4, 8, 8, dtype=torch.bool)
    mask[:, : 1 + h * w] = True
    tensors = {"image_pixel_values": noise(generator, 1, 4, 3, SIDE, SIDE), "image_attention_mask": mask}
    tensors["image_sizes"] = torch.tensor([[SIDE * h, SIDE * w]])
    return Item([IMAGE] * (4 * h * (4 * w + 1) + 1 + 4 * 5), tensors)


def _phi_sound(size: int, generator: torch.Generator) -> Item:
    real = torch.arange(64) < size
    tensors = {"audio_input_features": noise(generator, 1, 64, 16) * real[:, None], "audio_attention_mask": real[None]}
    return Item([AUDIO] * (size // 4), {**tensors, "audio_embed_sizes": torch.tensor([size // 4])})


def _spatial(size: tuple[int, int], generator: torch.Generator) -> Item:
    """LFM2: patches of h x w filled up to 64."""
    n = size[0] * size[1]
    mask = (torch.arange(64) < n).long()[None]
    tensors = {
        "pixel_values": noise(generator, 1, 64, 48),
        "spatial_shapes": torch.tensor([size]),
        "pixel_attention_mask": mask,
    }
    return Item(marked(n // 4), tensors)


def _molmo(size: tuple[int, int], generator: torch.Generator) -> Item:
    h, w = size
    pooling = torch.arange(4 * h * w).view(h * w, 4)
    tensors = {"pixel_values": noise(generator, 1, 64, 48), "image_token_pooling": pooling}
    return Item(marked(h * w), {**tensors, "image_grids": torch.tensor([[h, w, 0, 0]])})


def _question(size: Any, generator: torch.Generator) -> Item:
    """InstructBLIP: the query tokens read the question too."""
    words = torch.randint(10, VOCAB, (1, 5), generator=generator)
    tensors = {"pixel_values": noise(generator, 1, 3, SIDE, SIDE), "qformer_input_ids": words}
    return Item([IMAGE] * 12, {**tensors, "qformer_attention_mask": torch.ones(1, 5, dtype=torch.long)})


def _tiles(size: Any, generator: torch.Generator) -> Item:
    """Mllama: one tile, read by cross-attention at one id."""
    tensors = {"pixel_values": noise(generator, 1, 1, 1, 3, SIDE, SIDE), "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long)}
    return Item([IMAGE], {**tensors, "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long)})


class Grid(torch.nn.Module):
    """In place of a tower of timm: [n, 3, 32, 32] -> [n, width, 4, 4]."""

    def __init__(self, width: int):
        from transformers import PretrainedConfig

        super().__init__()
        self.conv, self.config = torch.nn.Conv2d(3, width, 8, 8), PretrainedConfig()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=self.conv(pixel_values))


def without_timm(place: str, model_type: str, width: int) -> Any:
    """A setting in which a model's file builds a `Grid` for its tower, so that timm is not needed."""

    def setting() -> contextlib.AbstractContextManager:
        auto = stock(f"models.{place}.modeling_{place}.AutoModel")
        build = auto.from_config

        def small(config: Any, **kw: Any) -> Any:
            return Grid(width) if config.model_type == model_type else build(config, **kw)

        return mock.patch.object(auto, "from_config", small)

    return setting


_TIMM = dict(model_type="timm_wrapper", do_pooling=True, initializer_range=0.02)
_SAM = dict(
    model_type="sam_vision_model", hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8,
    mlp_dim=32, output_channels=16, window_size=4, global_attn_indexes=[0], use_rel_pos=True, num_pos_feats=8,
)  # fmt: skip
_GOT = dict(
    num_channels=3, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=64, patch_size=4, mlp_dim=32,
    output_channels=32, window_size=4, global_attn_indexes=[0],
)  # fmt: skip
_PE = dict(
    embed_dim=WIDTH, img_size=[16, 16], depth=2, num_heads=4, patch_size=[4, 4], global_pool="",
    use_post_transformer_norm=False,
    init_values=0.1, ref_feat_shape=(4, 4),
)  # fmt: skip
_PERCEIVER = dict(
    hidden_size=WIDTH,
    resampler_n_latents=8,
    resampler_depth=1,
    resampler_n_heads=4,
    resampler_head_dim=8,
    num_key_value_heads=2,
)
_LLAMA4_TOWER = {**VIEW, "intermediate_size": 4 * WIDTH, "vision_output_dim": WIDTH, "projector_input_dim": WIDTH}
_LLAMA4 = dict(head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=256)
_GRANITE_QUERIES = qformer(hidden_size=64, encoder_hidden_size=64)
_CONV = dict(layer_types=["conv", "full_attention"] * 2, block_multiple_of=16)
_SIGLIP2 = dict(model_type="siglip2_vision_model", num_patches=64, vision_use_head=False)
_PIXTRAL = dict(vision_config=tower("pixtral", patch_size=4, head_dim=8), text_config=mistral(), vision_feature_layer=-1)
_LINES = ((32, 32), (16, 32), (32, 16))
_PHI = dict(
    original_max_position_embeddings=1024, rope_parameters={**ROPE, "partial_rotary_factor": 1.0},
    model="Phi4MultimodalForCausalLM",
    vision_config={**VIEW, "num_hidden_layers": 3, "crop_size": SIDE, "image_token_id": IMAGE, "feature_layer": -2},
    audio_config=dict(
        hidden_size=WIDTH, intermediate_size=48, num_blocks=2, num_attention_heads=4, input_size=16, ext_pw_out_channel=WIDTH,
        depthwise_separable_out_channel=WIDTH, nemo_conv_channels=8, time_reduction=4, audio_token_id=AUDIO, left_chunk=18,
        chunk_size=-1,
    ),
)  # fmt: skip
_VQ = dict(embed_dim=8, latent_channels=8, base_channels=32, channel_multiplier=(1, 1), num_res_blocks=1)
_CODES = {f"IMGIMG{chr(65 + i)}Z": 90 + i for i in range(8)}
_EMU_CODES = {f"<|visual token {i:06d}|>": 80 + i for i in range(8)}
_MOLMO_TOWER = dict(num_key_value_heads=4, head_dim=8, num_position_embeddings=64)
_SIX = {k: v for k, v in BARE.items() if k not in ("bos_token_id", "eos_token_id", "rope_parameters")}

# fmt: off
VIEWS: dict[str, Family] = {
    "llava_pixtral": entry(
        "LlavaForConditionalGeneration", _lines(4), _LINES, image_token_id=IMAGE, vision_feature_select_strategy="full",
        **_PIXTRAL,
    ),
    "mistral3": entry(
        "Mistral3ForConditionalGeneration", _lines(8), _LINES, image_token_id=IMAGE, spatial_merge_size=2, **_PIXTRAL,
    ),
    "vipllava": entry(
        "VipLlavaForConditionalGeneration", view(16), vision_config=clip(), text_config=text(), image_token_id=IMAGE,
        vision_feature_layers=[-1, -2],
    ),
    "llava_next_video": entry(
        "LlavaNextVideoForConditionalGeneration", _anyres, SIZES, vision_config=clip(), text_config=text(),
        video_token_id=VIDEO, **ANYRES,
    ),
    "llava_next_video_clip": entry(
        "LlavaNextVideoForConditionalGeneration", frames(16, 4), kinds="video", vision_config=clip(), text_config=text(),
        video_token_id=VIDEO, **ANYRES,
    ),
    "video_llava": entry(
        "VideoLlavaForConditionalGeneration", view(16, name="pixel_values_images"), vision_config=clip(), text_config=text(),
        vision_feature_layer=-1, **TWO,
    ),
    "video_llava_clip": entry(
        "VideoLlavaForConditionalGeneration", frames(136, 8), kinds="video", vision_config=clip(), text_config=text(),
        vision_feature_layer=-1, **TWO,
    ),
    "aya_vision": entry(
        "AyaVisionForConditionalGeneration", view(4, marks=True), vision_config=siglip(), text_config=cohere(),
        image_token_id=IMAGE, downsample_factor=2, vision_feature_layer=-1,
    ),
    "cohere2_vision": entry(
        "Cohere2VisionForConditionalGeneration", view(4, marks=True), vision_config=siglip(), text_config=cohere(),
        image_token_id=IMAGE, downsample_factor=2, alignment_intermediate_size=48,
    ),
    "internvl": entry(
        "InternVLForConditionalGeneration", view(16, marks=True), vision_config={**VIEW, "image_size": [SIDE, SIDE],
        "patch_size": [4, 4]}, text_config=text("qwen2"), image_token_id=IMAGE, downsample_ratio=0.5,
    ),
    "got_ocr2": entry(
        "GotOcr2ForConditionalGeneration", view(16, 64, marks=True), vision_config=_GOT, text_config=text("qwen2"),
        image_token_id=IMAGE,
    ),
    "ovis2": entry(
        "Ovis2ForConditionalGeneration", view(16, marks=True), vision_config={**VIEW, "vocab_size": 64, "hidden_stride": 2,
        "num_visual_indicator_tokens": 5}, text_config=text("qwen2"), image_token_id=IMAGE, visual_indicator_token_ids=[94, 95,
        96, 97, 98], hidden_size=WIDTH, vocab_size=VOCAB, suppress=(*range(2, 10), *range(94, 99)),
    ),
    "fast_vlm": entry(
        "FastVlmForConditionalGeneration", view(16), vision_config={**_TIMM, "architecture": "fastvit_mci3",
        "global_pool": "avg", "hidden_size": 24, "model_args": {"inference_mode": True}}, text_config=text("qwen2"),
        image_token_id=IMAGE, setting=without_timm("fast_vlm", "timm_wrapper", 24),
    ),
    "perception_lm": entry(
        "PerceptionLMForConditionalGeneration", view(16, 16, shape=(1, )), vision_config={**_TIMM,
        "architecture": "vit_pe_core_large_patch14_336", "model_args": _PE}, text_config=text(), projector_pooling_ratio=1,
        **TWO,
    ),
    "deepseek_vl": entry(
        "DeepseekVLForConditionalGeneration", view(16), vision_config=siglip(), text_config=text(), image_token_id=IMAGE,
    ),
    "deepseek_vl_hybrid": entry(
        "DeepseekVLHybridForConditionalGeneration", _two_resolutions, vision_config={**siglip(patch_size=4), "image_size": 16},
        high_res_vision_config=_SAM, text_config=text(), image_token_id=IMAGE,
    ),
    "aria": entry(
        "AriaForConditionalGeneration", view(16, marks=True), vision_config=tower("idefics3_vision", patch_size=4),
        text_config=text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1), image_token_id=IMAGE,
        projector_patch_to_query_dict={64: 16}, vision_feature_layer=-1,
    ),
    "idefics2": entry(
        "Idefics2ForConditionalGeneration", view(8, marks=True), slots=True, vision_config=VIEW, perceiver_config=_PERCEIVER,
        text_config=mistral(), image_token_id=IMAGE,
    ),
    "idefics3": entry(
        "Idefics3ForConditionalGeneration", view(16, marks=True), slots=True, vision_config=VIEW, text_config=text(),
        image_token_id=IMAGE, scale_factor=2,
    ),
    "smolvlm": entry(
        "SmolVLMForConditionalGeneration", view(16, marks=True), slots=True, vision_config=VIEW, text_config=text(),
        image_token_id=IMAGE, scale_factor=2,
    ),
    "llama4": entry(
        "Llama4ForConditionalGeneration", view(16, marks=True), vision_config={**_LLAMA4_TOWER, "projector_output_dim": WIDTH,
        "pixel_shuffle_ratio": 0.5}, text_config={**_SIX, **_LLAMA4}, image_token_index=IMAGE,
    ),
    "lfm2_vl": entry(
        "Lfm2VlForConditionalGeneration", _spatial, ((8, 8), (4, 8), (8, 4)), vision_config={**tower("siglip2_vision_model",
        patch_size=4), **_SIGLIP2}, text_config={**_SIX, "model_type": "lfm2", **_CONV}, image_token_id=IMAGE,
        downsample_factor=2,
    ),
    "fuyu": entry(
        "FuyuForCausalLM", _fuyu, most=1, text_row=False, text_config=text("persimmon", qk_layernorm=True), patch_size=4,
        image_size=SIDE, num_channels=3, image_token_id=IMAGE, **_SIX,
    ),
    "phi4_multimodal": entry(item=_phi, sizes=((1, 2), (1, 1), (2, 1)), **{**BARE, **_PHI}),
    "phi4_multimodal_audio": entry(item=_phi_sound, sizes=(64, 40, 56), kinds="audio", **{**BARE, **_PHI}),
    "janus": entry(
        "JanusForConditionalGeneration", view(64, marks=True), vision_config={**VIEW, "depth": 1, "projection_dim": WIDTH,
        "mlp_ratio": 1.5, "num_image_tokens": 64}, text_config=text(), vq_config={**_VQ, "num_embeddings": 16, "num_patches": 4,
        "projection_dim": WIDTH, "image_token_embed_dim": WIDTH}, image_token_id=IMAGE,
    ),
    "chameleon": entry(
        "ChameleonForConditionalGeneration", view(256, marks=True), vocabulary_map={"<image>": IMAGE, **_CODES},
        vq_config={**_VQ, "num_embeddings": 8, "resolution": SIDE}, suppress=(*range(2, 10), *range(90, 99)), **BARE_TEXT,
    ),
    "emu3": entry(
        "Emu3ForConditionalGeneration", _emu, vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 88, **_EMU_CODES},
        image_token_id=IMAGE, text_config=BARE_TEXT, vq_config={**_VQ, "codebook_size": 8, "embed_dim": 4, "latent_channels": 4,
        "channel_multiplier": [1], "attn_resolutions": [], "hidden_size": WIDTH, "temporal_downsample_factor": 1},
        suppress=(*range(2, 10), *range(80, 89)),
    ),
    "blip_2": entry(
        "Blip2ForConditionalGeneration", view(12), text_row=False, vision_config={**VIEW, "patch_size": 8},
        qformer_config=qformer(num_hidden_layers=2), text_config=dict(model_type="opt", vocab_size=VOCAB, hidden_size=WIDTH,
        ffn_dim=48, num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=1024, word_embed_proj_dim=WIDTH,
        pad_token_id=PAD), num_query_tokens=12, image_token_index=IMAGE,
    ),
    "instructblip": entry(
        "InstructBlipForConditionalGeneration", _question, most=1, text_row=False, vision_config={**VIEW, "patch_size": 8},
        qformer_config=qformer(num_hidden_layers=2), text_config=text(), num_query_tokens=12, image_token_index=IMAGE,
    ),
    "granite4_vision": entry(
        "Granite4VisionForConditionalGeneration", _crops_in_layers, SIZES, vision_config=siglip(hidden_size=64),
        text_config=text("granite4_vision_text"), image_token_index=IMAGE, vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS, downsample_rate="1/2", deepstack_layer_map=[[-1, 0], [-2, 1]], spatial_target_layers=[2,
        3], qformer_config={**_GRANITE_QUERIES, "model_type": "blip_2_qformer", "cross_attention_frequency": 1},
    ),
    "mllama": entry(
        "MllamaForConditionalGeneration", _tiles, most=1, text_row=False,
        batch_tensors=lambda inputs: {"cross_attention_mask": torch.ones(*inputs["input_ids"].shape, 1, 1, dtype=torch.long)},
        vision_config=dict(hidden_size=WIDTH, num_hidden_layers=2, num_global_layers=1, attention_heads=4, intermediate_size=48,
        vision_output_dim=2 * WIDTH, image_size=SIDE, patch_size=8, max_num_tiles=1, intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1]]), text_config={**_SIX, "cross_attention_layers": [1, 3], "rope_parameters": ROPE},
        image_token_index=IMAGE,
    ),
    "molmo2": entry(
        "Molmo2ForConditionalGeneration", _molmo, ((4, 4), (2, 4), (4, 2)), most=1,
        text_row=False, vision_config={**VIEW, **_MOLMO_TOWER,
        "image_size": [SIDE, SIDE]}, adapter_config=dict(vision_feature_layer=[-1, -2], num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, intermediate_size=48, text_hidden_size=WIDTH, hidden_size=WIDTH),
        text_config=dict(hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=VOCAB - 8,
        additional_vocab_size=8, num_hidden_layers=LAYERS, intermediate_size=48, max_position_embeddings=1024,
        pad_token_id=PAD), image_patch_id=IMAGE, image_start_token_id=START, image_end_token_id=END,
        low_res_image_start_token_id=BREAK,
    ),
}
# fmt: on
"""Name -> family. One entry for each kind of item."""
