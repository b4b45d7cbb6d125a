"""m-RoPE: SmolLM2 in the text stack of a Qwen2.5-VL, and the first blocks of DINOv2-small in its tower.

The conversion of a block is exact but for the activation. What DINOv2 has and Qwen's tower has not (CLS, a position embedding
for each place) is left out, and Qwen's rotary positions are new to the blocks: the tower needs training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmcompress.zoo.common import LANGUAGE, PATCH, PIXELS, SIDE, State, assemble, chat_template, dinov2, smollm2

DEPTH, HEADS, WIDTH = 8, 6, 384
TOWER = "model.visual."
MARKS = {"image": "<|image_pad|>", "video": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
MROPE_SECTION = [4, 4, 24]
"""Of a head's 32 frequencies, fastest first: time, height, width. In Qwen's proportions the width's fastest turns by 0.01 over
all 16 columns, too little to be seen; in these the height's turn by 1.3 to 3.8, the width's by up to 0.9."""
GELU = 1.702  # x sigmoid(1.702 x) is within 0.021 of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415)
SIZE = {"shortest_edge": 50_000, "longest_edge": int((16.99 * PATCH) ** 2)}
"""Least and most pixels. A square picture has 16 x 16 tokens, others up to 3 : 1 at least 256."""


def mrope(cache_dir: str | Path | None, parts: Path | None) -> tuple[Any, Any]:
    """Qwen2_5_VL: 256 tokens of a square picture, more of others (no merge of patches); two frames of a clip are one step."""
    from transformers import (  # type: ignore[attr-defined]
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer, text, state = smollm2(list(MARKS.values()), cache_dir)
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    rope = {"rope_type": "default", "rope_theta": text["rope_parameters"]["rope_theta"], "mrope_section": MROPE_SECTION}
    for name in [n for n in state if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        state[name.removesuffix("weight") + "bias"] = torch.zeros(len(state[name]))
    state.update(qwen_tower(dinov2(cache_dir)[1], inner=state[LANGUAGE + "embed_tokens.weight"].shape[1]))
    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    more = ("max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
    config = Qwen2_5_VLConfig(
        text_config={**{name: text[name] for name in (*shared, *more)}, "rope_parameters": rope},
        vision_config={
            "depth": DEPTH,
            "fullatt_block_indexes": list(range(DEPTH)),
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_heads": HEADS,
            "out_hidden_size": text["hidden_size"],
            "patch_size": PATCH,
            "spatial_merge_size": 1,
            "window_size": SIDE,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
        tie_word_embeddings=True,
    )
    sizes: dict[str, Any] = {"patch_size": PATCH, "merge_size": 1, "temporal_patch_size": 2, **PIXELS}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=dict(SIZE), **sizes),
        tokenizer,
        Qwen2VLVideoProcessor(size=dict(SIZE), cap_pixels_per_frame=False, **sizes),
        chat_template=chat_template(**{k: MARKS["start"] + MARKS[k] + MARKS["end"] for k in ("image", "video")}),
    )
    return assemble(Qwen2_5_VLForConditionalGeneration, config, state, tokenizer, parts), processor


def qwen_tower(tower: State, inner: int) -> State:
    """The weights of `model.visual` from those of a Dinov2Model, with a random merger (fixed seed) into width `inner`.

    Whatever is added to the residual stream is centred, so that Qwen's RMSNorm is DINOv2's LayerNorm; layer scales and the
    norms' biases move into the linear layers beside them; GELU becomes a SwiGLU whose second path is constant. The bias of the
    patches and the mean position embedding are added behind the first attention, the first place that has a bias.
    """
    centre = torch.eye(WIDTH) - 1 / WIDTH
    get = lambda name: tower["model.vision_tower." + name].float()  # noqa: E731
    pixels = torch.einsum("ij,jchw->ichw", centre, get("embeddings.patch_embeddings.projection.weight"))
    out = {"patch_embed.proj.weight": (pixels / 2)[:, :, None].repeat(1, 1, 2, 1, 1)}  # two equal frames
    constant = get("embeddings.patch_embeddings.projection.bias") + get("embeddings.position_embeddings")[0, 1:].mean(0)
    for i in range(DEPTH):
        old, new = f"encoder.layer.{i}.", f"blocks.{i}."

        def linear(name: str, norm: str | None = None, scale: str | None = None, old: str = old) -> tuple[Any, Any]:
            weight, bias = get(f"{old}{name}.weight"), get(f"{old}{name}.bias")
            if norm is not None:
                return weight, bias + weight @ get(f"{old}{norm}.bias")
            scaled = centre * get(f"{old}{scale}.lambda1")
            return scaled @ weight, scaled @ bias

        qkv = [linear(f"attention.attention.{name}", norm="norm1") for name in ("query", "key", "value")]
        first, second = linear("mlp.fc1", norm="norm2"), linear("mlp.fc2", scale="layer_scale2")
        proj = linear("attention.output.dense", scale="layer_scale1")
        if i == 0:
            proj = proj[0], proj[1] + centre @ constant
        layers = {
            "attn.qkv": (torch.cat([w for w, _ in qkv]), torch.cat([b for _, b in qkv])),
            "attn.proj": proj,
            "mlp.gate_proj": (GELU * first[0], GELU * first[1]),
            "mlp.up_proj": (torch.zeros_like(first[0]), torch.full_like(first[1], 1 / GELU)),
            "mlp.down_proj": second,
        }
        for name, (weight, bias) in layers.items():
            out |= {f"{new}{name}.weight": weight, f"{new}{name}.bias": bias}
        out |= {f"{new}{norm}.weight": get(f"{old}{norm}.weight") for norm in ("norm1", "norm2")}
    generator = torch.Generator().manual_seed(0)
    out["merger.ln_q.weight"] = torch.ones(WIDTH)
    for layer, rows in (("mlp.0", WIDTH), ("mlp.2", inner)):
        out[f"merger.{layer}.weight"] = torch.randn(rows, WIDTH, generator=generator) * WIDTH**-0.5
        out[f"merger.{layer}.bias"] = torch.zeros(rows)
    return {TOWER + name: value for name, value in out.items()}
