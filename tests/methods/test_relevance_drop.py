"""Golden values: tests/golden/todre_dev.npz, kind relevance (our reference: no code was released)."""

import pytest
import torch

from mmcompress import create
from mmcompress.ops.relevance import relevance
from mmcompress.tokens import Tokens


def columns(ids, M):
    mask = torch.zeros(M, dtype=torch.bool)
    mask[ids.long()] = True
    return mask[None]


def shares(case):
    M = case["k"].shape[1]
    return relevance(case["q"][None], case["k"][None], *(columns(case[s], M) for s in "VTS"), scaling=case["scaling"])


def tokens_with(share, N=6):
    B = len(share)
    x = torch.randn(B, N, 4, generator=torch.Generator().manual_seed(0))
    return Tokens.of(x, relevance=torch.as_tensor(share)[:, None].expand(B, N, 2))


def test_golden(golden):
    cases = golden("todre", "relevance")
    assert {c["drop"] for c in cases} == {True, False}
    for case in cases:
        share = shares(case)
        expected = torch.tensor([[case["alpha_t2v"], case["alpha_v2t"]]])
        torch.testing.assert_close(share, expected, rtol=0, atol=1e-5)
        out = create("relevance_drop", threshold=case["tau"])(tokens_with(share))
        assert (out.num_kept == 0) == case["drop"]


def by_hand(q, k, visual, text, before, scaling):
    """Both shares from the full attention matrix, one head after the other."""
    real = visual | text | before
    M, heads = k.shape[1], q.shape[0]
    attention = torch.zeros(M, M)
    for h in range(heads):
        score = q[h] @ k[h // (heads // k.shape[0])].T * scaling
        score[torch.ones(M, M).triu(1).bool() | ~real[None]] = -torch.inf
        attention += score.softmax(-1).nan_to_num() / heads
    share = lambda a, b: float(attention[a][:, b].sum() / attention[a][:, real].sum()) if a.any() else 0.0  # noqa: E731
    return torch.tensor([share(text, visual), share(visual, text)])


def test_orders_padding_and_grouped_heads():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 20, 8, generator=generator), torch.randn(2, 2, 20, 8, generator=generator)
    kind = torch.tensor([[0] * 2 + [1] * 2 + [2] * 4 + [3] * 4 + [2] * 3 + [3] * 5, [1] * 3 + [2] * 8 + [3] * 9])
    visual, text, before = kind == 2, kind == 3, kind == 1
    out = relevance(q, k, visual, text, before, 0.3)
    for b in range(2):
        torch.testing.assert_close(out[b], by_hand(q[b], k[b], visual[b], text[b], before[b], 0.3))
        alone = relevance(q[b : b + 1], k[b : b + 1], visual[b : b + 1], text[b : b + 1], before[b : b + 1], 0.3)
        torch.testing.assert_close(alone[0], out[b])
    assert out[1, 1] == 0 < out[0, 1]  # text after the picture: the causal mask leaves nothing
    last = relevance(q[:, :, 8:], k, visual, text & (torch.arange(20) >= 8), before, 0.3)  # the query rows are the last columns
    torch.testing.assert_close(last[1, 0], out[1, 0])


def test_empty_sets():
    q = k = torch.randn(1, 2, 5, 4)
    nothing, all_of_it = torch.zeros(1, 5, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    assert relevance(q, k, all_of_it, nothing, nothing, 1.0).tolist() == [[1, 1]]  # nothing is dropped
    assert relevance(q, k, nothing, all_of_it, nothing, 1.0).tolist() == [[0, 0]]


def test_samples_decide_for_themselves():
    tokens = tokens_with([[0.05, 0.0], [0.2, 0.0], [0.05, 0.3], [0.1, 0.0]])
    out = create("relevance_drop")(tokens)
    assert out.mask.sum(1).tolist() == [0, 6, 6, 6]  # the threshold itself is relevant
    assert out.assignment[0].tolist() == [-1] * 6 and torch.equal(out.x[1], tokens.x[1])
    assert create("relevance_drop")(tokens_with([[0.05, 0.0]])).num_kept == 0
    assert create("relevance_drop")(tokens_with([[0.5, 0.0]])).mask is None


def test_placement():
    method = create("relevance_drop")
    assert (method.placement, method.layer, method.reads) == ("layer", 7 / 8, ("relevance",))
    assert create("relevance_drop", threshold=0).is_identity and create("relevance_drop", threshold=0, keep_ratio=1).is_identity
    for ratio in (0.1, 1):  # at 1 it would be no identity
        with pytest.raises(ValueError, match=f"keep_ratio has no effect on relevance_drop and must be left out, got {ratio}"):
            create("relevance_drop", keep_ratio=ratio)
    for layer in (None, 0):
        with pytest.raises(ValueError, match=rf"layer of relevance_drop must be .* got {layer}"):
            create("relevance_drop", layer=layer)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, "0.1", float("nan"), None])
def test_bad_threshold(threshold):
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got"):
        create("relevance_drop", threshold=threshold)


def test_bad_signals():
    with pytest.raises(ValueError, match=r"reads the signal relevance .* got none"):
        create("relevance_drop")(Tokens.of(torch.randn(4, 2)))
    with pytest.raises(ValueError, match="finite"):
        create("relevance_drop")(tokens_with([[torch.nan, 0.0]]))
    with pytest.raises(ValueError, match=r"masks \[B, M\]"):
        mask = torch.ones(1, 4, dtype=torch.bool)
        relevance(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), mask, mask, mask, 1.0)
