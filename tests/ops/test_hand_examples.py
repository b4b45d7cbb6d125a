"""Examples small enough to check by hand, through the public functions."""

import torch

from mmcompress import ops


def test_k_center_visits_every_cluster_where_max_sum_takes_the_ends():
    angle = torch.linspace(0, 5 / 6 * torch.pi, 6).repeat_interleave(3) + torch.tensor([0.0, 0.01, 0.02]).repeat(6)
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert sorted((ops.k_center(x, 6) // 3).tolist()) == [0, 1, 2, 3, 4, 5]
    assert set((ops.max_sum(x, 6) // 3).tolist()) == {0, 5}


def test_equal_tokens_are_taken_by_index():
    assert ops.k_center(torch.ones(10, 4), 3, first=3).tolist() == [3, 0, 1]
    assert ops.max_sum(torch.ones(10, 4), 3, first=3).tolist() == [3, 0, 1]


def test_k_center_squared_distances():
    x = torch.tensor([[0.0], [1.0], [4.0], [10.0]])
    assert ops.k_center(x, 4, metric="sqeuclidean").tolist() == [0, 3, 2, 1]


def test_bipartite_match_and_merge():
    x = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [0.5, 0.87], [1, 0.1], [-1, 0]])
    match = ops.bipartite_match(x, 2)
    assert match.partner.tolist() == [1, 3, 1]
    torch.testing.assert_close(match.value, torch.tensor([0.8, 0.8670, 0.8557]), atol=1e-4, rtol=0)
    assert (match.anchor.tolist(), match.assignment.tolist()) == ([0, 1, 3, 5], [0, 1, 2, 2, 1, 3])
    out, size = ops.merge(x, match.assignment, 4)
    assert size.tolist() == [1, 2, 2, 1]
    torch.testing.assert_close(out[1], (x[1] + x[4]) / 2)
    match = ops.bipartite_match(x, 3)
    assert (match.anchor.tolist(), match.assignment.tolist()) == ([1, 3, 5], [0, 0, 1, 1, 0, 2])
    assert ops.merge(x, match.assignment, 3)[1].tolist() == [3, 2, 1]


def test_bipartite_match_leaves_protected_and_masked_tokens_alone():
    x = torch.ones(8, 3)
    assert ops.bipartite_match(x, 3, protect=2).assignment.tolist() == [0, 1, 2, 2, 2, 3, 2, 4]
    mask = torch.tensor([True] * 4 + [False] * 4)
    assert ops.bipartite_match(x, 2, mask=mask).assignment.tolist() == [0, 0, 0, 1, 2, 3, 4, 5]


def test_density_peaks():
    x = torch.tensor([0, 0.1, 0.3, 1.0, 1.2, 1.25, 3.0])[:, None]
    peaks = ops.density_peaks(x, 3, num_neighbors=3)
    density = [0.96722, 0.98347, 0.95759, 0.96641, 0.98593, 0.97857, 0.12235]
    torch.testing.assert_close(peaks.log_density.exp(), torch.tensor(density), atol=1e-5, rtol=0)
    torch.testing.assert_close(peaks.delta, torch.tensor([0.1, 1.1, 0.2, 0.2, 3.0, 0.05, 1.75]), atol=1e-5, rtol=0)
    assert peaks.center.tolist() == [4, 1, 6]
    assert peaks.assignment.tolist() == [1, 1, 1, 0, 0, 0, 2]
    assert ops.density_peaks(torch.ones(6, 2), 3).center.tolist() == [0, 1, 2]


def test_kmeans_finds_two_directions_and_keeps_an_empty_centroid():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.2], [0.0, 3.0], [0.1, 1.0]])
    init = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    result = ops.kmeans(x, 3, init=init, num_iterations=3)
    assert result.assignment.tolist() == [0, 0, 1, 1] and result.size.tolist() == [2, 2, 0]
    unit = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(result.centroid, torch.stack([unit[:2].mean(0), unit[2:].mean(0), init[2]]))
    result = ops.kmeans(x, 2, init=init[:2], metric="sqeuclidean", num_iterations=2)
    torch.testing.assert_close(result.centroid, torch.stack([x[:2].mean(0), x[2:].mean(0)]))


def test_top_keep_takes_the_highest_scores_in_order():
    score = torch.tensor([[0.1, 0.9, 0.9, -torch.inf], [1.0, 0.0, 1.0, 1.0]])
    x = torch.arange(16.0).reshape(2, 4, 2)
    kept = ops.top_keep(score, 2, x, torch.arange(24).reshape(2, 4, 3))
    assert kept.index.tolist() == [[1, 2], [0, 2]]
    assert kept.x[1].tolist() == [[8, 9], [12, 13]]
    assert kept.position[1].tolist() == [[12, 13, 14], [18, 19, 20]]
    ragged = ops.top_keep(score.reshape(-1), [1, 3], offsets=[0, 4, 8])
    assert ragged.index.tolist() == [1, 4, 6, 7]


def test_nearest_and_neighbors():
    a, b = torch.tensor([[1.0, 1.0], [3.0, 0.0]]), torch.tensor([[5.0, 5.0], [2.0, 0.0], [1.0, 1.0]])
    value, index = ops.nearest(a, b)
    assert index.tolist() == [0, 1] and torch.allclose(value, torch.ones(2))
    value, index = ops.nearest(a, b, "sqeuclidean")
    assert index.tolist() == [2, 1] and value.tolist() == [0, 1]
    value, index = ops.neighbors(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 2)
    assert index.tolist() == [[2, 1], [2, 0], [0, 1]]


def test_sums_are_the_same_sorted_or_not():
    """The form of CUDA, which sorts, and that of the CPU; values and gradients, with empty outputs."""
    from mmcompress.ops.merging import _sum_sorted, sum_into

    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 4, (2, 30), generator=g) + torch.tensor([[0], [1]])
    for shape in ((2, 30), (2, 30, 3)):
        x = torch.randint(-9, 9, shape, generator=g).double().requires_grad_()
        want = torch.stack([torch.stack([x[b][index[b] == k].sum(0) for k in range(6)]) for b in range(2)])
        weight = torch.randn(want.shape, generator=g, dtype=torch.float64)
        (grad,) = torch.autograd.grad((want * weight).sum(), x)
        for form in (sum_into, _sum_sorted):
            got = form(x, index, 6)
            assert torch.equal(got, want)
            assert torch.equal(torch.autograd.grad((got * weight).sum(), x)[0], grad)
