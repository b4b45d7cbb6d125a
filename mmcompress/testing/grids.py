"""Families whose pictures and clips are packed patches with their grids (Qwen, GLM and their kin), and the Gemmas."""

# ruff: noqa: C408
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmcompress.testing.parts import (
    ALTERNATE,
    AUDIO,
    BREAK,
    CLIPS,
    END,
    FIRST_WORD,
    GRIDS,
    HYBRID,
    IMAGE,
    LAYERS,
    MOE,
    MROPE,
    ROPE,
    SIDE,
    START,
    STOP,
    VIDEO,
    VISION,
    VOCAB,
    WIDTH,
    Family,
    Item,
    entry,
    gemma,
    grid,
    item_types,
    marked,
    mel,
    mel_last,
    mrope,
    noise,
    qwen_tower,
    siglip,
    stamped,
    text,
    token_types,
    view,
    zero_types,
)  # fmt: skip
from mmcompress.testing.views import without_timm

IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
GLM = dict(
    image_start_token_id=START, image_end_token_id=END, video_start_token_id=BREAK, video_end_token_id=STOP,
    image_token_id=IMAGE, video_token_id=VIDEO,
)  # fmt: skip
OMNI = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, vision_start_token_id=START, audio_start_token_id=BREAK,
    audio_end_token_id=STOP,
)  # fmt: skip
TABLE = dict(out_hidden_size=WIDTH, intermediate_size=48, num_position_embeddings=16)
DEEP = {**TABLE, "deepstack_visual_indexes": [0, 1]}
SHARED = {**MOE, "shared_expert_intermediate_size": 16}
WINDOWS = dict(out_hidden_size=WIDTH, intermediate_size=48, window_size=16, fullatt_block_indexes=[1])
EAR = dict(
    d_model=WIDTH, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=16, max_source_positions=64,
    output_dim=WIDTH, n_window=8,
)  # fmt: skip


def glm_tower(**changes: Any) -> dict[str, Any]:
    sizes = qwen_tower(out_hidden_size=WIDTH, intermediate_size=48, image_size=SIDE)
    return {k: v for k, v in sizes.items() if k != "in_channels"} | changes


def glm_text(**changes: Any) -> dict[str, Any]:
    return mrope(partial_rotary_factor=1.0, **changes)


def glm_clip(t: int, n: int) -> list[int]:
    """GLM writes clips with image ids, each step with its time stamp behind."""
    return [BREAK, *(i for s in range(t) for i in (*marked(n), FIRST_WORD + s)), STOP]


def glm_types(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    inside = (ids == BREAK).int().cumsum(1) > (ids == STOP).int().cumsum(1)
    return {"mm_token_type_ids": (ids == IMAGE).int() * torch.where(inside, 2, 1)}


def expert_types(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    marks = (inputs["input_ids"] == IMAGE).int()
    return {"mm_token_type_ids": marks, "moe_mm_token_type_ids": marks}


def _hunyuan(size: tuple[int, int, int], generator: torch.Generator) -> Item:
    """Every line of rows ends with a newline row, the picture begins and ends with a row of its own."""
    _, h, w = size
    item = grid(48)(size, generator)
    return replace(item, ids=marked(h // 2 * (w // 2 + 1) + 2))


def _inkling(n: int, generator: torch.Generator) -> Item:
    return Item(marked(n), {"pixel_values": noise(generator, n, 2, 8, 8, 3)})


def half(n: int) -> int:
    """Rows of n spectrogram columns after a stride of two and pooling by two."""
    return ((n - 1) // 2 + 1 - 2) // 2 + 1


def eighth(n: int) -> int:
    return -(-n // 8)


# Gemma


def positions(h: int, w: int, total: int = 64) -> Tensor:
    """(x, y) of h x w patches, then -1 up to `total` [total, 2]."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    at = torch.stack([x.flatten(), y.flatten()], -1)
    return torch.cat([at, at.new_full((total - h * w, 2), -1)])


def _patches(rows: int = 4) -> Any:
    def item(size: tuple[int, int], generator: torch.Generator) -> Item:
        pixels = torch.rand(1, 64, 48, generator=generator)
        tensors = {"pixel_values": pixels, "image_position_ids": positions(*size)[None]}
        return Item(marked(size[0] * size[1] // rows), tensors)

    return item


def _gemma_clip(size: tuple[int, int], generator: torch.Generator) -> Item:
    """Two frames of h x w patches; newer versions of transformers take the frames of all clips in one line."""
    import inspect

    from transformers.models.gemma4.modeling_gemma4 import Gemma4Model

    pixels = torch.rand(1, 2, 64, 48, generator=generator)
    at = positions(*size)[None, None].expand(1, 2, -1, -1).contiguous()
    ids = marked(size[0] * size[1] // 2, VIDEO)
    if "num_frames_per_video" in inspect.signature(Gemma4Model.get_video_features).parameters:
        frames = {"pixel_values_videos": pixels[0], "video_position_ids": at[0], "num_frames_per_video": torch.tensor([2])}
        return Item(ids, frames)
    return Item(ids, {"pixel_values_videos": pixels, "video_position_ids": at})


def _layers(**changes: Any) -> dict[str, Any]:
    return gemma(layer_types=ALTERNATE, **changes)


def _gemma4(bidirectional: str | None = None, **rest: Any) -> dict[str, Any]:
    both = {} if bidirectional is None else {"use_bidirectional_attention": bidirectional}
    words = _layers(
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, num_kv_shared_layers=0, global_head_dim=8, **both
    )
    eye = {**VISION, "num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 2, "patch_size": 4}
    eye = {k: v for k, v in eye.items() if k != "image_size"} | {"position_embedding_size": 32}
    ear = dict(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, subsampling_conv_channels=(16, 8), conv_kernel_size=3
    )
    ear |= dict(attention_chunk_size=4, attention_context_left=5, output_proj_dims=WIDTH)
    return {"text_config": words, "vision_config": eye, "audio_config": ear, **GEMMA, "batch_tensors": item_types, **rest}


GEMMA = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, boi_token_id=START, eoi_token_id=END, boa_token_id=BREAK,
    eoa_token_index=STOP, model="Gemma4ForConditionalGeneration",
)  # fmt: skip
G3 = dict(vision_config=siglip(), image_token_id=IMAGE, mm_tokens_per_image=16, batch_tensors=token_types)
# Gemma 3n has hard embeddings of both kinds above the ids of its text
G3N: dict[str, Any] = dict(
    model="Gemma3nForConditionalGeneration", setting=without_timm("gemma3n", "gemma3n_vision", 2048), placeholders=(115, 127),
    suppress=(*range(2, 10), *range(96, 128)), image_token_id=115, audio_token_id=127, boi_token_id=101, eoi_token_id=104,
    boa_token_id=102, eoa_token_id=116, vision_soft_tokens_per_image=16, audio_soft_tokens_per_image=8,
    text_config=_layers(
        vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=8, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * LAYERS,
    ) | {"vocab_size": 128},
    vision_config=dict(architecture="mobilenetv5_300m_enc", vocab_size=12, vocab_offset=104, hidden_size=2048),
    audio_config=dict(
        vocab_size=12, vocab_offset=116, input_feat_size=16, hidden_size=WIDTH, conf_attention_chunk_size=4,
        conf_attention_context_left=5, conf_num_attention_heads=4, conf_num_hidden_layers=2, conf_conv_kernel_size=3,
        conf_reduction_factor=2, sscp_conv_channel_size=(8, 8),
    ),
)  # fmt: skip


def _picture_3n(size: Any, generator: torch.Generator) -> Item:
    return replace(view(16)(size, generator), ids=marked(16, 115, 101, 104))


PATCHES = ((8, 8), (4, 8), (8, 6))
HUNYUAN = dict(mrope_section=[1] * 4, xdrope_section=[1] * 4, alpha=1.0, beta_fast=32, beta_slow=1, factor=1.0)
INDEX = dict(hc_count=2, hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=256)
NEXT = dict(
    moe_intermediate_size=16, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2,
    kv_lora_rank=8,
    q_lora_rank=8, v_head_dim=8, qk_nope_head_dim=8, index_topk=256, index_head_dim=8, index_n_heads=2, linear_head_dim=8,
    linear_num_heads=4, hc_mult=2,
)  # fmt: skip
PLAIN = {k: v for k, v in text().items() if k not in ("model_type", "bos_token_id", "eos_token_id", "rope_parameters")}
MINIMAX = dict(
    intermediate_size=16, head_dim=8, num_experts_per_tok=2, num_local_experts=4, dense_intermediate_size=48, rotary_dim=4,
    shared_intermediate_size=16, index_n_heads=2, index_head_dim=8, index_block_size=8, index_topk_blocks=64,
)  # fmt: skip
INKLING = dict(
    head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, sliding_window_size=256, d_rel=4,
    rel_extent=64, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
    local_layer_ids=[0, 2],
    mlp_layer_types=["dense", "dense", "sparse", "sparse"],
)  # fmt: skip
FOUR_EXPERTS = dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=[16, 16], moe_num_shared_experts=1)

# fmt: off
GRIDDED: dict[str, Family] = {
    "qwen3_vl_moe": entry(
        "Qwen3VLMoeForConditionalGeneration", grid(), GRIDS, batch_tensors=item_types, vision_config=qwen_tower(**DEEP),
        text_config=mrope(head_dim=8, **MOE), **IDS,
    ),
    "qwen3_vl_moe_clip": entry(
        "Qwen3VLMoeForConditionalGeneration", grid(kind="video", ids=stamped), CLIPS, kinds="video", batch_tensors=item_types,
        vision_config=qwen_tower(**DEEP), text_config=mrope(head_dim=8, **MOE), **IDS,
    ),
    "qwen3_5": entry(
        "Qwen3_5ForConditionalGeneration", grid(), GRIDS, batch_tensors=item_types, vision_config=qwen_tower(**TABLE),
        text_config=mrope(**HYBRID), **IDS,
    ),
    "qwen3_5_moe": entry(
        "Qwen3_5MoeForConditionalGeneration", grid(), GRIDS, batch_tensors=item_types, vision_config=qwen_tower(**TABLE),
        text_config=mrope(**HYBRID, **SHARED), **IDS,
    ),
    "qwen4_exp": entry(
        "Qwen4ExpForConditionalGeneration", grid(), GRIDS, batch_tensors=item_types, vision_config=qwen_tower(**TABLE),
        text_config=mrope(**HYBRID, **SHARED, **INDEX, indexer_compress_ratio=4), **IDS,
    ),
    "qwen2_5_omni": entry(
        "Qwen2_5OmniThinkerForConditionalGeneration", grid(), GRIDS, vision_config=qwen_tower(**WINDOWS), text_config=mrope(),
        audio_config=EAR, **OMNI,
    ),
    "qwen2_5_omni_clip": entry(
        "Qwen2_5OmniThinkerForConditionalGeneration", grid(kind="video", more={"video_second_per_grid": 1.0}), CLIPS,
        kinds="video", vision_config=qwen_tower(**WINDOWS), text_config=mrope(), audio_config=EAR, **OMNI,
    ),
    "qwen2_5_omni_audio": entry(
        "Qwen2_5OmniThinkerForConditionalGeneration", mel(40, half, "feature_attention_mask"), (40, 24, 32), kinds="audio",
        vision_config=qwen_tower(**WINDOWS), text_config=mrope(), audio_config=EAR, **OMNI,
    ),
    "qwen3_omni_moe": entry(
        "Qwen3OmniMoeThinkerForConditionalGeneration", grid(), GRIDS, vision_config=qwen_tower(**DEEP),
        text_config=mrope(head_dim=8, **MOE), audio_config={**EAR, "downsample_hidden_size": 16, "n_window": 50,
        "n_window_infer": 100}, **OMNI,
    ),
    "qwen3_omni_moe_audio": entry(
        "Qwen3OmniMoeThinkerForConditionalGeneration", mel(40, eighth, "feature_attention_mask"), (40, 24, 32), kinds="audio",
        vision_config=qwen_tower(**DEEP), text_config=mrope(head_dim=8, **MOE), audio_config={**EAR,
        "downsample_hidden_size": 16, "n_window": 50, "n_window_infer": 100}, **OMNI,
    ),
    "glm4v": entry(
        "Glm4vForConditionalGeneration", grid(), GRIDS, batch_tensors=item_types, vision_config=glm_tower(),
        text_config=glm_text(), **GLM,
    ),
    "glm4v_clip": entry(
        "Glm4vForConditionalGeneration", grid(kind="video", ids=glm_clip), CLIPS, kinds="video", batch_tensors=glm_types,
        vision_config=glm_tower(), text_config=glm_text(), **GLM,
    ),
    "glm46v": entry(
        "Glm46VForConditionalGeneration", grid(), GRIDS, batch_tensors=item_types,
        vision_config=glm_tower(model_type="glm4v_vision"), text_config=glm_text(model_type="glm4v_text"), **GLM,
    ),
    "glm4v_moe": entry(
        "Glm4vMoeForConditionalGeneration", grid(), GRIDS, batch_tensors=item_types, vision_config=glm_tower(),
        text_config=glm_text(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
        first_k_dense_replace=1), **GLM,
    ),
    "glm5_next": entry(
        "Glm5NextForConditionalGeneration", grid(), GRIDS, vision_config=glm_tower(projection_intermediate_size=48),
        text_config={**PLAIN, **NEXT}, **GLM,
    ),
    "ernie4_5_vl_moe": entry(
        "Ernie4_5_VLMoeForConditionalGeneration", grid(48), GRIDS, batch_tensors=expert_types, vision_config=dict(depth=2,
        hidden_size=WIDTH, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_merge_size=2, intermediate_size=48),
        text_config={**PLAIN, **FOUR_EXPERTS, "rope_parameters": MROPE}, **GLM,
    ),
    "video_llama_3": entry(
        "VideoLlama3ForConditionalGeneration", grid(48, more={"image_merge_sizes": 2}), GRIDS, vision_config={**VISION,
        "patch_size": 4}, text_config=text("qwen2"), image_token_id=IMAGE, video_token_id=VIDEO,
    ),
    "cosmos3_omni": entry(
        "Cosmos3OmniForConditionalGeneration", grid(), GRIDS, batch_tensors=item_types,
        vision_config={"model_type": "qwen3_vl_vision", **qwen_tower(**DEEP)}, text_config=mrope(model_type="qwen3_vl_text",
        head_dim=8), **IDS,
    ),
    "minimax_m3_vl": entry(
        "models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3SparseForConditionalGeneration", grid(), GRIDS,
        vision_config=dict(model_type="minimax_m3_vl_vision", hidden_size=48, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, image_size=SIDE, patch_size=4), text_config={**PLAIN, "model_type": "minimax_m3_vl_text",
        "bos_token_id": 1, **MINIMAX}, image_token_index=IMAGE, video_token_index=VIDEO, projector_hidden_size=WIDTH,
    ),
    "hunyuan_vl": entry(
        "HunYuanVLForConditionalGeneration", _hunyuan, GRIDS, batch_tensors=item_types, vision_config=dict(hidden_size=WIDTH,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, out_hidden_size=WIDTH, patch_size=4,
        img_max_token_num=64, max_image_size=SIDE, text_hidden_size=WIDTH), text_config=mrope(head_dim=8,
        rope_parameters={**ROPE, "rope_type": "xdrope", **HUNYUAN}), image_token_id=IMAGE, im_start_id=START, im_end_id=END,
        im_newline_id=BREAK,
    ),
    "inkling": entry(
        "InklingForConditionalGeneration", _inkling, (16, 12, 8), text_config={**PLAIN, **INKLING},
        audio_config=dict(n_mel_bins=4, mel_vocab_size=8, text_hidden_size=WIDTH), vision_config=dict(text_hidden_size=WIDTH,
        patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2), image_token_id=IMAGE, audio_token_id=AUDIO,
        image_bos_token_id=START, audio_bos_token_id=BREAK,
    ),
    "lfm3_vl": entry(
        "Lfm3VlForConditionalGeneration", grid(), GRIDS, vision_config=dict(hidden_size=WIDTH, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, patch_size=4, layer_types=["conv",
        "full_attention"]), text_config={**PLAIN, "model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2,
        "block_multiple_of": 16}, projector_hidden_size=WIDTH, **IDS,
    ),
    "gemma3": entry("Gemma3ForConditionalGeneration", view(16, marks=True), text_config=gemma(sliding_window_pattern=2), **G3),
    "gemma3_window": entry(
        "Gemma3ForConditionalGeneration", view(16, marks=True), text_config={**gemma(sliding_window_pattern=2),
        "sliding_window": 12}, **G3,
    ),
    "paligemma": entry(
        "PaliGemmaForConditionalGeneration", view(16), batch_tensors=zero_types, vision_config=siglip(), text_config={**gemma(),
        "model_type": "gemma2"}, image_token_id=IMAGE, projection_dim=WIDTH,
    ),
    "gemma3n": entry(item=_picture_3n, **G3N),
    "gemma3n_audio": entry(
        item=mel_last(64, lambda n: 8, lambda n: marked(n, 127, 102, 116)), sizes=(64, ), kinds="audio", **G3N,
    ),
    "gemma4": entry(item=_patches(), sizes=PATCHES, **_gemma4()),
    "gemma4_bidirectional": entry(item=_patches(), sizes=PATCHES, **_gemma4("vision")),
    "gemma4_clip": entry(item=_gemma_clip, sizes=((4, 8), (4, 4), (8, 4)), kinds="video", **_gemma4()),
    "gemma4_audio": entry(item=mel_last(64, lambda n: n // 4), sizes=(64, 40, 56), kinds="audio", **_gemma4()),
    "gemma4_unified": entry(
        "Gemma4UnifiedForConditionalGeneration", _patches(1), PATCHES, batch_tensors=item_types,
        text_config=_layers(global_head_dim=8, use_bidirectional_attention="vision"), vision_config=dict(patch_size=2,
        pooling_kernel_size=2, mm_embed_dim=WIDTH, mm_posemb_size=32, output_proj_dims=WIDTH),
        audio_config=dict(audio_embed_dim=16), **{k: v for k, v in GEMMA.items() if k != "model"},
    ),
}
# fmt: on
"""Name -> family. One entry for each kind of item."""
