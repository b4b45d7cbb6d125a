"""By hand, and by definition: every token is with the nearest mean, anchors are the most central members."""

import pytest
import torch

from mmcompress import create
from mmcompress.tokens import Tokens


def test_by_hand():
    x = torch.tensor([0.0, 1, 5, 20, 21, 50, 23])[:, None]
    out = create("kmeans", keep_ratio=3 / 7)(Tokens.of(x))
    assert out.assignment.tolist() == [[0, 0, 0, 1, 1, 2, 1]]
    assert out.anchor.tolist() == [[1, 4, 5]]  # means 2, 21⅓, 50
    torch.testing.assert_close(out.x[0, :, 0], torch.tensor([2, 64 / 3, 50]))


def test_definition():
    x = torch.randn(2, 60, 5, generator=torch.Generator().manual_seed(0))
    out = create("kmeans", keep_ratio=0.2, num_iterations=60)(Tokens.of(x))
    for b in range(2):
        distance = torch.cdist(x[b], out.x[b])
        assert torch.equal(distance.argmin(1), out.assignment[b]), "Lloyd's algorithm has come to rest"
        for k, anchor in enumerate(out.anchor[b].tolist()):
            members = (out.assignment[b] == k).nonzero()[:, 0]
            torch.testing.assert_close(out.x[b, k], x[b, members].mean(0))
            assert anchor in members and distance[anchor, k] <= distance[members, k].min() + 1e-5


def test_an_empty_cluster_takes_the_farthest_token():
    """Three kinds of tokens for four clusters: two equal tokens part."""
    x = torch.tensor([0.0, 0, 5, 9, 9])[:, None]
    out = create("kmeans", keep_ratio=0.8)(Tokens.of(x))
    assert out.size.tolist() in ([[1, 1, 1, 2]], [[2, 1, 1, 1]]) and out.x[0, :, 0].unique().tolist() == [0, 5, 9]
    assert create("kmeans", keep_ratio=0.5)(Tokens.of(torch.ones(6, 2))).size.tolist() == [[4, 1, 1]]


def test_seed():
    x = torch.randn(1, 200, 3, generator=torch.Generator().manual_seed(1))
    first, again, other = (create("kmeans", seed=s)(Tokens.of(x)).assignment for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("fields", [{"num_iterations": 0}, {"num_iterations": True}, {"seed": -1}, {"seed": 0.5}])
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=rf"^{next(iter(fields))} must be .*got"):
        create("kmeans", **fields)


def test_of_two_members_the_first_is_the_anchor():
    """Both are as far from their mean, whatever float32 makes of it."""
    generator = torch.Generator().manual_seed(0)
    pairs = (100 * torch.randn(40, 1, 7, generator=generator) + torch.randn(40, 2, 7, generator=generator)).flatten(0, 1)
    out = create("kmeans", keep_ratio=0.5)(Tokens.of(pairs))
    two = out.size[0] == 2
    assert two.sum() > 20
    for k, anchor in enumerate(out.anchor[0].tolist()):
        if two[k]:
            assert anchor == (out.assignment[0] == k).nonzero()[0, 0]
