"""Golden values: tests/golden/global_guided_dev.npz, official arrays computed by xuyang-liu16/GlobalCom2 @ 96b2d00."""

import pytest
import torch

from mmcompress import create
from mmcompress.methods.global_guided import centroid_scores, crop_ratios, official_emission, unpadded_box
from mmcompress.models.signals import cls_logits
from mmcompress.ops.apportion import apportion
from mmcompress.tokens import Layout, Tokens

INPUTS = ("thumb_scores", "crop_scores")


def anyres(case, thumb=None, crops=None, box=None):
    """The Tokens of a golden case: thumbnail raster, then the unpadded canvas raster; x is the column number."""
    s, rows, columns = case["side"], case["gh"], case["gw"]
    layout = Layout("image", (1, rows * s, columns * s), (rows, columns), s, (case["h0"], case["w0"]))
    top, bottom, left, right = case["unpad_box"].tolist() if box is None else box
    h, w = torch.meshgrid(torch.arange(top, bottom), torch.arange(left, right), indexing="ij")
    h, w = h.flatten(), w.flatten()
    group = 1 + h // s * columns + w // s
    thumb, crops = (case[k] if v is None else v for k, v in zip(INPUTS, (thumb, crops), strict=True))
    own = crops.view(-1, s, s)[group - 1, h % s, w % s]
    raster = torch.arange(s * s)
    position = torch.cat([torch.stack([raster * 0, raster // s, raster % s], 1), torch.stack([h * 0, h, w], 1)])
    group = torch.cat([raster * 0, group])
    x = torch.arange(len(group)).float()[None, :, None]
    logits = torch.cat([thumb.flatten(), own])[None]
    return Tokens(x, position[None], group[None], torch.ones(1, len(group)), layout, {"cls_logits": logits})


def selects(golden):
    return golden("global_guided", "select")


def test_golden_corrected(golden):
    for case in selects(golden):
        tokens = anyres(case)
        out = create("global_guided", keep_ratio=case["R"], temperature=case["tau"])(tokens)
        assert torch.equal(out.anchor[0], case["token_keep"].long()), case["id"]
        counts = torch.bincount(tokens.group[0].gather(0, out.anchor[0]), minlength=1 + case["gw"] * case["gh"])
        assert counts.tolist() == case["keep_counts"].tolist()
        # the same columns in the sequence of transformers' LLaVA-NeXT, which has a newline after every canvas row
        row_length = case["unpad_box"][3] - case["unpad_box"][2]
        s2 = case["side"] ** 2
        place = torch.where(out.anchor[0] < s2, out.anchor[0], out.anchor[0] + (out.anchor[0] - s2) // row_length)
        newline = torch.arange(s2 + row_length, int(case["packed_len"]), row_length + 1)
        assert torch.equal(torch.cat([place, newline]).sort().values, case["packed_keep"].long())


def test_golden_official(golden):
    for case in (c for c in selects(golden) if c["official"]):
        tokens, s = anyres(case), case["side"]
        method = create("global_guided", keep_ratio=case["R"], temperature=case["tau"], mode="official")
        ratios = crop_ratios(case["thumb_scores"][None], (case["gh"], case["gw"]), case["tau"], case["R"])
        torch.testing.assert_close(ratios[0].clamp(max=1), case["scales"], rtol=0, atol=1e-6)
        out = method(tokens)
        assert out.mask is None
        kept = out.anchor[0]
        assert torch.equal(kept[kept < s * s], case["thumb_ids"].long().sort().values)
        group, (h, w) = tokens.group[0, kept] - 1, tokens.position[0, kept, 1:].T
        cell = h % s * s + w % s
        crops = [cell[group == j].sort().values.tolist() for j in range(case["gh"] * case["gw"])]
        assert [len(c) for c in crops] == case["crop_counts"].tolist()
        assert [c for crop in crops for c in crop] == case["crop_ids"].tolist()
        top, bottom, left, right = case["unpad_box"].tolist()
        box = unpadded_box(tokens.layout, tokens.num_tokens - s * s)
        assert box == (top, left, bottom - top, right - left)
        assert official_emission(crops, (case["gh"], case["gw"]), s, box) == case["emit_official"].tolist()


def test_golden_without_cls(golden):
    for case in golden("global_guided", "nocls"):
        x = case["x"].float()[None]
        torch.testing.assert_close(
            centroid_scores(x, torch.zeros(x.shape[:2], dtype=torch.long), 1)[0].double(), case["scores"], rtol=0, atol=2e-6
        )


def test_golden_cls_logits(golden):
    for case in golden("global_guided", "score"):
        x, heads = case["x"], case["heads"]
        q, k = (x @ case[f"w{n}"].T + case[f"b{n}"] for n in "qk")
        q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
        logits = cls_logits(q, k, 1).view(len(x), -1)  # the seam's signal
        torch.testing.assert_close(logits, case["cls_scores"], rtol=0, atol=2e-5)


def test_golden_allocate(golden):
    for case in golden("global_guided", "allocate"):
        assert apportion(case["target"], case["cap"], case["K"]).tolist() == case["counts"].tolist()
    assert apportion(torch.tensor([3.0, 1, 1]), torch.tensor([10] * 3), 7).tolist() == [4, 2, 1]
    assert apportion(torch.tensor([50.0, 1, 1, 1]), torch.tensor([20] * 4), 44).tolist() == [20, 8, 8, 8]


def test_apportion_is_exact_and_monotone():
    generator = torch.Generator().manual_seed(0)
    cap = torch.randint(0, 40, (300, 6), generator=generator)
    target = torch.rand(300, 6, generator=generator) * (torch.rand(300, 6, generator=generator) > 0.3)
    total = (cap.sum(1) * torch.rand(300, generator=generator)).long()
    counts = apportion(target, cap, total)
    assert torch.equal(counts.sum(1), total) and (counts <= cap).all() and (counts >= 0).all()
    more, less = target[:, :, None] > target[:, None], counts[:, :, None] < counts[:, None] - 1
    assert not (more & less & (counts < cap)[:, :, None]).any()  # a larger target below its cap never gets clearly less


def square(s=24, crops=(1, 1), size=None):
    return {"side": s, "gh": crops[0], "gw": crops[1], "h0": (size or crops)[0] * 100, "w0": (size or crops)[1] * 100}


def test_constant_logits_share_evenly():
    ratios = crop_ratios(torch.full((1, 576), 3.0), (2, 2), 10.0, 0.25)
    torch.testing.assert_close(ratios, torch.full((1, 4), 0.25, dtype=torch.float64), rtol=0, atol=1e-8)
    case = square(4, (2, 2))
    tokens = anyres(case, torch.ones(16), torch.ones(4, 16), (0, 8, 0, 8))
    out = create("global_guided")(tokens)
    assert tokens.position[0, out.anchor[0]].tolist()[:4] == [[0, 0, c] for c in range(4)]  # lowest indices
    assert tokens.group[0, out.anchor[0]].bincount().tolist() == [4] * 5


def test_closed_form_upper_half():
    thumb = torch.zeros(24, 24)
    thumb[:12] = 5
    ratios = crop_ratios(thumb.view(1, -1), (2, 1), 10.0, 0.8)  # two crops, one above the other
    torch.testing.assert_close(ratios[0], torch.tensor([1.2, 0.4], dtype=torch.float64))
    case = square(24, (2, 1))
    tokens = anyres(case, thumb, torch.randn(2, 576, generator=torch.Generator().manual_seed(0)), (0, 48, 0, 24))
    out = create("global_guided", keep_ratio=0.8)(tokens)
    assert tokens.group[0, out.anchor[0]].bincount().tolist() == [461, 576, 345]


def random_case(seed=0, s=6, crops=(2, 3)):
    generator = torch.Generator().manual_seed(seed)
    case = square(s, crops)
    thumb, own = (torch.randn(n, s * s, generator=generator) for n in (1, crops[0] * crops[1]))
    return case, thumb, own, (0, crops[0] * s, 0, crops[1] * s)


def test_invariants():
    case, thumb, own, box = random_case()
    method = create("global_guided", keep_ratio=0.3)
    base = method(anyres(case, thumb, own, box)).anchor
    shifted = crop_ratios(thumb + 7, (2, 3), 10.0, 0.3)
    torch.testing.assert_close(shifted, crop_ratios(thumb, (2, 3), 10.0, 0.3), rtol=0, atol=1e-6)
    scaled = own.clone()
    scaled[2] *= 5.0
    assert torch.equal(method(anyres(case, thumb, scaled, box)).anchor, base)


def test_batch_items_are_independent():
    a, b = (anyres(*random_case(seed)) for seed in (1, 2))

    def batch(*items):
        return Tokens(
            *(torch.cat([getattr(i, f) for i in items]) for f in ("x", "position", "group", "size")),
            items[0].layout,
            {"cls_logits": torch.cat([i.signals["cls_logits"] for i in items])},
        )

    for mode in ("corrected", "official"):
        method = create("global_guided", mode=mode)
        both, swapped = method(batch(a, b)), method(batch(b, a))
        for row, item in enumerate((a, b)):
            alone = method(item).anchor[0]
            for out, at in ((both, row), (swapped, 1 - row)):
                real = slice(None) if out.mask is None else out.mask[at]
                assert torch.equal(out.anchor[at][real], alone)


def test_single_view_keeps_the_largest_logits():
    x = torch.randn(2, 9, 4)
    logits = torch.tensor([[0.0, 5, 1, 1, 9, 2, 3, 0, 0], [9.0, 8, 7, 6, 5, 4, 3, 2, 1]])
    out = create("global_guided", keep_ratio=0.33)(Tokens.of(x, Layout("image", (1, 3, 3)), cls_logits=logits))
    assert out.anchor.tolist() == [[1, 4, 6], [0, 1, 2]]


def test_centroid_scores_are_used_without_cls():
    case, thumb, own, box = random_case()
    tokens = anyres(case, thumb, own, box)
    tower = torch.randn(1, tokens.num_tokens, 8, generator=torch.Generator().manual_seed(3))
    logits = centroid_scores(tower, tokens.group, 7)
    explicit = create("global_guided")(
        Tokens(tokens.x, tokens.position, tokens.group, tokens.size, tokens.layout, {"cls_logits": logits})
    )
    for scores in ("auto", "centroid"):
        signals = {"tower": tower} if scores == "auto" else {"tower": tower, "cls_logits": -logits}
        out = create("global_guided", scores=scores)(
            Tokens(tokens.x, tokens.position, tokens.group, tokens.size, tokens.layout, signals)
        )
        assert torch.equal(out.anchor, explicit.anchor)


def test_clips_pass_untouched():
    tokens = Tokens.of(torch.randn(8, 4), Layout("video", (2, 2, 2)), tower=torch.randn(1, 8, 6))
    assert create("global_guided", keep_ratio=0.25)(tokens).num_kept == 8


def test_empty_crops_get_nothing():
    case = square(4, (2, 2)) | {"h0": 10, "w0": 1000}  # a strip: the canvas shows no full row of it
    box = unpadded_box(Layout("image", (1, 8, 8), (2, 2), 4, (10, 1000)), 0)
    assert box[2] == 0
    out = create("global_guided", keep_ratio=0.5)(anyres(case, torch.randn(16), torch.randn(4, 16), (4, 4, 0, 8)))
    assert out.num_kept == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "paper"}, "mode must be"),
        ({"scores": "softmax"}, "scores must be"),
        ({"temperature": 0}, "temperature must be"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"keep_ratio": 0}, "keep_ratio must be"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        create("global_guided", **fields)


def test_bad_inputs():
    case, thumb, own, box = random_case()
    method = create("global_guided")
    with pytest.raises(ValueError, match="cls_logits must be finite"):
        method(anyres(case, thumb * torch.nan, own, box))
    with pytest.raises(ValueError, match="unpadded canvas, got"):
        method(anyres(case | {"h0": 50}, thumb, own, box))
    with pytest.raises(ValueError, match="reads the signal"):
        method(Tokens.of(torch.randn(4, 3)))
    with pytest.raises(ValueError, match="square"):
        crop_ratios(torch.zeros(1, 10), (1, 2), 10.0, 0.5)
    with pytest.raises(ValueError, match=r"must have shape \[B, N"):
        method(Tokens.of(torch.randn(4, 3), cls_logits=torch.zeros(1, 5)))
