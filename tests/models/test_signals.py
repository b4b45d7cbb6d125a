"""Signals, layouts and positions that methods see, against the towers computed by hand."""

import math

import pytest
import torch
from reference import capture, find_items
from seam_methods import watch

from mmcompress.testing import (
    FAMILIES,
    MERGE,
    PLACEHOLDERS,
    SIDE,
    anyres_canvas,
    anyres_crops,
    assert_close,
    tiny_inputs,
)

ROWS = 4
WITH_CLS = ("llava", "llava_dinov2", "llava_next", "llava_next_dinov2")


def observed(model, family, *signals):
    """For every row's items in order: (row, item's columns, its view of the tokens as a method saw them in the batch)."""
    inputs = tiny_inputs(family, ROWS)
    watcher = watch(*signals)
    with watcher(model):
        model(**inputs)
    found = []
    for r in range(ROWS - 1):
        sample = tiny_inputs(family, ROWS, rows=[r])
        features = capture(model, sample)["inputs_embeds"][0]
        for tokens, _ in find_items(sample):
            x = features[tokens]
            seen = [
                (t, b)
                for t in watcher.seen
                for b in range(len(t.x))
                if t.x[b].shape == x.shape and (t.x[b] - x).abs().max() < 1e-5
            ]
            assert len(seen) == 1, "each item is handed over exactly once"
            found.append((r, *seen[0]))
    return inputs, found


def last_input(model, inputs, attention):
    """What enters an attention module in a stock forward, call by call: (hidden states, its other keyword arguments)."""
    seen, original = [], attention.forward

    def forward(*args, **kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"], kwargs))
        return original(*args, **kwargs)

    attention.forward = forward
    try:
        model(**inputs)
    finally:
        del attention.forward
    return seen


def views_in_token_order(inputs, per_view):
    """[views, SIDE², F] of all items -> one [N, F] per item: thumbnail, then the unpadded canvas, no newlines."""
    if "image_sizes" not in inputs:
        return list(per_view)
    out = []
    for size in inputs["image_sizes"].tolist():
        (R, C), (rows, columns) = anyres_crops(size), anyres_canvas(size)
        thumbnail, crops, per_view = per_view[0], per_view[1 : 1 + R * C], per_view[1 + R * C :]
        canvas = crops.view(R, C, SIDE, SIDE, -1).permute(0, 2, 1, 3, 4).reshape(R * SIDE, C * SIDE, -1)
        top, left = (R * SIDE - rows) // 2, (C * SIDE - columns) // 2
        out.append(torch.cat([thumbnail, canvas[top : top + rows, left : left + columns].flatten(0, 1)]))
    assert len(per_view) == 0
    return out


def vision_attention(model):
    """(attention module, names of its query and key projections) of the tower's last layer."""
    for name in ("attention.attention", "self_attn", "attention"):
        found = [m for n, m in model.model.vision_tower.named_modules() if n.endswith(name)]
        if found:
            return found[-1], ("query", "key") if name == "attention.attention" else ("q_proj", "k_proj")
    raise AssertionError


@pytest.mark.parametrize("family", WITH_CLS)
@torch.no_grad()
def test_cls_logits(tiny, family):
    model = tiny(family)
    inputs, found = observed(model, family, "cls_logits")
    attention, (query, key) = vision_attention(model)
    ((h, _),) = last_input(model, inputs, attention)
    q, k = getattr(attention, query)(h)[:, 0], getattr(attention, key)(h)[:, 1:]
    H = model.config.vision_config.num_attention_heads
    logits = (k @ q[..., None]) / (H * math.sqrt(k.shape[-1] // H))
    expected = views_in_token_order(inputs, logits)
    assert len(expected) == len(found)
    for (_, tokens, b), e in zip(found, expected, strict=True):
        signal = tokens.signals["cls_logits"][b]
        assert signal.dtype == torch.float32 and signal.std() > 1e-2
        assert_close(signal, e[:, 0], 1e-5)


@pytest.mark.parametrize("family", WITH_CLS)
@torch.no_grad()
def test_vision_keys_and_tower_features(tiny, family):
    model = tiny(family)
    inputs, found = observed(model, family, "keys", "tower")
    attention, (_, key) = vision_attention(model)
    ((h, _),) = last_input(model, inputs, attention)
    pixels = inputs["pixel_values"]
    if pixels.dim() == 5:
        views = [1 + math.prod(anyres_crops(size)) for size in inputs["image_sizes"].tolist()]
        pixels = torch.cat([p[:n] for p, n in zip(pixels, views, strict=True)])
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    expected_keys = views_in_token_order(inputs, getattr(attention, key)(h)[:, 1:])
    expected_tower = views_in_token_order(inputs, hidden[:, 1:])
    for (_, tokens, b), k, t in zip(found, expected_keys, expected_tower, strict=True):
        assert_close(tokens.signals["keys"][b], k, 1e-5)
        assert_close(tokens.signals["tower"][b], t, 1e-5)
        assert_close(model.model.multi_modal_projector(tokens.signals["tower"][b]), tokens.x[b], 1e-5)


@torch.no_grad()
def test_siglip_tower_features(tiny):
    model = tiny("llava_siglip")
    inputs, found = observed(model, "llava_siglip", "tower")
    tower = model.model.vision_tower
    hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    for (_, tokens, b), t in zip(found, hidden, strict=True):
        assert_close(tokens.signals["tower"][b], t, 1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_qwen_keys_and_tower_features(tiny, family):
    """Qwen2.5's tower works on window-permuted patches; the permutation is found here by matching the merger's outputs."""
    model = tiny(family)
    inputs, found = observed(model, family, "keys", "tower")
    visual = model.model.visual
    attention = visual.blocks[-1].attn
    expected = {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = inputs[f"{kind}_grid_thw"]
        calls = last_input(visual, {"hidden_states": inputs[pixels], "grid_thw": grids}, attention)
        ((h, kwargs),) = calls
        cos, sin = (t[:, None] for t in kwargs["position_embeddings"])
        _, k, _ = attention.qkv(h).view(len(h), 3, attention.num_heads, -1).unbind(1)
        first, second = k.chunk(2, -1)
        k = (k * cos + torch.cat([-second, first], -1) * sin).flatten(1)
        out = visual(inputs[pixels], grid_thw=grids)
        permuted = visual.merger(out.last_hidden_state)
        order = torch.cdist(out.pooler_output, permuted).argmin(1)
        assert sorted(order.tolist()) == list(range(len(order)))
        assert (order.tolist() != list(range(len(order)))) == (family == "qwen2_5_vl")
        keys = k.view(-1, MERGE**2, k.shape[-1]).mean(1)[order]
        counts = (grids.prod(1) // MERGE**2).tolist()
        expected[kind] = list(zip(keys.split(counts), out.pooler_output.split(counts), strict=True))
    for _, tokens, b in found:
        k, t = expected[tokens.layout.kind].pop(0)
        assert_close(tokens.signals["keys"][b], k, 1e-5)
        assert_close(tokens.signals["tower"][b], t, 1e-5)
    assert not any(expected.values())


@torch.no_grad()
def test_audio_keys_and_tower_features(tiny):
    model = tiny("qwen2_audio")
    inputs, found = observed(model, "qwen2_audio", "keys", "tower")
    tower = model.model.audio_tower
    attention, projected = tower.layers[-1].self_attn, []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: projected.append(args[0]))
    ((h, _),) = last_input(model, inputs, attention)
    handle.remove()
    k = attention.k_proj(h)
    k = (k[:, 0::2] + k[:, 1::2]) / 2
    for clip, (_, tokens, b) in enumerate(found):
        n = tokens.num_tokens
        assert_close(tokens.signals["keys"][b], k[clip, :n], 1e-5)
        assert_close(tokens.signals["tower"][b], projected[0][clip, :n], 1e-5)
        assert_close(model.model.multi_modal_projector(tokens.signals["tower"][b]), tokens.x[b], 1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_audio"])
@torch.no_grad()
def test_text(tiny, family):
    """The embeddings of the sample's own words, placeholders and padding left out."""
    model = tiny(family)
    inputs, found = observed(model, family, "text")
    for r, tokens, b in found:
        ids = inputs["input_ids"][r][inputs["attention_mask"][r].bool()]
        words = ids[~torch.isin(ids, torch.tensor(PLACEHOLDERS))]
        text, mask = tokens.signals["text"][b], tokens.signals["text_mask"][b]
        assert torch.equal(text[mask], model.get_input_embeddings()(words))


@torch.no_grad()
def test_anyres_structure(tiny):
    _, found = observed(tiny("llava_next"), "llava_next")
    sizes = tiny_inputs("llava_next", ROWS)["image_sizes"].tolist()
    for (_, tokens, b), size in zip(found, sizes, strict=True):
        (R, C), (rows, columns) = anyres_crops(size), anyres_canvas(size)
        assert tokens.num_tokens == SIDE**2 + rows * columns
        layout = tokens.layout
        assert (layout.kind, layout.crops, layout.side, tuple(layout.image_size)) == ("image", (R, C), SIDE, tuple(size))
        assert layout.grid == (1, R * SIDE, C * SIDE)
        top, left = (R * SIDE - rows) // 2, (C * SIDE - columns) // 2
        thumbnail = [(0, i // SIDE, i % SIDE) for i in range(SIDE**2)]
        canvas = [(0, top + y, left + x) for y in range(rows) for x in range(columns)]
        assert list(map(tuple, tokens.position[b].tolist())) == thumbnail + canvas
        crop = [1 + y // SIDE * C + x // SIDE for _, y, x in canvas]
        assert tokens.group[b].tolist() == [0] * SIDE**2 + crop
    assert len({t.layout.crops for _, t, _ in found}) > 1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_audio"])
@torch.no_grad()
def test_lattices(tiny, family):
    _, found = observed(tiny(family), family)
    sizes = FAMILIES[family].sizes
    for i, (_, tokens, b) in enumerate(found):
        if family == "llava":
            kind, grid = "image", (1, SIDE, SIDE)
        elif family.endswith("_vl"):
            kind, t, h, w = sizes[i]
            grid = (t, h // MERGE, w // MERGE)
        else:
            kind, grid = "audio", (tokens.num_tokens, 1, 1)
        assert (tokens.layout.kind, tokens.layout.grid, tokens.layout.crops) == (kind, grid, None)
        t, h, w = grid
        raster = [(a, y, x) for a in range(t) for y in range(h) for x in range(w)]
        assert list(map(tuple, tokens.position[b].tolist())) == raster
        assert tokens.group[b].tolist() == ([p[0] for p in raster] if kind == "video" else [0] * len(raster))
        assert tokens.size[b].eq(1).all()


@torch.no_grad()
def test_nothing_is_tapped_unless_declared(tiny):
    """The process's attention table is left alone, and without a signal no attention module is wrapped."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, tables, wrapped = tiny("llava"), [], []
    attention, _ = vision_attention(model)
    for signals in ((), ("cls_logits",)):
        original = attention.forward

        def forward(*args, original=original, **kwargs):
            tables.append(dict(ALL_ATTENTION_FUNCTIONS._local_mapping))
            return original(*args, **kwargs)

        attention.forward = forward
        try:
            with watch(*signals)(model):
                wrapped.append(attention.forward is not forward)
                model(**tiny_inputs("llava"))
        finally:
            del attention.forward
    assert tables[0] == tables[1] == dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    assert wrapped == [False, True]
