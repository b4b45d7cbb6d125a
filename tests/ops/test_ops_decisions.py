"""Every operator, at every level and dtype, against float64 oracles of the same (rounded) inputs."""

from itertools import pairwise

import numpy as np
import ops_oracle as oracle
import pytest
import torch
from ops_oracle import DTYPES, NEAR, image_like

from mmcompress import ops

SHAPES = [(1, 1), (2, 7), (17, 64), (190, 1), (97, 33), (576, 48), (300, 1023)]
pytestmark = pytest.mark.usefixtures("level")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_k_center(n, d, dtype):
    x = image_like(n, d, dtype=dtype)
    distance = oracle.cosine_distance(x)
    for k in {1, max(n // 12, 1), max(n // 3, 1)} | ({n} if d > 1 else set()):
        oracle.replay_farthest(distance, ops.k_center(x, k, first=n // 2).tolist())
    square = oracle.square_distance(x, x) / 2
    norms = x.double().square().sum(1).max().item()
    oracle.replay_farthest(square, ops.k_center(x, max(n // 3, 1), metric="sqeuclidean").tolist(), near=2e-6 * norms)


def test_k_center_prefixes_nest_and_both_algorithms_agree():
    x = image_like(700, 40)
    every = ops.k_center(x, 400).tolist()  # by blocks
    for k in (1, 30, 90, 250):  # the smaller ones by the heap
        assert ops.k_center(x, k).tolist() == every[:k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_max_sum(n, d, dtype):
    x = image_like(n, d, dtype=dtype)
    oracle.replay_max_sum(x, ops.max_sum(x, max(n // 2, 1), first=n - 1).tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 2, 7), (100, 33, 64), (97, 300, 129), (13, 64, 1030), (7, 257, 64)])
def test_nearest(n, m, d, dtype):
    a, b = image_like(n, d, 1, dtype), image_like(m, d, 2, dtype)
    cosine = oracle.unit(a) @ oracle.unit(b).T
    value, index = ops.nearest(a, b)
    np.testing.assert_allclose(value, cosine.max(1), atol=NEAR)
    assert (cosine[np.arange(n), index] >= cosine.max(1) - NEAR).all()
    square = oracle.square_distance(a, b)
    scale = max(a.double().square().sum(1).max(), b.double().square().sum(1).max()).item()
    value, index = ops.nearest(a, b, "sqeuclidean")
    np.testing.assert_allclose(value, square.min(1), atol=2 * NEAR * scale)
    assert (square[np.arange(n), index] <= square.min(1) + 2 * NEAR * scale).all()


def test_bias_moves_the_argmax_and_may_exclude():
    a, b = image_like(20, 16, 1), image_like(70, 16, 2)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(0))
    bias[::3] = -torch.inf
    ends = torch.tensor([0, 20]), torch.tensor([0, 70])
    value, index = torch.ops.mmcompress.similarity_argmax(a, b, *ends, False, bias)
    score = a.double() @ b.double().T + bias.double()
    torch.testing.assert_close(value.double(), score.amax(1), atol=1e-4, rtol=1e-6)
    assert index.tolist() == score.argmax(1).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "num_out"), [(1, 1, 1), (50, 7, 9), (576, 48, 300), (300, 1023, 40)])
def test_merge(n, d, num_out, dtype):
    x, generator = image_like(n, d, dtype=dtype), torch.Generator().manual_seed(0)
    assignment = torch.randint(-1, num_out, (n,), generator=generator)
    for size in (None, torch.rand(n, generator=generator) + 0.5):
        out, total = ops.merge(x, assignment, num_out, size)
        want, sizes = oracle.merge(
            x.double().numpy(), assignment.numpy(), num_out, None if size is None else size.double().numpy()
        )
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(out.double(), want, rtol=eps, atol=max(eps / 8, 1e-5))
        np.testing.assert_allclose(total, sizes, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_top_keep(dtype):
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(400, generator=generator).to(dtype)
    score[::7] = score[0]
    x = torch.randn(400, 9, generator=generator).to(dtype)
    for k in (1, 60, 399, 400):
        want = sorted(sorted(range(400), key=lambda i: (-score[i].item(), i))[:k])
        kept = ops.top_keep(score, k, x, torch.arange(1200).reshape(400, 3))
        assert kept.index.tolist() == want
        assert torch.equal(kept.x, x[want]) and kept.position[:, 0].tolist() == [3 * i for i in want]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(2, 3, 1), (97, 33, 5), (200, 64, 199), (300, 129, 70)])
def test_neighbors(n, d, k, dtype):
    x = image_like(n, d, dtype=dtype)
    cosine = oracle.unit(x) @ oracle.unit(x).T
    np.fill_diagonal(cosine, -np.inf)
    value, index = ops.neighbors(x, k)
    np.testing.assert_allclose(value, -np.sort(-cosine, axis=1)[:, :k], atol=NEAR)
    np.testing.assert_allclose(np.take_along_axis(cosine, index.numpy(), 1), value, atol=NEAR)
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (60, 16, 5), (130, 300, 3)])
def test_density_peaks(n, d, k, dtype):
    x = image_like(n, d, dtype=dtype)
    density, delta = oracle.density_peaks(x, k)
    peaks = ops.density_peaks(x, max(n // 4, 1), k)
    np.testing.assert_allclose(peaks.log_density, density, rtol=1e-4, atol=1e-5)
    close = np.abs(np.subtract.outer(density, density)) + np.eye(n) > 1e-4  # elsewhere the order of densities is rounding
    np.testing.assert_allclose(peaks.delta[close.all(1)], delta[close.all(1)], atol=1e-4)
    square = oracle.square_distance(x, x[peaks.center])
    assert (square[np.arange(n), peaks.assignment] <= square.min(1) + 1e-4 * d).all()
    assert peaks.assignment[peaks.center].tolist() == list(range(len(peaks.center)))


def test_wide_features_do_not_underflow():
    x = 30 * torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    density, _ = oracle.density_peaks(x, 5)
    assert density.max() < -104  # exp of it is zero in float32
    assert ops.density_peaks(x, 3).log_density.argsort().tolist() == density.argsort().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (120, 17, 5), (400, 64, 70)])
def test_kmeans(n, d, k, metric, dtype):
    x = image_like(n, d, dtype=dtype)
    init = x[torch.randperm(n, generator=torch.Generator().manual_seed(1))[:k]].float()
    rows = oracle.unit(x) if metric == "cosine" else x.double().numpy()
    centroid = init.double().numpy()
    for step in range(1, 4):
        if metric == "cosine":
            score = rows @ oracle.unit(torch.from_numpy(centroid)).T
        else:
            score = rows @ centroid.T - (centroid**2).sum(1) / 2
        result = ops.kmeans(x, k, num_iterations=step, init=init, metric=metric)
        chosen = score[np.arange(n), result.assignment]
        assert (chosen >= score.max(1) - 1e-5 * np.abs(score).max()).all()
        means, sizes = oracle.merge(rows, result.assignment.numpy(), k)
        centroid = np.where(sizes[:, None] > 0, means, centroid)
        np.testing.assert_allclose(result.centroid, centroid, atol=2e-5)
        assert result.size.tolist() == sizes.tolist() and result.centroid.dtype == torch.float32


@pytest.mark.parametrize("cosine", [True, False])
def test_kmeans_pp(cosine):
    x = image_like(150, 20)
    uniform = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.from_numpy(oracle.unit(x)) if cosine else x
    distance = oracle.square_distance(rows, rows)
    picks = torch.ops.mmcompress.kmeans_pp(x, uniform, 12, cosine, 1e-6).tolist()
    assert picks[0] == int(uniform[0] * 150)
    for step in range(1, 12):
        weight = distance[picks[:step]].min(0) + 1e-6
        share = weight.cumsum() / weight.sum()
        low = share[picks[step] - 1] if picks[step] else 0
        assert low - 1e-5 <= uniform[step] <= share[picks[step]] + 1e-5
    alike = torch.ops.mmcompress.kmeans_pp(torch.ones(8, 3), torch.tensor([0.0, 0.3, 0.99]), 3, cosine)
    assert alike.tolist() == [0, 2, 7]


def test_ties_go_to_the_lowest_index():
    clusters = torch.tensor([[1.0, 0.2], [-0.3, 1.0]]).repeat_interleave(5, 0).repeat(3, 1)  # 30 rows of two kinds
    kinds = torch.tensor([0, 1]).repeat_interleave(5).repeat(3)
    for dtype in DTYPES:
        x = clusters.to(dtype)
        first = int((kinds != kinds[4]).nonzero()[0])
        rest = [i for i in range(30) if i not in (4, first)]
        for k in (3, 12, 30):
            assert ops.k_center(x, k, first=4).tolist() == [4, first, *rest][:k]
        assert ops.nearest(x, x)[1].tolist() == [0 if kind == 0 else 5 for kind in kinds]
        assert ops.neighbors(x, 3)[1][29].tolist() == [5, 6, 7]
    same = torch.full((70, 3), 0.7)
    assert ops.k_center(same, 9, first=5).tolist() == [5, 0, 1, 2, 3, 4, 6, 7, 8]
    assert ops.max_sum(same, 4, first=2).tolist() == [2, 0, 1, 3]
    assert ops.density_peaks(same, 4).center.tolist() == [0, 1, 2, 3]
    assert ops.bipartite_match(same[:10], 3).source.tolist() == [0, 2, 4]
    assert ops.kmeans(same, 5).assignment.tolist() == [0] * 70


def test_zero_rows_have_no_similarity():
    x = image_like(40, 8)
    x[3] = x[17] = 0
    assert torch.isfinite(ops.nearest(x, x)[0]).all()
    assert ops.nearest(x[3:4], x)[0].item() == 0
    picks = ops.k_center(x, 40).tolist()
    oracle.replay_farthest(oracle.cosine_distance(x) * (1 - np.eye(40)), picks)
    assert ops.k_center(torch.zeros(5, 2), 5, first=2).tolist() == [2, 0, 1, 3, 4]
    assert ops.max_sum(torch.zeros(5, 2), 5, first=2).tolist() == [2, 0, 1, 3, 4]


def test_layouts():
    x = image_like(90, 66)
    strided = torch.zeros(90, 132)[:, ::2]
    strided.copy_(x)
    columns = x.T.contiguous().T
    raw = torch.zeros(90 * 66 + 1)
    raw[1:] = x.flatten()
    for other in (strided, columns, raw[1:].view(90, 66)):
        assert torch.equal(ops.k_center(other, 9), ops.k_center(x, 9))
        assert torch.equal(ops.nearest(other, other[:7])[1], ops.nearest(x, x[:7])[1])
        assert torch.equal(ops.merge(other, torch.arange(90) // 4, 23)[0], ops.merge(x, torch.arange(90) // 4, 23)[0])
    halves = x.bfloat16()
    shifted = torch.zeros(90 * 66 + 1, dtype=torch.bfloat16)
    shifted[1:] = halves.flatten()  # aligned to two bytes only
    assert torch.equal(ops.k_center(shifted[1:].view(90, 66), 30), ops.k_center(halves, 30))
    every_other = torch.zeros(90, 67, dtype=torch.bfloat16)[:, :66]
    every_other.copy_(halves)
    assert torch.equal(ops.k_center(every_other, 30), ops.k_center(halves, 30))


def test_batches_and_ragged_items_equal_their_items_alone():
    x, k = image_like(210, 24).reshape(3, 70, 24), 9
    score = torch.rand(3, 70, generator=torch.Generator().manual_seed(0))
    assignment = torch.arange(70).expand(3, 70) // 4
    for i in range(3):
        one = x[i]
        assert torch.equal(ops.k_center(x, k)[i], ops.k_center(one, k))
        assert torch.equal(ops.k_center(x, k, first=torch.tensor([4, 5, 6]))[i], ops.k_center(one, k, first=4 + i))
        assert torch.equal(ops.max_sum(x, k)[i], ops.max_sum(one, k))
        for a, b in zip(ops.bipartite_match(x, 20), ops.bipartite_match(one, 20), strict=True):
            assert torch.equal(a[i], b)
        for a, b in zip(ops.density_peaks(x, k), ops.density_peaks(one, k), strict=True):
            assert torch.equal(a[i], b)
        assert torch.equal(ops.neighbors(x, 4)[1][i], ops.neighbors(one, 4)[1])
        assert torch.equal(ops.top_keep(score, k)[0][i], ops.top_keep(score[i], k)[0])
        assert torch.equal(ops.merge(x, assignment, 18)[0][i], ops.merge(one, assignment[i], 18)[0])
        assert torch.equal(ops.kmeans(x, 4, init=x[:, :4])[0][i], ops.kmeans(one, 4, init=one[:4])[0])
    flat, ends = x.reshape(210, 24), [0, 1, 60, 210]
    parts = [flat[a:b] for a, b in pairwise(ends)]
    counts = [1, 20, 5]
    picks = ops.k_center(flat, counts, offsets=ends).split(counts)
    centers = ops.density_peaks(flat, counts, 1, offsets=torch.tensor(ends)).center.split(counts)
    kept = ops.top_keep(flat[:, 0], counts, offsets=ends).index.split(counts)
    for part, first, n, pick, center, keep in zip(parts, ends, counts, picks, centers, kept, strict=False):
        assert torch.equal(pick - first, ops.k_center(part, n))
        assert torch.equal(center - first, ops.density_peaks(part, n, 1).center)
        assert torch.equal(keep - first, ops.top_keep(part[:, 0], n).index)
    value, index = ops.nearest(flat, flat, a_offsets=ends, b_offsets=ends)
    want = [ops.nearest(part, part) for part in parts]
    assert torch.equal(index, torch.cat([w[1] for w in want])) and torch.equal(value, torch.cat([w[0] for w in want]))
    assert torch.equal(ops.nearest(x, x[0])[1][2], ops.nearest(x[2], x[0])[1])
    out, _ = ops.merge(
        flat, torch.cat([torch.arange(len(part)) % n for part, n in zip(parts, counts, strict=True)]), counts, offsets=ends
    )
    assert torch.equal(out[1:21], ops.merge(parts[1], torch.arange(59) % 20, 20)[0])


def test_empty_batches_and_items():
    nothing = torch.zeros(0, 5, 3)
    assert ops.k_center(nothing, 2).shape == (0, 2)
    assert ops.merge(nothing, torch.zeros(0, 5, dtype=torch.int64), 2)[0].shape == (0, 2, 3)
    assert ops.top_keep(nothing[..., 0], 2).index.shape == (0, 2)
    assert ops.bipartite_match(nothing, 2).assignment.shape == (0, 5)
    assert ops.density_peaks(nothing, 2).assignment.shape == (0, 5)
    assert ops.kmeans(nothing, 2).centroid.shape == (0, 2, 3)
    assert ops.neighbors(nothing, 2)[0].shape == (0, 5, 2)
    x = image_like(6, 3)
    assert ops.k_center(x, [0, 2], offsets=[0, 0, 6]).tolist() == ops.k_center(x, 2).tolist()


def test_threads_change_nothing():
    x = image_like(1300, 64)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 4):
        torch.set_num_threads(count)
        results.append(
            [
                ops.k_center(x, 60),
                ops.k_center(x, 400),
                ops.max_sum(x, 40),
                *ops.bipartite_match(x, 300),
                *ops.density_peaks(x, 50),
                *ops.kmeans(x, 40),
                *ops.neighbors(x, 7),
                *ops.merge(x, torch.arange(1300) % 111, 111),
            ]
        )
    torch.set_num_threads(threads)
    for one, four in zip(*results, strict=True):
        assert torch.equal(one, four)
