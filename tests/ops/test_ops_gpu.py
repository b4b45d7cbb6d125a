"""The CUDA kernels against the references on the CPU; no operator waits for the device."""

import ops_oracle as oracle
import pytest
import torch
from ops_oracle import DTYPES, image_like

from mmcompress import create, ops
from mmcompress.tokens import Tokens, merge

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def both(function, *tensors, **options):
    """The result on the GPU, without a sync inside, and the reference's."""
    ops.require("cuda")
    moved = [t.cuda() for t in tensors]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = function(*moved, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ops.set_cpu_level("reference")
    want = function(*tensors, **options)
    ops.set_cpu_level("avx512")
    return got, want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (17, 7), (190, 33), (700, 130)])
def test_selection(n, d, dtype):
    x = image_like(n, d, dtype=dtype)
    k = max(n // 4, 1)
    got, _ = both(lambda x: ops.k_center(x, k, first=n // 2), x)
    oracle.replay_farthest(oracle.cosine_distance(x), got.tolist())
    got, _ = both(lambda x: ops.max_sum(x, k), x)
    oracle.replay_max_sum(x, got.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype):
    x = image_like(500, 70, dtype=dtype)
    for function in (
        lambda x: ops.nearest(x[:200], x[200:]),
        lambda x: ops.nearest(x[:200], x[200:], "sqeuclidean"),
        lambda x: ops.bipartite_match(x, 99),
        lambda x: ops.merge(x, torch.arange(500, device=x.device) % 77 - 1, 76),
        lambda x: ops.top_keep(x[:, 0].contiguous(), 60, x, torch.arange(500, device=x.device)),
    ):
        for got, want in zip(*both(function, x), strict=True):
            torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-2 if dtype != torch.float32 else 1e-4)
    (cosine, index), (want, _) = both(lambda x: ops.neighbors(x, 5), x)
    torch.testing.assert_close(cosine.cpu(), want, atol=1e-4, rtol=1e-4)
    exact = 1 - torch.from_numpy(oracle.cosine_distance(x)).gather(1, index.cpu())  # of near ties either may come first
    torch.testing.assert_close(exact.float(), want, atol=1e-4, rtol=1e-4)
    got, want = both(lambda x: ops.density_peaks(x, 30), x)
    torch.testing.assert_close(got.log_density.cpu(), want.log_density, atol=1e-4, rtol=1e-4)
    got = ops.kmeans(x.cuda(), 20, init=x[:20].cuda(), num_iterations=2)
    want = ops.kmeans(x, 20, init=x[:20], num_iterations=2)
    assert (got.assignment.cpu() == want.assignment).float().mean() > 0.99


def test_ties_and_ragged_items():
    same = torch.full((70, 3), 0.7)
    assert ops.k_center(same.cuda(), 9, first=5).tolist() == [5, 0, 1, 2, 3, 4, 6, 7, 8]
    assert ops.max_sum(same.cuda(), 4, first=2).tolist() == [2, 0, 1, 3]
    assert ops.density_peaks(same.cuda(), 4).center.tolist() == [0, 1, 2, 3]
    x = image_like(211, 24)
    for function in (
        lambda x: ops.k_center(x, [1, 20, 5], offsets=[0, 1, 60, 211]),
        lambda x: ops.max_sum(x, [1, 20, 5], offsets=[0, 1, 60, 211]),
        lambda x: ops.top_keep(x[:, 0].contiguous(), [1, 20, 5], offsets=[0, 1, 60, 211]).index,
        lambda x: ops.nearest(x, x, a_offsets=[0, 1, 60, 211], b_offsets=[0, 1, 60, 211])[1],
    ):
        assert function(x.cuda()).tolist() == function(x).tolist()


def test_merges_are_the_same_in_every_run():
    g = torch.Generator().manual_seed(0)
    x, index = torch.randn(2, 4096, 256, generator=g).cuda(), torch.randint(0, 40, (2, 4096), generator=g).cuda()
    tokens, anchor = Tokens.of(x), torch.arange(40, device="cuda").expand(2, 40)
    first, sums = merge(tokens, index, anchor).x, ops.sum_into(x, index, 40)
    whole = {name: create(name)(tokens).x for name in ("pooling", "kmeans", "dpc_knn", "tome")}
    for _ in range(20):
        assert torch.equal(merge(tokens, index, anchor).x, first) and torch.equal(ops.sum_into(x, index, 40), sums)
        assert all(torch.equal(create(name)(tokens).x, out) for name, out in whole.items())
    on_cpu = Tokens.of(x.cpu())
    torch.testing.assert_close(first.cpu(), merge(on_cpu, index.cpu(), anchor.cpu()).x, atol=1e-5, rtol=1e-5)
