"""LLaVA-OneVision: pictures and clips against the hand-written layer loop, one sample at a time."""

import math

import pytest
import torch
from reference import find_items, reference
from seam_methods import Attended, Direction, MeanMerge, watch

from mmcompress import create
from mmcompress.models.llava_onevision import shrunk
from mmcompress.testing import CLIP_FRAMES, IMAGE, SIDE, VIDEO, VIEW, assert_close, tiny_inputs, tiny_model

FAMILY, ROWS, STEPS = "llava_onevision", 4, 4
ITEMS = [[0, 1], [1], [2], []]  # a picture and a clip, a clip, a picture, text
STAGES = {
    "prefill": lambda: MeanMerge(),
    "chain": lambda: Direction(keep_ratio=0.7) | Attended(keep_ratio=0.6, layer=2),
}
placements = pytest.mark.parametrize("name", STAGES)


def batch(rows=None, family=FAMILY, items=ITEMS):
    return tiny_inputs(family, ROWS, items=items, rows=rows)


@placements
@torch.no_grad()
def test_forward_and_greedy(tiny, name):
    model, stages, inputs = tiny(FAMILY), STAGES[name](), batch()
    S = inputs["input_ids"].shape[1]
    plain = model(**inputs).logits
    with stages(model) as run:
        logits = model(**inputs).logits
        counted = [(i.kind, i.count.tokens_in, i.count.separators) for i in run.items]
        out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    n = CLIP_FRAMES * (SIDE // 2) ** 2
    assert [c for c in counted if c[0] == "video"] == [("video", n, 1)] * 2
    assert all(tokens > SIDE**2 and separators > 0 for kind, tokens, separators in counted if kind == "image")
    for r in range(ROWS):
        sample, real = batch([r]), inputs["attention_mask"][r].bool()
        expected = reference(model, sample, stages.stages).logits
        assert_close(logits[r][real], expected)
        assert bool(ITEMS[r]) == ((plain[r][real] - expected).abs().max().item() > 1e-3)
        new = out.sequences[r, S:].tolist()
        steps = reference(model, sample, stages.stages, new[:-1]).logits[sample["input_ids"].shape[1] - 1 :]
        assert_close(torch.stack([step[r] for step in out.logits]), steps)


@torch.no_grad()
def test_keep_everything_is_bit_identical(tiny):
    model, inputs = tiny(FAMILY), batch()
    logits = model(**inputs).logits
    with create("k_center", keep_ratio=1)(model) as run:
        assert torch.equal(model(**inputs).logits, logits)
    assert run.ledger.tokens_kept == run.ledger.tokens_in > 0
    with watch()(model):
        got = model(**inputs).logits
    for r in range(ROWS):
        real = inputs["attention_mask"][r].bool()
        assert_close(got[r][real], logits[r][real], 5e-6)


@torch.no_grad()
def test_beams_see_the_items_of_their_own_prompt(tiny):
    model, stages = tiny(FAMILY), Direction(keep_ratio=0.6)
    config, items = {"max_new_tokens": STEPS, "num_beams": 3, "do_sample": False}, [[0, 2], [1, 1], [2], []]
    with stages(model):
        together = model.generate(**batch(items=items), **config)[:, -STEPS:]
        alone = [model.generate(**batch([r], items=items), **config)[0, -STEPS:] for r in range(ROWS)]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
def test_structure_and_signals():
    """A clip's signals are pooled as its features are; a picture's point at their own patches."""
    model, seen = tiny_model("llava_onevision_dinov2"), watch("cls_logits", "keys", "tower")
    towers = []
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda m, a: towers.append(a[0]))
    with seen(model):
        model(**batch(family="llava_onevision_dinov2"))
    hook.remove()
    side, clip = SIDE // 2, [t for t in seen.seen if t.layout.kind == "video"]
    tokens = clip[0]
    assert tokens.layout.grid == (CLIP_FRAMES, side, side) and tokens.x.shape[0] == 2
    raster = [(t, y, x) for t in range(CLIP_FRAMES) for y in range(side) for x in range(side)]
    assert list(map(tuple, tokens.position[1].tolist())) == raster and tokens.group[1].tolist() == [p[0] for p in raster]
    pooled = towers[1].view(2, CLIP_FRAMES, side, 2, side, 2, -1).mean((3, 5)).flatten(1, 3)
    assert_close(tokens.signals["tower"], pooled)
    assert tokens.signals["cls_logits"].shape == tokens.x.shape[:2] and tokens.signals["keys"].shape[:2] == tokens.x.shape[:2]
    pictures = [t for t in seen.seen if t.layout.kind == "image"]
    assert len(pictures) == 2 and all(t.layout.crops for t in pictures)
    for t in pictures:
        assert_close(projector(t.signals["tower"][0]), t.x[0])


@torch.no_grad()
def test_several_pictures_of_a_prompt_are_one_view_each(tiny):
    """The processor says so by batch_num_images; each view ends with a newline."""
    model, edge = tiny(FAMILY), VIEW["image_size"]
    ids = torch.tensor([[1, *[IMAGE] * (2 * (SIDE**2 + 1)), 20, 21]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 1, 3, edge, edge),
        "image_sizes": torch.tensor([[30, 30], [12, 40]]),
        "batch_num_images": torch.tensor([2]),
    }
    with Direction(keep_ratio=0.5)(model) as run:
        model(**inputs)
    assert [(i.layout.grid, i.count.separators, len(i.anchor)) for i in run.items] == [((1, SIDE, SIDE), 1, SIDE**2 // 2)] * 2


@torch.no_grad()
def test_an_interpolated_canvas_is_a_line_without_signals():
    """At anyres_max_1 the model shrinks the canvas: the rows are found, signals are refused."""
    model = tiny_model(FAMILY, vision_aspect_ratio="anyres_max_1")
    edge, size = VIEW["image_size"], (30, 30)  # 2 x 2 crops
    ratio = math.sqrt(4)
    h = int(2 * SIDE // ratio)
    ids = torch.tensor([[1, *[IMAGE] * (SIDE**2 + h * (h + 1)), 20, 21]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 5, 3, edge, edge),
        "image_sizes": torch.tensor([size]),
    }
    with Direction(keep_ratio=0.5)(model) as run:
        model(**inputs)
    assert run.items[0].layout.grid == (SIDE**2 + h * h, 1, 1) and run.items[0].count.separators == h
    assert shrunk(SIDE, h, h).num_rows == SIDE**2 + h * (h + 1)
    with watch("keys")(model), pytest.raises(ValueError, match="cannot tell which encoder outputs belong to this image"):
        model(**inputs)


def test_tiny_prompts_hold_both_kinds():
    inputs = batch([0])
    assert {IMAGE, VIDEO} <= set(inputs["input_ids"][0].tolist()) and len(find_items(inputs)) == 2
