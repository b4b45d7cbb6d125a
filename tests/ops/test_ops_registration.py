"""opcheck, gradients and torch.compile: the operators behave as PyTorch's own do."""

import pytest
import torch
from ops_oracle import DTYPES, image_like

from mmcompress import ops

OPS = torch.ops.mmcompress


def ends(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def samples(dtype: torch.dtype) -> dict[str, tuple]:
    x, y = image_like(23, 9, 0, dtype), image_like(11, 9, 1, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    offsets, half = ends(0, 8, 23), ends(0, 3, 7)
    score = x[:, 0].contiguous()
    return {
        "k_center": (x, offsets, half, 7, ends(2, 4), False),
        "max_sum": (x, offsets, half, 7),
        "similarity_argmax": (x, y, offsets, ends(0, 4, 11), False, y[:, 0].to(wide)),
        "merge_mean": (x, torch.arange(23) % 6 - 1, 5, torch.rand(23).to(wide)),
        "top_rows": (score, offsets, half, 7),
        "gather_rows": (x, torch.arange(69).reshape(3, 23), ends(1, 1, 7)),
        "dpc_knn": (x, offsets, 3),
        "cosine_top_k": (x, offsets, 4),
        "kmeans_pp": (x, torch.rand(4), 4),
        "kmeans_lloyd": (x, image_like(6, 9, 2).to(wide), offsets, 2),
    }


def test_every_operator_has_a_sample():
    assert samples(torch.float32).keys() == ops.status().keys()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(ops.status()))
def test_opcheck(name, dtype):
    arguments = samples(dtype)[name]
    torch.library.opcheck(getattr(OPS, name).default, arguments)
    if name in ("merge_mean", "gather_rows"):
        x = arguments[0].clone().requires_grad_()
        torch.library.opcheck(getattr(OPS, name).default, (x, *arguments[1:]))


def test_gradients():
    x = image_like(12, 3, dtype=torch.float64).requires_grad_()
    assignment = torch.tensor([0, 3, -1, 0, 0, 1, 3, 3, -1, 0, 1, 1])  # output 2 stays empty
    size = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    for weight in (None, size):
        assert torch.autograd.gradcheck(lambda x, w=weight: ops.merge(x, assignment, 4, w)[0], x)
    assert torch.autograd.gradcheck(lambda x: OPS.gather_rows(x, torch.arange(12), ends(4, 0, 4))[0], x)


def test_gradients_at_every_level(level):
    for dtype in (torch.float32, torch.bfloat16):
        x = image_like(12, 3, dtype=dtype).requires_grad_()
        out, _ = ops.merge(x, torch.arange(12) // 4, 3)
        kept = ops.top_keep(x.detach()[:, 0], 4, out.new_zeros(12, 3) + x).x
        (out.sum() + 2 * kept.sum()).backward()
        want = torch.full((12, 3), 0.25)
        want[ops.top_keep(x.detach()[:, 0], 4).index] += 2
        torch.testing.assert_close(x.grad.float(), want)
    selected = ops.k_center(image_like(9, 2).requires_grad_(), 3)
    assert not selected.requires_grad


def pipeline(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    picks = ops.k_center(x, 5)
    match = ops.bipartite_match(x, 4, protect=1)
    out, size = ops.merge(x, match.assignment, match.anchor.shape[1])
    kept = ops.top_keep(x[..., 0], 6, x)
    peaks = ops.density_peaks(x, 3)
    value, index = ops.nearest(x, x[:, :4], "sqeuclidean")
    return (
        picks,
        ops.max_sum(x, 3),
        out,
        size,
        kept.x,
        *peaks,
        value,
        index,
        *ops.neighbors(x, 2),
        *ops.kmeans(x, 3, init=x[:, :3]),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(pipeline, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 33, 21):
        x = image_like(2 * n, 6, n).reshape(2, n, 6)
        for got, want in zip(compiled(x), pipeline(x), strict=True):
            torch.testing.assert_close(got, want)


def test_compile_with_code_generation_and_gradient():
    torch._dynamo.reset()

    def loss(x):
        match = ops.bipartite_match(x, 5)
        return ops.merge(x, match.assignment, 15)[0].square().sum()

    x = image_like(20, 6).requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(got, want)
