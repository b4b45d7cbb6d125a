"""Golden values: tests/golden/vidcom2_dev.npz, official arrays computed by xuyang-liu16/VidCom2 @ 944a17d."""

import math

import pytest
import torch

from mmcompress import create
from mmcompress.methods.vidcom2 import cosine_scores, fill_empty, frame_ratios, gaussian_scores, official_emission
from mmcompress.tokens import Layout, Tokens


def video(x, T):
    x = x if x.dim() == 3 else x[None]
    return Tokens.of(x, Layout("video", (T, 1, x.shape[1] // T)))


def frames(case):
    return case["x"].float().view(1, case["T"], case["M"], case["D"])


def per_frame(anchor, T, M):
    return [[int(a) % M for a in anchor if int(a) // M == t] for t in range(T)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_golden_corrected(golden, dtype):
    for case in golden("vidcom2", "select"):
        tokens = video(case["x"].to(dtype), case["T"])
        for scorer, prefix in (("gaussian", ""), ("cosine", "cos_")):
            out = create("vidcom2", keep_ratio=case["R"], scorer=scorer)(tokens)
            assert torch.equal(out.anchor[0], case[f"{prefix}keep"].long()), (case["id"], scorer)
            counts = torch.bincount(out.anchor[0] // case["M"], minlength=case["T"])
            assert counts.tolist() == case[f"{prefix}keep_counts"].tolist()
        g = case["grid"]
        if g:  # the same tokens in the sequence with newlines, all of which stay
            out = create("vidcom2", keep_ratio=case["R"])(tokens)
            newline = torch.arange(case["T"] * case["M"] // g) * (g + 1) + g
            place = torch.cat([out.anchor[0] // g * (g + 1) + out.anchor[0] % g, newline]).sort().values
            assert torch.equal(place, case["flat_keep"].long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_golden_official(golden, dtype):
    for case in golden("vidcom2", "select"):
        out = create("vidcom2", keep_ratio=case["R"], mode="official")(video(case["x"].to(dtype), case["T"]))
        kept = per_frame(out.anchor[0], case["T"], case["M"])
        assert [len(k) for k in kept] == case["counts"].tolist()
        assert [i for k in kept for i in k] == case["idx"].tolist()
        assert official_emission(kept, case["M"], case["grid"]) == case["emit_official"].tolist()


def test_golden_scores(golden):
    for case in golden("vidcom2", "select"):
        v, f = gaussian_scores(frames(case), 0.5)
        if "video_score" in case:
            torch.testing.assert_close(v[0], case["video_score"], rtol=0, atol=2e-5)
            torch.testing.assert_close(f[0], case["frame_score"], rtol=0, atol=2e-5)
        ratios = frame_ratios(v, 0.01, case["R"])[0].clamp(max=1)
        torch.testing.assert_close(ratios.float(), case["scales"], rtol=0, atol=1e-4)
        ratios = frame_ratios(cosine_scores(frames(case))[0], 0.01, case["R"])[0]
        torch.testing.assert_close(ratios.float().clamp(max=1), case["cos_scales"].clamp(max=1), rtol=0, atol=2e-4)


def test_closed_forms():
    at_center = torch.tensor([[[[1.0, 0]]]])
    assert gaussian_scores(at_center, 1.0)[0].item() == 5
    antipodal = torch.tensor([[[[1.0, 0], [-1, 0]]]])
    expected = sum(math.exp(-1 / (2 * 2**e)) for e in range(-3, 2))
    assert round(expected, 5) == 1.90686
    for score in gaussian_scores(antipodal, 1.0):
        torch.testing.assert_close(score, torch.full((1, 1, 2), expected))
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert create("vidcom2")(video(x, 1)).num_kept == 13
    assert create("vidcom2", mode="official")(video(x, 1)).num_kept == 12  # 12.5 to even


def test_a_frame_that_differs_gets_more():
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(1, 16, 12, generator=generator).repeat(6, 1, 1)
    still[4] = torch.randn(16, 12, generator=generator)
    counts = torch.bincount(create("vidcom2", temperature=0.05)(video(still.reshape(96, 12), 6)).anchor[0] // 16, minlength=6)
    assert counts.argmax() == 4 and counts[4] > counts[[0, 1, 2, 3, 5]].max()


def test_invariants():
    x = torch.randn(5, 9, 8, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 0, 4, 1, 2])
    kept = lambda x, **f: per_frame(create("vidcom2", **f)(video(x.reshape(45, 8), 5)).anchor[0], 5, 9)  # noqa: E731
    for scorer in ("gaussian", "cosine"):
        base = kept(x, scorer=scorer, mode="official")
        assert kept(x[order], scorer=scorer, mode="official") == [base[t] for t in order]
        assert kept(x * 8, scorer=scorer) == kept(x, scorer=scorer)
    still = [len(k) for k in kept(x[:1].repeat(5, 1, 1))]
    assert max(still) - min(still) <= 1 and sum(still) == 11


def test_no_frame_is_left_empty_where_the_budget_allows():
    assert fill_empty(torch.tensor([[0, 5, 0, 5], [1, 1, 1, 1], [0, 0, 4, 0]])).tolist() == [[1, 4, 1, 4], [1] * 4, [1] * 4]
    x = torch.zeros(8, 4, 6)
    x[3] = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 9
    for ratio, empty in ((0.25, 0), (0.125, 4)):
        counts = torch.bincount(create("vidcom2", keep_ratio=ratio)(video(x.view(32, 6), 8)).anchor[0] // 4, minlength=8)
        assert counts.sum() == 32 * ratio and int((counts == 0).sum()) >= empty
        assert empty or counts.min() == 1


def test_edge_cases():
    assert create("vidcom2")(video(torch.randn(12, 1), 3)).num_kept == 3  # one channel: none would be half of it
    assert create("vidcom2", keep_ratio=0.5)(video(torch.randn(6, 4), 6)).num_kept == 3  # one token a frame
    assert create("vidcom2")(video(torch.ones(8, 4), 2)).anchor.tolist() == [[0, 4]]


def test_images_pass_untouched():
    tokens = Tokens.of(torch.randn(1, 16, 4), Layout("image", (1, 4, 4)))
    assert create("vidcom2")(tokens).x is tokens.x


@pytest.mark.parametrize("fields", [{"scorer": "dot"}, {"mode": "x"}, {"temperature": 0}, {"channel_ratio": 0}])
def test_bad_fields(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"{name} must be .*got"):
        create("vidcom2", **fields)


def test_bad_inputs():
    x = torch.randn(1, 12, 4)
    with pytest.raises(ValueError, match="12 tokens in 5 frames"):
        create("vidcom2")(Tokens.of(x, Layout("video", (5, 2, 2))))
    tokens = video(x, 3)
    with pytest.raises(ValueError, match="groups of other sizes"):
        create("vidcom2")(Tokens(x, tokens.position, tokens.group.flip(1), tokens.size, tokens.layout))
    with pytest.raises(ValueError, match="must be finite"):
        create("vidcom2")(video(x * torch.nan, 3))
