import torch

from mmcompress import create, list_methods
from mmcompress.tokens import Tokens


def test_nothing_happens():
    assert "none" in list_methods()
    tokens = Tokens.of(torch.randn(2, 9, 4))
    for ratio in (0.1, 1):
        method = create("none", keep_ratio=ratio)
        out = method(tokens)
        assert method.is_identity and method.num_kept(9) == 9 and out.x is tokens.x and torch.equal(out.size, tokens.size)
