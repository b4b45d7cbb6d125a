import itertools

import pytest
import torch

from mmcompress import create
from mmcompress.tokens import Tokens


def anchors(N, keep_ratio):
    return create("uniform_keep", keep_ratio=keep_ratio)(Tokens.of(torch.zeros(1, N, 2))).anchor[0].tolist()


def test_by_hand():
    assert anchors(8, 0.25) == [2, 6]
    assert anchors(8, 0.375) == [1, 4, 6]
    assert anchors(7, 0.01) == [3]


@pytest.mark.parametrize("N", [1, 2, 5, 64, 577, 2880])
def test_gaps_differ_by_at_most_one(N):
    for ratio in (0.01, 0.1, 0.3, 0.5, 0.77, 0.99):
        columns = anchors(N, ratio)
        gaps = {b - a for a, b in itertools.pairwise(columns)}
        assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
        assert abs(columns[0] - (N - 1 - columns[-1])) <= 1  # the margins are equal
