"""Rows are screened in eight bits where that pays: decisions stay exact on inputs that eight bits cannot tell apart."""

import numpy as np
import ops_oracle as oracle
import pytest
import torch
from ops_oracle import NEAR, image_like

from mmcompress import ops

pytestmark = pytest.mark.usefixtures("level")


def rows(kind: str, n: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """n rows, of which eight bits lose something each time."""
    x = image_like(n, d, seed)
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1))
    if kind == "nearly equal":  # all of them candidates
        x = x[:1] + 0.02 * noise
    if kind == "few directions":  # many candidates for every row
        x = x[torch.arange(n) % 7] + 0.02 * noise
    if kind == "one loud channel":  # the scale is that channel's
        x[:, 3] *= 1000
    if kind == "norms apart":
        x = x * torch.logspace(-2, 2, n)[torch.randperm(n, generator=torch.Generator().manual_seed(seed))][:, None]
    if kind == "far from zero":
        x = x + 30
    if kind == "zero rows":
        x[::5] = 0
    if kind == "duplicates":
        x = x[torch.arange(n) // 3]
    return x.to(dtype)


KINDS = ["nearly equal", "few directions", "one loud channel", "norms apart", "far from zero", "zero rows", "duplicates"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nearest(kind, dtype):
    a, b = rows(kind, 130, 70, dtype), rows(kind, 201, 70, dtype, seed=3)
    cosine = oracle.unit(a) @ oracle.unit(b).T
    value, index = ops.nearest(a, b)
    np.testing.assert_allclose(value, cosine.max(1), atol=NEAR)
    assert (cosine[np.arange(len(a)), index] >= cosine.max(1) - NEAR).all()
    if kind == "duplicates":  # three equal rows each
        assert (index % 3 == 0).all()
    square = oracle.square_distance(a, b)
    scale = a.double().square().sum(1).max().item() + b.double().square().sum(1).max().item()
    _, index = ops.nearest(a, b, "sqeuclidean")
    assert (square[np.arange(len(a)), index] <= square.min(1) + 2 * NEAR * scale).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bias_of_any_size(kind):
    a, b = rows(kind, 90, 64, torch.float32), rows(kind, 130, 64, torch.float32, seed=3)
    ends = torch.tensor([0, 90]), torch.tensor([0, 130])
    generator = torch.Generator().manual_seed(0)
    for size, cosine in ((1e-3, True), (1e3, False), (1e3, True)):
        bias = size * torch.randn(130, generator=generator)
        bias[::4] = -torch.inf
        _, index = torch.ops.mmcompress.similarity_argmax(a, b, *ends, cosine, bias)
        right = torch.from_numpy(oracle.unit(b)) if cosine else b.double()
        score = a.double() @ right.T + bias.double()
        lost = score.amax(1) - score.gather(1, index[:, None])[:, 0]
        size_of_terms = a.double().norm(dim=1) * right.norm(dim=1).max() + size
        assert (lost <= 2 * NEAR * size_of_terms).all() and (index % 4 != 0).all()
    none = torch.full((130,), -torch.inf)
    _, index = torch.ops.mmcompress.similarity_argmax(a, b, *ends, True, none)
    assert (index == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_k_center(kind, dtype):
    x = rows(kind, 560, 66, dtype)
    distance = oracle.cosine_distance(x)
    oracle.replay_farthest(distance, ops.k_center(x, 75, first=4).tolist())
    norms = x.double().square().sum(1).max().item()
    picks = ops.k_center(x, 75, metric="sqeuclidean").tolist()
    oracle.replay_farthest(oracle.square_distance(x, x) / 2, picks, near=2e-6 * norms)
    if kind in ("norms apart", "zero rows", "duplicates"):  # elsewhere rounding decides
        assert ops.k_center(x, 75, first=4).tolist() == ops.k_center(x, 140, first=4).tolist()[:75]  # by blocks


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("kind", KINDS)
def test_kmeans(kind, metric):
    x = rows(kind, 300, 66, torch.float32)
    init = x[torch.randperm(300, generator=torch.Generator().manual_seed(1))[:70]].contiguous()
    data = oracle.unit(x) if metric == "cosine" else x.double().numpy()
    centroid = init.double().numpy()
    for step in range(1, 7):
        if metric == "cosine":
            score = data @ oracle.unit(torch.from_numpy(centroid)).T
        else:
            score = data @ centroid.T - (centroid**2).sum(1) / 2
        result = ops.kmeans(x, 70, num_iterations=step, init=init, metric=metric)
        chosen = score[np.arange(300), result.assignment]
        assert (chosen >= score.max(1) - 1e-5 * np.abs(score).max()).all()
        means, sizes = oracle.merge(data, result.assignment.numpy(), 70)
        centroid = np.where(sizes[:, None] > 0, means, centroid)
        np.testing.assert_allclose(result.centroid, centroid, atol=2e-5 * max(1, np.abs(data).max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_kmeans_pp(kind, cosine, dtype):
    x = rows(kind, 300, 66, dtype)
    uniform = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if cosine:
        distance = 2 * oracle.cosine_distance(x)  # a zero row is as far as an orthogonal one
        limit = 2
    else:
        distance, square = oracle.square_distance(x, x), x.double().square().sum(1).numpy()
        limit = square[:, None] + square
    distance[distance <= 1e-6 * limit] = 0  # rounding noise
    np.fill_diagonal(distance, 0)
    picks = torch.ops.mmcompress.kmeans_pp(x, uniform, 20, cosine, 1e-3).tolist()
    for step in range(1, 20):
        weight = distance[picks[:step]].min(0) + 1e-3
        share = weight.cumsum() / weight.sum()
        low = share[picks[step] - 1] if picks[step] else 0
        assert low - 1e-4 <= uniform[step] <= share[picks[step]] + 1e-4


def test_batches_and_threads_change_nothing():
    x = image_like(1400, 64).reshape(2, 700, 64)
    x[1, 300:500] = x[1, 299] + 1e-3 * x[0, 300:500]  # rows that are computed without screening
    threads = torch.get_num_threads()
    results = []
    for count in (1, 4):
        torch.set_num_threads(count)
        for batch in (True, False):
            parts = [x] if batch else [x[0], x[1]]
            uniform = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            outputs = [
                [ops.k_center(p, 80), *ops.nearest(p, p[..., 1::2, :]), *ops.kmeans(p, 70, init=p[..., :70, :])] for p in parts
            ]
            joined = [torch.cat([o.reshape(-1) for o in group]) for group in zip(*outputs, strict=True)]
            results.append([*joined, *(torch.ops.mmcompress.kmeans_pp(p, uniform, 9, True, 0.0) for p in x)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
