"""The families that have an adapter of their own: pictures, clips and recordings mixed in one prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmcompress.testing.parts import AUDIO, BOS, END, IMAGE, PAD, START, VIDEO, VOCAB, Family, Item, words

HIDDEN = 64
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
VIEW: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": dict(model_type="clip_vision_model", **VIEW),
    "siglip": dict(model_type="siglip_vision_model", vision_use_head=False, **VIEW),
    "dinov2": dict(model_type="dinov2", mlp_ratio=2, **{k: v for k, v in VIEW.items() if k != "intermediate_size"}),
}
SIDE = VIEW["image_size"] // VIEW["patch_size"]
WINDOW, PATCH, MERGE = 16, 4, 2  # Qwen's tower: windows of 2 x 2 tokens of 2 x 2 patches
QWEN: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
CLIP_FRAMES = 2  # of LLaVA-OneVision, whose clips in a batch have one length
MEL_BINS, NUM_MEL = 8, 96  # 48 encoder frames, at most 24 tokens
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]


def _update(default: dict, changes: Mapping | None) -> dict:
    return {**default, **(changes or {})}


def _llava(tower: str = "clip", text: Mapping | None = None, vision: Mapping | None = None, **rest: Any) -> Any:
    from transformers import LlavaConfig

    if tower not in TOWERS:
        raise ValueError(f"tower must be one of {', '.join(TOWERS)}; got {tower!r}")
    rest.setdefault("vision_feature_select_strategy", "full" if tower == "siglip" else "default")
    text = _update(dict(TEXT, model_type="llama"), text)
    return LlavaConfig(
        text_config=text,
        vision_config=_update(TOWERS[tower], vision),
        image_token_index=IMAGE,
        image_seq_length=SIDE**2,
        **rest,
    )


def _llava_next(tower: str = "clip", text: Mapping | None = None, vision: Mapping | None = None, **rest: Any) -> Any:
    from transformers import LlavaNextConfig

    if tower not in TOWERS:
        raise ValueError(f"tower must be one of {', '.join(TOWERS)}; got {tower!r}")
    rest.setdefault("vision_feature_select_strategy", "full" if tower == "siglip" else "default")
    rest.setdefault("image_grid_pinpoints", PINPOINTS)
    text = _update(dict(TEXT, model_type="mistral", sliding_window=None, head_dim=None), text)
    return LlavaNextConfig(text_config=text, vision_config=_update(TOWERS[tower], vision), image_token_index=IMAGE, **rest)


def _llava_onevision(tower: str = "siglip", text: Mapping | None = None, vision: Mapping | None = None, **rest: Any) -> Any:
    from transformers import LlavaOnevisionConfig

    if tower not in TOWERS:
        raise ValueError(f"tower must be one of {', '.join(TOWERS)}; got {tower!r}")
    rest.setdefault("vision_feature_select_strategy", "full" if tower == "siglip" else "default")
    rest.setdefault("image_grid_pinpoints", PINPOINTS)
    text = _update(dict(TEXT, model_type="qwen2"), text)
    special: dict[str, Any] = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    return LlavaOnevisionConfig(text_config=text, vision_config=_update(TOWERS[tower], vision), **special, **rest)


def _qwen2_5_vl(text: Mapping | None = None, vision: Mapping | None = None, **rest: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    text = _update(
        dict(TEXT, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}), text
    )
    tower = {
        "depth": 3,
        "fullatt_block_indexes": [0, 2],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": WINDOW,
        "out_hidden_size": HIDDEN,
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=_update(tower, vision), **QWEN, **rest)


def _qwen2_vl(text: Mapping | None = None, vision: Mapping | None = None, **rest: Any) -> Any:
    from transformers import Qwen2VLConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    tower = {
        "depth": 3,
        "embed_dim": 32,
        "hidden_size": HIDDEN,
        "mlp_ratio": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    text = _update(dict(TEXT, rope_parameters=rope), text)
    return Qwen2VLConfig(text_config=text, vision_config=_update(tower, vision), **QWEN, **rest)


def _qwen3_vl(text: Mapping | None = None, vision: Mapping | None = None, **rest: Any) -> Any:
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    tower = {
        "depth": 3,
        "deepstack_visual_indexes": [1],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": HIDDEN,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    text = _update(
        {k: v for k, v in TEXT.items() if not k.startswith(("bos", "eos"))} | {"head_dim": 16, "rope_parameters": rope}, text
    )
    return Qwen3VLConfig(text_config=text, vision_config=_update(tower, vision), **QWEN, **rest)


def _qwen2_audio(text: Mapping | None = None, vision: Mapping | None = None, **rest: Any) -> Any:
    from transformers import Qwen2AudioConfig

    text = _update(dict(TEXT, model_type="qwen2"), text)
    tower = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": MEL_BINS,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "d_model": 32,
        "max_source_positions": NUM_MEL // 2,
    }
    return Qwen2AudioConfig(text_config=text, audio_config=_update(tower, vision), audio_token_index=AUDIO, **rest)


def _view(size: Any, generator: torch.Generator) -> Item:
    edge = VIEW["image_size"]
    return Item([IMAGE] * SIDE**2, {"pixel_values": torch.randn(1, 3, edge, edge, generator=generator)})


def _anyres(size: tuple[int, int], generator: torch.Generator) -> Item:
    """The thumbnail's SIDE² tokens, then each row of the unpadded canvas with a newline column."""
    rows, columns = anyres_canvas(size)
    edge = VIEW["image_size"]
    views = 1 + math.prod(anyres_crops(size))
    pixels = torch.zeros(1, 1 + max(h * w for h, w in PINPOINTS) // edge**2, 3, edge, edge)
    pixels[0, :views] = torch.randn(views, 3, edge, edge, generator=generator)
    return Item(
        [IMAGE] * (SIDE**2 + rows * (columns + 1)),
        {"pixel_values": pixels, "image_sizes": torch.tensor([size])},
        num_separators=rows,
    )


def _picture_or_clip(size: tuple[int, int] | str, generator: torch.Generator) -> Item:
    """A picture as `_anyres` has it, or a clip whose frames are pooled 2 x 2, with one newline at its end."""
    if size != "clip":
        return _anyres(size, generator)  # type: ignore[arg-type]
    edge = VIEW["image_size"]
    pixels = torch.randn(1, CLIP_FRAMES, 3, edge, edge, generator=generator)
    return Item([VIDEO] * (CLIP_FRAMES * (SIDE // 2) ** 2 + 1), {"pixel_values_videos": pixels}, num_separators=1)


def anyres_crops(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of crops for a picture of `size` (H, W): the pinpoint that keeps most pixels, then wastes fewest."""

    def key(pinpoint: list[int]) -> tuple[int, int]:
        scale = min(pinpoint[0] / size[0], pinpoint[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - pinpoint[0] * pinpoint[1]

    height, width = max(PINPOINTS, key=key)
    return height // VIEW["image_size"], width // VIEW["image_size"]


def anyres_canvas(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens that are left of the canvas of crops when its padding is taken off."""
    rows, columns = (n * SIDE for n in anyres_crops(size))
    if size[1] / size[0] > columns / rows:  # padded above and below
        return rows - 2 * ((rows - int(round(size[0] * columns / size[1], 7))) // 2), columns
    return rows, columns - 2 * ((columns - int(round(size[1] * rows / size[0], 7))) // 2)


def _qwen(size: tuple[str, int, int, int], generator: torch.Generator) -> Item:
    kind, t, h, w = size
    patches = torch.randn(t * h * w, 3 * 2 * PATCH**2, generator=generator)
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    tensors = dict(zip(names, (patches, torch.tensor([[t, h, w]])), strict=True))
    return Item([START, *[IMAGE if kind == "image" else VIDEO] * (t * h * w // MERGE**2), END], tensors)


def _qwen2_5(size: tuple[str, int, int, int], generator: torch.Generator) -> Item:
    item = _qwen(size, generator)
    return replace(item, tensors=item.tensors | {"second_per_grid_ts": torch.tensor([1.0])}) if size[0] == "video" else item


def _qwen3(size: tuple[str, int, int, int], generator: torch.Generator) -> Item:
    """A clip's steps stand apart, each after a time stamp."""
    item, (kind, t, h, w) = _qwen(size, generator), size
    if kind == "image":
        return item
    step = [START, *[VIDEO] * (h * w // MERGE**2), END]
    return replace(item, ids=[i for _ in range(t) for i in (*words(2, generator), *step)])


def _token_types(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int() + 2 * (inputs["input_ids"] == VIDEO).int()}


def _recording(num_mel: int, generator: torch.Generator) -> Item:
    mel = torch.zeros(1, MEL_BINS, NUM_MEL)
    mel[..., :num_mel] = torch.randn(1, MEL_BINS, num_mel, generator=generator)
    mask = (torch.arange(NUM_MEL) < num_mel).long()[None]
    num_frames = (num_mel - 1) // 2 + 1
    return Item([START, *[AUDIO] * ((num_frames - 2) // 2 + 1), END], {"input_features": mel, "feature_attention_mask": mask})


def _tower(build: Callable, name: str) -> Callable:
    return lambda **overrides: build(**{"tower": name, **overrides})


_PICTURES = ((30, 30), (12, 40), (44, 14), (20, 31))
_CLIPS = (("image", 1, 8, 8), ("image", 1, 6, 10), ("video", 2, 4, 8), ("image", 1, 4, 12), ("video", 3, 6, 4))
BOTH = ("image", "video")
TESTED: dict[str, Family] = {
    "llava": Family(_llava, _view, (0, 1, 2)),
    "llava_siglip": Family(_tower(_llava, "siglip"), _view, (0, 1, 2)),
    "llava_dinov2": Family(_tower(_llava, "dinov2"), _view, (0, 1, 2)),
    "llava_next": Family(_llava_next, _anyres, _PICTURES),
    "llava_next_dinov2": Family(_tower(_llava_next, "dinov2"), _anyres, _PICTURES),
    "qwen2_5_vl": Family(_qwen2_5_vl, _qwen2_5, _CLIPS, _token_types, kinds=BOTH),
    "qwen2_vl": Family(_qwen2_vl, _qwen, _CLIPS, _token_types, kinds=BOTH),
    "qwen3_vl": Family(_qwen3_vl, _qwen3, _CLIPS, _token_types, kinds=BOTH),
    "llava_onevision": Family(_llava_onevision, _picture_or_clip, (_PICTURES[0], "clip", *_PICTURES[1:], "clip"), kinds=BOTH),
    "llava_onevision_dinov2": Family(
        _tower(_llava_onevision, "dinov2"), _picture_or_clip, (_PICTURES[0], "clip", *_PICTURES[1:], "clip"), kinds=BOTH
    ),
    "qwen2_audio": Family(_qwen2_audio, _recording, (96, 50, 71, 83), kinds=("audio",)),
}
CLIPS_ONLY: dict[str, Family] = {
    "llava_onevision_clip": replace(TESTED["llava_onevision"], sizes=("clip",), kinds=("video",)),
    "qwen2_5_vl_clip": replace(
        TESTED["qwen2_5_vl"], sizes=(("video", 3, 6, 4), ("video", 2, 4, 8), ("video", 2, 4, 4)), kinds=("video",)
    ),
}
