"""Several positions per token through the rotary embedding: golden rotations, the three kinds of RoPE, whole models.

Golden values: tests/golden/ppe_dev.npz; `rope_contiguous` and `rope_vanilla` were computed by the released rotary code of
MouxiaoHuang/PPE @ 7b6aa7d, `rope_1d` and `rope_interleaved` by a plain loop over the specification with float64 angles.
The family contract with carried positions (placement "cascade"): tests/test_seam.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import frequencies_of_axes, reference, text_model
from seam_methods import Direction
from test_seam import ROWS, alone, check_forward, check_generated, generate, real

import mmcompress
from mmcompress import create
from mmcompress.models.compat import composed
from mmcompress.models.rotary import Rotary
from mmcompress.testing import assert_close, tiny_inputs, tiny_model
from mmcompress.tokens import Reduction

GOLDEN = Path(__file__).parent.parent / "golden/ppe_dev.npz"
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")  # plain, contiguous and interleaved RoPE
families = pytest.mark.parametrize("family", FAMILIES)


def golden(kind):
    with np.load(GOLDEN, allow_pickle=False) as z:
        for i, case in enumerate(json.loads(str(z["meta"]))):
            if case["kind"] == kind:
                yield case | {k[3:]: torch.from_numpy(z[k]) for k in z.files if k.startswith(f"{i:02d}.")}


def module(sections, theta, kind, **rope):
    """A rotary module of transformers: kind "1d", "contiguous" or "interleaved"."""
    from transformers import LlamaConfig, Qwen2_5_VLTextConfig, Qwen3VLTextConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    build, config = {
        "1d": (LlamaRotaryEmbedding, LlamaConfig),
        "contiguous": (Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLTextConfig),
        "interleaved": (Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig),
    }[kind]
    width = 2 * sum(sections)
    parameters = {"rope_type": "default", "rope_theta": theta, **rope}
    if kind != "1d":
        parameters["mrope_section"] = list(sections)
    if kind == "interleaved":
        parameters["mrope_interleaved"] = True
    return build(config(hidden_size=width, num_attention_heads=1, head_dim=width, rope_parameters=parameters))


def turned(rope, ids, longest=0):
    """cos and sin [L, width] of tokens that carry ids [L, P, 3]."""
    item = SimpleNamespace(sample=0, columns=torch.arange(len(ids)), signals={"positions": ids})
    out = Rotary.of(rope).turn(rope, [item], torch.full((3,), longest), torch.zeros(1))
    return out.cos, out.sin


def rotate(q, cos, sin):
    a, b = q.chunk(2, -1)
    return q * cos + torch.cat([-b, a], -1) * sin


def slots(ids, P):
    """[A * P, L] axis-major rows -> [L, P, 3]."""
    ids = ids.long().unflatten(0, (-1, P))
    return ids.expand(3, -1, -1).permute(2, 1, 0)


CASES = [(kind, i) for kind, n in (("contiguous", 4), ("1d", 1), ("interleaved", 2)) for i in range(n)]


@pytest.mark.parametrize("kind, number", CASES)
def test_golden(kind, number):
    case = list(golden(f"rope_{kind}"))[number]
    rope, P = module(case["sections"], case["theta"], kind), case["P"]
    rotary = Rotary.of(rope)
    assert rotary.sections == tuple(case["sections"])
    assert torch.equal(rotary.axis * P + rotary.slot(P), case["row_map"].long())
    cos, sin = turned(rope, slots(case["ids"], P))
    for name in ("q", "k"):
        if name in case:
            got = rotate(case[name], cos, sin)
            torch.testing.assert_close(got, case[f"{name}_rot"], rtol=0, atol=3e-4)
            torch.testing.assert_close(got.norm(dim=-1), case[name].norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("P", [1, 2, 4, 8])
def test_golden_equal_slots_are_the_stock_rotation(P):
    (case,) = golden("rope_vanilla")
    rope = module(case["sections"], case["theta"], "contiguous")
    ids = case["ids3"].long()
    cos, sin = turned(rope, ids.T[:, None].expand(-1, P, -1))
    stock_cos, stock_sin = (composed(t, rope) for t in rope(torch.zeros(1), ids[:, None]))
    assert torch.equal(cos, stock_cos[0]) and torch.equal(sin, stock_sin[0]), "bit for bit"
    torch.testing.assert_close(rotate(case["q"], cos, sin), case["q_rot"], rtol=0, atol=3e-4)


def test_row_map():
    rotary = Rotary.of(module([16, 24, 24], 1e6, "contiguous"))
    row = (rotary.axis * 8 + rotary.slot(8)).tolist()
    expected = {0: 0, 1: 0, 14: 7, 15: 7, 16: 8, 18: 8, 37: 15, 39: 15, 40: 16, 42: 16, 61: 23, 63: 23}
    assert {f: row[f] for f in expected} == expected and rotary.slots == 8
    rotary = Rotary.of(module([24, 20, 20], 5e6, "interleaved"))
    row = (rotary.axis * 4 + rotary.slot(4)).tolist()
    assert (row[0], row[1], row[2], row[63]) == (0, 4, 8, 3) and rotary.slots == 4
    assert Rotary.of(module([64], 1e6, "1d")).slots == 8
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=rf"between 1 and 16 positions .*\[16, 24, 24\], got {wrong}"):
            Rotary.of(module([16, 24, 24], 1e6, "contiguous")).slot(wrong)


@pytest.mark.parametrize(
    "kind, sections, P", [("contiguous", [16, 24, 24], 5), ("interleaved", [24, 20, 20], 4), ("1d", [32], 8)]
)
def test_a_common_shift_changes_no_score(kind, sections, P):
    rope, g = module(sections, 1e4, kind), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (6, P, 3), generator=g)
    q, k = torch.randn(2, 6, 2 * sum(sections), generator=g)
    score = rotate(q, *turned(rope, ids)) @ rotate(k, *turned(rope, ids.flip(0))).T
    shifted = rotate(q, *turned(rope, ids + 9)) @ rotate(k, *turned(rope, ids.flip(0) + 9)).T
    torch.testing.assert_close(score, shifted, rtol=0, atol=2e-4)
    assert (score - rotate(q, *turned(rope, ids.roll(1, 1))) @ rotate(k, *turned(rope, ids.flip(0))).T).abs().max() > 0.1


def test_frequencies_follow_the_longest_original_id():
    """Dynamic scaling looks at the length of the prompt as it came, not at what the merged tokens carry."""
    rope = module([32], 1e4, "1d", rope_type="dynamic", factor=4.0)
    rope.max_seq_len_cached = rope.original_max_seq_len = 16
    ids = torch.randint(0, 10, (5, 1, 1)).expand(-1, 4, 3)
    cos, _ = turned(rope, ids, longest=50)
    expected, _ = rope(torch.zeros(1), torch.arange(51)[None])
    assert torch.equal(cos, expected[0, ids[:, 0, 0]])


# whole models

STAGES = {
    "dpc_knn": lambda: create("position_merge", num_positions=2),
    "tome": lambda: create("position_merge", merger="tome", keep_ratio=0.3, num_positions=2, fill="spread"),
    "pooling": lambda: create("position_merge", merger="pooling", keep_ratio=0.25, num_positions=2, member_order="index_desc"),
    "kmeans": lambda: create("position_merge", merger="kmeans", keep_ratio=0.3, num_positions=2, fill="first"),
    "auto": lambda: create("position_merge", keep_ratio=0.2),
    "layer": lambda: create("position_merge", num_positions=2, layer=1),
    "inherit": lambda: (
        create("position_merge", keep_ratio=0.7, num_positions=2, layer=1)
        | create("position_merge", keep_ratio=0.6, num_positions=2, cascade="inherit", layer=2)
    ),
    "three": lambda: (
        create("position_merge", keep_ratio=0.7, num_positions=2)
        | create("position_merge", keep_ratio=0.6, num_positions=2, layer=1)
        | create("position_merge", keep_ratio=0.6, num_positions=2, layer=3)
    ),
    "then_pruned": lambda: create("position_merge", keep_ratio=0.7, num_positions=2) | Direction(keep_ratio=0.5, layer=2),
    "layer_then_pruned": lambda: (
        create("position_merge", keep_ratio=0.7, num_positions=2, layer=1) | Direction(keep_ratio=0.5, layer=3)
    ),
    "then_plain": lambda: create("position_merge", num_positions=2) | create("dpc_knn", keep_ratio=0.5),
    "pruned_before": lambda: Direction(keep_ratio=0.8) | create("position_merge", num_positions=2, layer=2),
}


@families
@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_forward_and_generate(tiny, family, name):
    """A left-padded batch of several shapes against the hand-written forward: each frequency has its own id."""
    model, stages, inputs = tiny(family), STAGES[name](), tiny_inputs(family, ROWS)
    with stages(model):
        logits, out = model(**inputs).logits, generate(model, inputs)
    check_forward(model, family, inputs, logits, stages.stages)
    check_generated(model, family, out, inputs["input_ids"].shape[1], stages.stages)


@families
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("wrong", ["slots", "positions", "decode"])
@torch.no_grad()
def test_negative_control(tiny, family, layer, wrong):
    """The comparison fails when a token is turned by its first position only, or decoding goes on from another position."""
    model, stage, inputs = tiny(family), create("position_merge", num_positions=2, layer=layer), tiny_inputs(family, ROWS)
    with stage(model):
        out = generate(model, inputs)
    for r in range(ROWS - 1):
        sample = alone(family, r)
        new = out.sequences[r, inputs["input_ids"].shape[1] :].tolist()
        n = sample["input_ids"].shape[1] - 1
        broken = reference(model, sample, [stage], new[:-1], wrong=wrong).logits[n:]
        with pytest.raises(AssertionError, match="largest difference"):
            assert_close(torch.stack([step[r] for step in out.logits]), broken, 1e-3)


@families
@pytest.mark.parametrize("merger", ["dpc_knn", "tome", "pooling", "kmeans"])
@pytest.mark.parametrize("layer", [None, 2])
@torch.no_grad()
def test_one_position_is_plain_merging(tiny, family, merger, layer):
    """Bit for bit, and two positions are something else."""
    model, inputs = tiny(family), tiny_inputs(family, ROWS)
    results = []
    for compressor in (
        create(merger, keep_ratio=0.4, layer=layer),
        create("position_merge", merger=merger, keep_ratio=0.4, layer=layer, num_positions=1),
        create("position_merge", merger=merger, keep_ratio=0.4, layer=layer, num_positions=2),
    ):
        with compressor(model):
            results.append((model(**inputs).logits, torch.stack(generate(model, inputs).logits)))
    (plain, plain_steps), (one, one_steps), (two, two_steps) = results
    assert torch.equal(plain, one) and torch.equal(plain_steps, one_steps)
    assert (two - one).abs().max() > 1e-3 and (two_steps - one_steps).abs().max() > 1e-4


class Shuffled(type(create("position_merge"))):
    """The same merging, every token with the positions of another."""

    def compress(self, tokens):
        out = super().compress(tokens)
        return Reduction(**{**vars(out), "positions": out.positions.roll(1, 1)})


@families
@torch.no_grad()
def test_positions_matter(family):
    """With weights that make attention sharp, other ids of the same tokens change the logits by more than 0.1."""
    model, inputs = tiny_model(family, gain=1.5), tiny_inputs(family, ROWS)
    logits = []
    for stage in (create("position_merge", num_positions=2), Shuffled(num_positions=2)):
        with stage(model):
            logits.append(model(**inputs).logits)
    for r in range(ROWS - 1):
        assert (logits[0] - logits[1])[r][real(inputs, r)].abs().max() > 0.1


@families
@torch.no_grad()
def test_text_is_turned_as_ever(tiny, family):
    """cos and sin of words and padding are the stock model's, bit for bit; those of merged tokens are not."""
    model, inputs = tiny(family), tiny_inputs(family, ROWS)
    layer, seen = text_model(model).layers[0], []
    original = layer.forward

    def forward(*args, **kwargs):
        seen.append(kwargs["position_embeddings"])
        return original(*args, **kwargs)

    layer.forward = forward
    try:
        for P in (1, 2):
            with create("position_merge", num_positions=P)(model) as run:
                model(**inputs)
    finally:
        del layer.forward
    merged = torch.zeros(seen[0][0].shape[-3:-1], dtype=torch.bool)
    for item in run.items:
        merged[item.sample, item.columns] = True
    for one, two in zip(*seen, strict=True):
        for a, b in zip(one.view(-1, *one.shape[-3:]), two.view(-1, *two.shape[-3:]), strict=True):  # 5.16: one table an axis
            assert torch.equal(a[~merged], b[~merged]) and not torch.equal(a[merged], b[merged])


@torch.no_grad()
def test_official_clips():
    """Steps of a clip merge apart, outputs stand by score; what a token is turned by does not depend on where it stands."""
    model = tiny_model("qwen2_5_vl")
    inputs = tiny_inputs("qwen2_5_vl", 1, items=[[2, 4]])  # two clips
    stage = create("position_merge", num_positions=1, mode="official")
    with stage(model) as run:
        model(**inputs)
        clips = [(item.layout.grid, len(item.columns), item.signals["positions"][:, 0]) for item in run.items]
    for (t, h, w), kept, ids in clips:
        assert kept == t * -(-h * w * 9 // 20)
        assert ids[:, 0].unique(return_counts=True)[1].tolist() == [kept // t] * t


def test_refusals(tiny):
    with pytest.raises(ValueError, match=r"num_positions must be at most .*\[2, 3, 3\], got 3"):
        mmcompress.compress_(tiny("qwen2_5_vl"), create("position_merge", num_positions=3))
    with pytest.raises(ValueError, match=r"num_positions must divide .*\[2, 3, 3\].*, got 2"):
        mmcompress.compress_(tiny("qwen2_5_vl"), create("position_merge", num_positions=2, mode="official"))

    class Unasked(Direction):
        def compress(self, tokens):
            out = super().compress(tokens)
            return Reduction(**{**vars(out), "positions": tokens.position[:, : out.num_kept, None]})

    with pytest.raises(ValueError, match="Unasked must read the signal 'positions'"), Unasked()(tiny("llava")):
        tiny("llava")(**tiny_inputs("llava"))


def test_oracle_of_axes():
    """The axes that the tests write down are those that the modules of transformers turn by."""
    for kind, sections in (("contiguous", [2, 3, 3]), ("interleaved", [4, 3, 2]), ("1d", [8])):
        rope = module(sections, 1e4, kind)
        by_hand = frequencies_of_axes(rope.config)
        axis = Rotary.of(rope).axis
        assert [(axis == a).nonzero()[:, 0].tolist() for a in range(len(by_hand))] == by_hand
