import pytest
import torch

from mmcompress import create, list_methods
from mmcompress.tokens import Tokens


def test_nothing_happens():
    assert "none" in list_methods()
    tokens = Tokens.of(torch.randn(2, 9, 4))
    for method in (create("none"), create("none", keep_ratio=1)):
        out = method(tokens)
        assert method.is_identity and method.num_kept(9) == 9 and out.x is tokens.x and torch.equal(out.size, tokens.size)
    with pytest.raises(ValueError, match=r"keep_ratio has no effect on none and must be left out, got 0\.1"):
        create("none", keep_ratio=0.1)
