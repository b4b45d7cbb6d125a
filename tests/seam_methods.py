"""Small methods that the tests of the seam install; none is registered."""

import torch

from mmcompress import create
from mmcompress.compressor import Compressor, Scorer, Selector
from mmcompress.tokens import Reduction, identity, keep

CHAINS = {
    "prefill": lambda: create("dpc_knn", keep_ratio=0.4),
    "cls": lambda: create("global_guided", keep_ratio=0.4),
    "attention": lambda: create("todre", keep_ratio=0.5),
    "two_places": lambda: create("dpc_knn", keep_ratio=0.6) | create("pooling", keep_ratio=0.5, layer=2),
}
"""What threads and copies are tried with: each kind of place and of signal."""


def direction(tokens):
    """Scores [B, N] by a fixed random direction of the tokens' width."""
    v = torch.randn(tokens.x.shape[-1], generator=torch.Generator().manual_seed(7)).to(tokens.x)
    return tokens.x @ v


class Direction(Selector):
    """K tokens that lie furthest along a fixed direction."""

    def select(self, tokens, K):
        return direction(tokens).argsort(dim=1, descending=True, stable=True)[:, :K]


class MeanMerge(Compressor):
    """Tokens above the mean stay, the others join the nearest of them: K differs between items. Empty outputs hold rubbish."""

    has_ratio = False
    keep_ratio: float = 0.5

    def compress(self, tokens):
        above = direction(tokens) > direction(tokens).mean(1, keepdim=True)
        K = int(above.sum(1).max())
        out = []
        for x, size, chosen in zip(tokens.x, tokens.size, above, strict=True):
            index = chosen.nonzero()[:, 0]
            assignment = torch.cdist(x[None].detach(), x[None, index].detach())[0].argmin(1)
            assignment[index] = torch.arange(len(index), device=x.device)
            member = torch.nn.functional.one_hot(assignment, len(index)).to(x) * size[:, None]
            total = member.sum(0)
            spare = K - len(index)
            out.append(
                (
                    torch.cat([(member / total).T @ x, x.new_full((spare, x.shape[1]), 1e4)]),
                    torch.cat([index, index[-1:].expand(spare)]),
                    assignment,
                    torch.cat([total, total.new_zeros(spare)]),
                    torch.arange(K, device=x.device) < len(index),
                )
            )
        x, anchor, assignment, size, mask = map(torch.stack, zip(*out, strict=True))
        return Reduction(x, anchor, assignment, size, mask=mask)


class Attended(Scorer):
    """The tokens that the last row of the prompt looks at most, one layer before."""

    reads = ("query_attention",)

    def score(self, tokens):
        assert tokens.signals["query_attention"].dtype == torch.float32
        return tokens.signals["query_attention"]


class DropAll(Compressor):
    """Nothing of any item stays."""

    has_ratio = False
    keep_ratio: float = 0.5

    def compress(self, tokens):
        return keep(tokens, tokens.group[:, :0])


class Watch(Compressor):
    """Keeps everything (yet is no identity to the seam) and notes the tokens it saw."""

    keep_ratio: float = 0.99

    def setup(self):
        self.seen = []

    def compress(self, tokens):
        self.seen.append(tokens)
        return identity(tokens)


def watch(*signals, **config):
    """A `Watch` that reads these signals."""
    cls = type("Watch", (Watch,), {"reads": signals, "__module__": __name__, "__annotations__": {}})
    return cls(**config)
