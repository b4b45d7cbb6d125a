"""Tiny random models of every supported family with inputs that fit them: for this package's tests and for authors of methods.

    model, inputs = tiny_model("llava_next"), tiny_inputs("llava_next", batch_size=4)
    with mmcompress.create("k_center", keep_ratio=0.25)(model) as run:
        model.generate(**inputs, max_new_tokens=8)

The weights are random with a fixed seed and large enough that attention is far from flat: a wrong mask or position
shows in the logits.
transformers is imported inside the functions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, PAD, BOS, IMAGE, VIDEO, AUDIO, START, END, FIRST_WORD = 99, 0, 1, 3, 4, 5, 6, 7, 10
PLACEHOLDERS = (IMAGE, VIDEO, AUDIO)
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

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error of a logit that counts as equal, by dtype."""


@dataclass(frozen=True)
class Item:
    """One image, clip or recording: its ids in the prompt and its share of the model's inputs, which a batch concatenates."""

    ids: list[int]
    tensors: dict[str, Tensor]
    num_separators: int = 0


@dataclass(frozen=True)
class Family:
    """config(**overrides) -> the model's configuration; item(size, generator) -> Item; `tiny_inputs` cycles through sizes."""

    config: Callable[..., Any]
    item: Callable[[Any, torch.Generator], Item]
    sizes: tuple[Any, ...]
    batch_tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


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
    return replace(item, ids=[i for _ in range(t) for i in (*_words(2, generator), *step)])


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
FAMILIES: dict[str, Family] = {
    "llava": Family(_llava, _view, (0, 1, 2)),
    "llava_siglip": Family(_tower(_llava, "siglip"), _view, (0, 1, 2)),
    "llava_dinov2": Family(_tower(_llava, "dinov2"), _view, (0, 1, 2)),
    "llava_next": Family(_llava_next, _anyres, _PICTURES),
    "llava_next_dinov2": Family(_tower(_llava_next, "dinov2"), _anyres, _PICTURES),
    "qwen2_5_vl": Family(_qwen2_5_vl, _qwen2_5, _CLIPS, _token_types),
    "qwen2_vl": Family(_qwen2_vl, _qwen, _CLIPS, _token_types),
    "qwen3_vl": Family(_qwen3_vl, _qwen3, _CLIPS, _token_types),
    "llava_onevision": Family(_llava_onevision, _picture_or_clip, (_PICTURES[0], "clip", *_PICTURES[1:], "clip")),
    "llava_onevision_dinov2": Family(
        _tower(_llava_onevision, "dinov2"), _picture_or_clip, (_PICTURES[0], "clip", *_PICTURES[1:], "clip")
    ),
    "qwen2_audio": Family(_qwen2_audio, _recording, (96, 50, 71, 83)),
}
"""One line per family: the names that `tiny_model` and `tiny_inputs` take."""


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {name!r}")
    return FAMILIES[name]


def tiny_model(family: str, seed: int = 0, gain: float = 1.0, **overrides: Any) -> Any:
    """A random model of the family in float32 and eval mode, without an end token, that never generates placeholders.

    overrides: `text` and `vision` are dicts of changes to the text and tower configuration, `tower` is clip, siglip or dinov2
    (LLaVA families), anything else goes to the model's configuration.
    gain: the standard deviation of a matrix is gain / sqrt(fan in).
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, GenerationConfig, Qwen2AudioForConditionalGeneration

    config = _family(family).config(**overrides)
    config.eos_token_id = None
    families: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    build: Any = Qwen2AudioForConditionalGeneration if family == "qwen2_audio" else families[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                noise = torch.randn(p.shape, generator=generator)
                if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and p.dim() > 1:
                    p.copy_(noise * gain / math.sqrt(p[0].numel()))
                elif p.dim() == 1 and name in ("weight", "lambda1"):  # norms and layer scales
                    p.copy_(1 + 0.1 * noise)
                else:
                    p.copy_(noise * (0.1 if name == "bias" else 0.5))
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None, suppress_tokens=list(PLACEHOLDERS)
    )
    return model.float().eval()


def tiny_inputs(
    family: str,
    batch_size: int = 2,
    seed: int = 0,
    items: Sequence[Sequence[int]] | None = None,
    padding_side: str = "left",
    rows: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """A padded batch of prompts, ready for `model(**inputs)` and `model.generate(**inputs)`.

    items: for each row the sizes of its items, as indices into `FAMILIES[family].sizes`; by default row 0 has two items, the
    others one of another size each, and from batch_size 4 on the last row is text only.
    rows: make only these rows of that batch, padded among themselves: a row's content follows from the seed and its own number,
    so `rows=[2]` is sample 2 alone.
    """
    spec = _family(family)
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be left or right, got {padding_side!r}")
    n = len(spec.sizes)
    if items is None:
        items = [[0, 1], *([(r + 1) % n] for r in range(1, batch_size))][:batch_size]
        if batch_size >= 4:
            items[-1] = []
    if len(items) != batch_size:
        raise ValueError(f"items must list {batch_size} rows (batch_size), got {len(items)}")
    prompts: list[list[int]] = []
    tensors: dict[str, list[Tensor]] = {}
    for r in range(batch_size) if rows is None else rows:
        generator = torch.Generator().manual_seed(1000 * seed + r)
        ids = [BOS, *_words(2 + r % 3, generator)]
        for i, index in enumerate(items[r]):
            item = spec.item(spec.sizes[index % n], generator)
            ids += (
                item.ids if i % 2 else [*_words(1, generator), *item.ids]
            )  # items 0 and 1 touch where the family has no marks around them
            for name, value in item.tensors.items():
                tensors.setdefault(name, []).append(value)
        prompts.append(ids + _words(4 + (2 * r) % 5, generator))
    length = max(map(len, prompts))
    pad = [[0] * (length - len(p)) for p in prompts]
    left = padding_side == "left"
    input_ids = torch.tensor([z + p if left else p + z for z, p in zip(pad, prompts, strict=True)])
    mask = torch.tensor([z + [1] * len(p) if left else [1] * len(p) + z for z, p in zip(pad, prompts, strict=True)])
    inputs: dict[str, Tensor] = {
        "input_ids": input_ids,
        "attention_mask": mask,
        **{k: torch.cat(v) for k, v in tensors.items()},
    }
    return {**inputs, **spec.batch_tensors(inputs)} if spec.batch_tensors else inputs


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, VOCAB, (count,), generator=generator).tolist()


def devices() -> list[torch.device]:
    """The CPU, and the first CUDA device where there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """AssertionError unless shapes agree and no element differs by more than `tolerance` (default: TOLERANCE by dtype)."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = (actual.double() - expected.double()).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"largest difference {error:.3g} exceeds {tolerance:.3g}")
