"""Golden values: tests/golden/todre_dev.npz (our reference; with first="maxmin" index for index what vbdi/divprune @ 799e2d9
returns)."""

import itertools

import pytest
import torch

from mmcompress import create
from mmcompress.tokens import Layout, Tokens


def kept(x, K, **fields):
    tokens = Tokens.of(x) if isinstance(x, torch.Tensor) else x
    method = create("k_center", keep_ratio=K / tokens.num_tokens, **fields)
    out = method(tokens)
    assert out.num_kept == K
    return out.anchor[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_golden(golden, dtype):
    for case in golden("todre", "diversity"):
        x, k = case["x"].to(dtype), case["k"]
        for length in (1, k // 2, k):
            assert kept(x, length, first=case["first"]) == sorted(case["seq_kcenter"][:length].tolist())
        if "seq_maxmin" in case:
            assert kept(x, k, first="maxmin") == sorted(case["seq_maxmin"].tolist())
            assert kept(x, 1, first="maxmin") == [int(case["first_maxmin"])]
            assert kept(x, 1, first="center") == kept(x, 1) == [int(case["pivot_center"])]
            assert kept(x, 1, first="farthest") == [int(case["pivot_farthest"])]
        x = x.float()
        similarity = torch.cosine_similarity(x[:, None], x[case["seq_kcenter"]][None], dim=-1)
        assert abs(float((1 - similarity.amax(1)).max()) - float(case["radius_kcenter"])) < 1e-5


def test_six_clusters_on_a_half_circle():
    angle = torch.linspace(0, torch.pi, 6).repeat_interleave(3) + torch.tensor([-0.01, 0, 0.01]).repeat(6)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    assert sorted(c // 3 for c in kept(x, 6, first=0)) == [0, 1, 2, 3, 4, 5]


def test_radius_is_at_most_twice_the_best():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randn(9, 2, generator=generator)
        distance = torch.cdist(x, x)
        best = min(distance[:, list(c)].amin(1).max() for c in itertools.combinations(range(9), 3))
        assert distance[:, kept(x, 3, metric="sqeuclidean")].amin(1).max() <= 2 * best + 1e-6


def test_equal_and_zero_tokens():
    assert kept(torch.ones(10, 4), 3, first=3) == [0, 1, 3]
    assert kept(torch.zeros(5, 4), 2) == [0, 1]


def test_scale_of_a_token_does_not_matter():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    assert kept(x * (0.1 + torch.arange(40)[:, None]), 9, first=4) == kept(x, 9, first=4)


def test_first_cls_stays_within_the_thumbnail():
    logits = torch.tensor([[0.0, 3, 1, 2, 9, 8, 7, 6]])
    x = torch.randn(8, 4)
    tokens = Tokens.of(x, Layout("image", (1, 4, 2)), cls_logits=logits)
    assert kept(tokens, 1) == kept(tokens, 1, first="cls") == [4]
    anyres = Tokens(
        tokens.x, tokens.position, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]), tokens.size, Layout(crops=(1, 1)), tokens.signals
    )
    assert kept(anyres, 1) == [1]
    with pytest.raises(ValueError, match="first='cls' reads the signal cls_logits, got none"):
        kept(x, 1, first="cls")


def test_declared_signals():
    assert create("k_center", first=3).reads == () and create("k_center", first="cls").reads == ("cls_logits",)
    assert create("k_center").reads == ("cls_logits|",)  # with CLS logits where the model has them


def test_random_first_follows_the_seed():
    x = torch.randn(50, 4)
    picks = {seed: kept(x, 1, first="random", seed=seed) for seed in range(20)}
    assert all(kept(x, 1, first="random", seed=seed) == pick for seed, pick in picks.items())
    assert len({p[0] for p in picks.values()}) > 8


@pytest.mark.parametrize(
    "fields", [{"first": -1}, {"first": "middle"}, {"first": 1.0}, {"first": True}, {"metric": "l1"}, {"seed": -1}]
)
def test_bad_fields(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} must be .*got"):
        create("k_center", **fields)


def test_first_out_of_range():
    with pytest.raises(ValueError, match="0…4, got 5"):
        kept(torch.randn(5, 2), 1, first=5)
    with pytest.raises(ValueError, match="x"):
        kept(torch.full((5, 2), torch.nan), 2)


@pytest.mark.parametrize("name", ["k_center", "max_sum"])
def test_the_order_of_picks_follows_the_outputs(name):
    """Also through a method that drops some of them later."""
    tokens = Tokens.of(torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(2)))
    out = create(name, keep_ratio=0.4, first=7)(tokens)
    fewer = create(name, keep_ratio=0.2, first=7)(tokens)
    for b in range(3):
        order = dict(zip(out.order[b].tolist(), out.anchor[b].tolist(), strict=True))
        assert order[0] == 7 and sorted(order) == list(range(8))
        assert {order[i] for i in range(4)} == set(fewer.anchor[b].tolist())
    later = tokens.take(out).take(create("uniform_keep", keep_ratio=0.5)(tokens.take(out)))
    assert torch.equal(later.signals["order"], out.order[:, create("uniform_keep", keep_ratio=0.5)(tokens.take(out)).anchor[0]])


def test_maxmin_is_the_token_farthest_from_its_nearest():
    """Against the definition, in float64 on the whole matrix of cosines."""
    for seed, (B, N, D) in enumerate(((3, 60, 8), (2, 300, 33), (1, 2, 4), (2, 1, 4))):
        x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed))
        x[:, N // 2 :] = x[:, : N - N // 2] + 0.1 * x[:, N // 2 :]
        unit = torch.nn.functional.normalize(x.double(), dim=-1)
        cosine = unit @ unit.mT
        cosine.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        out = create("k_center", keep_ratio=1 / (N + 1), first="maxmin").compress(Tokens.of(x))
        assert out.anchor[:, 0].tolist() == cosine.amax(2).argmin(1).tolist()
    same = create("k_center", keep_ratio=0.5, first="maxmin")(Tokens.of(torch.ones(2, 6, 3)))
    assert same.anchor.tolist() == [[0, 1, 2]] * 2  # ties: the lowest columns
