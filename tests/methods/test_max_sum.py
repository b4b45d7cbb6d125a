"""Golden values: tests/golden/todre_dev.npz (our reference: no code was released)."""

import pytest
import torch

from mmcompress import create
from mmcompress.tokens import Tokens


def kept(x, K, **fields):
    return create("max_sum", keep_ratio=K / len(x), **fields)(Tokens.of(x)).anchor[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_golden(golden, dtype):
    for case in golden("todre", "diversity"):
        x, k = case["x"].to(dtype), case["k"]
        for length in (1, k // 2, k):
            assert kept(x, length, first=case["first"]) == sorted(case["seq_maxsum"][:length].tolist())
        x = x.float()
        similarity = torch.cosine_similarity(x[:, None], x[case["seq_maxsum"]][None], dim=-1)
        assert abs(float((1 - similarity.amax(1)).max()) - float(case["radius_maxsum"])) < 1e-5


def test_against_the_similarity_matrix():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
        similarity = torch.cosine_similarity(x[:, None], x[None], dim=-1)
        picks = [2]
        while len(picks) < 5:
            rest = [v for v in range(12) if v not in picks]
            picks.append(min(rest, key=lambda v: (float(similarity[v, picks].sum()), v)))
        assert kept(x.float(), 5, first=2) == sorted(picks)


def test_of_clusters_on_an_arc_it_takes_the_ends():
    angle = torch.linspace(0, 0.9 * torch.pi, 6).repeat_interleave(3) + torch.tensor([-0.01, 0, 0.01]).repeat(6)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    assert {c // 3 for c in kept(x, 6, first=0)} == {0, 5}


def test_first_picks_and_their_signals():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    for first in ("center", "farthest", "maxmin", "random"):
        assert kept(x, 1, first=first) == create("k_center", keep_ratio=0.01, first=first)(Tokens.of(x)).anchor[0].tolist()
    assert create("max_sum").reads == ("cls_logits|",)
    with pytest.raises(ValueError, match="max_sum has no field 'metric'"):
        create("max_sum", metric="cosine")
