import pytest
import torch

from mmcompress import create
from mmcompress.tokens import Tokens


def anchors(N, seed=0, B=1, **fields):
    return create("random_keep", seed=seed, **fields)(Tokens.of(torch.randn(B, N, 2))).anchor


def test_same_pattern_alone_in_a_batch_and_again():
    alone = anchors(100)
    assert torch.equal(anchors(100, B=3), alone.expand(3, -1))
    before = torch.get_rng_state()
    assert torch.equal(anchors(100), alone)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(anchors(100), alone)  # the global generator plays no part …
    torch.set_rng_state(before)
    create("random_keep")(Tokens.of(torch.zeros(1, 9, 2)))
    assert torch.equal(torch.get_rng_state(), before) and state is not before  # … and is left alone


def test_every_column_is_kept_about_equally_often():
    kept = torch.stack([torch.bincount(anchors(20, seed)[0], minlength=20) for seed in range(400)]).sum(0)
    assert kept.sum() == 400 * 5 and (kept - 100).abs().max() < 45  # binomial, five standard deviations


def test_seeds_differ():
    assert not torch.equal(anchors(100, 0), anchors(100, 1))


@pytest.mark.parametrize("seed", [-1, 0.5, "0", True, 2**63])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in .* got"):
        create("random_keep", seed=seed)
