"""What holds for any input: hypothesis looks for a counterexample."""

import numpy as np
import ops_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcompress import ops

settings.register_profile("ops", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("ops")


@st.composite
def rows(draw, most: int = 40) -> torch.Tensor:
    """Rows with duplicates, zeros and scales that differ; of any dtype."""
    n, d, seed = draw(st.integers(1, most)), draw(st.integers(1, 19)), draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    kind = draw(st.sampled_from(["plain", "coarse", "repeated", "zeros", "scaled"]))
    if kind == "coarse":
        x = x.round()
    if kind == "repeated":
        x = x[torch.randint(0, max(n // 3, 1), (n,), generator=generator)]
    if kind == "zeros":
        x[torch.rand(n, generator=generator) < 0.3] = 0
    if kind == "scaled":
        x = x * 10 ** torch.empty(n, 1).uniform_(-2, 2, generator=generator)
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


@given(rows(), st.data())
def test_each_pick_is_the_farthest_and_the_radius_never_grows(x, data):
    k, first = data.draw(st.integers(1, len(x))), data.draw(st.integers(0, len(x) - 1))
    distance = oracle.cosine_distance(x)
    distance[(oracle.unit(x) == 0).all(1)] = 1
    picks = ops.k_center(x, k, first=first).tolist()
    assert picks[0] == first
    oracle.replay_farthest(distance, picks, near=2e-6)


@given(rows(), st.data())
def test_max_sum_takes_the_smallest_sum(x, data):
    oracle.replay_max_sum(x, ops.max_sum(x, data.draw(st.integers(1, len(x))), data.draw(st.integers(0, len(x) - 1))).tolist())


@given(rows(), st.data())
def test_matching_and_merging_conserve_mass(x, data):
    r = data.draw(st.integers(0, len(x) // 2))
    size = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 4, len(x))).float()
    match = ops.bipartite_match(x, r)
    kept = len(x) - r
    assert len(match.anchor) == kept and (match.anchor.diff() > 0).all()
    assert match.assignment[match.anchor].tolist() == list(range(kept))
    assert (match.source % 2 == 0).all() and not set(match.source.tolist()) & set(match.anchor.tolist())
    x = x.float()
    out, sizes = ops.merge(x, match.assignment, kept, size)
    torch.testing.assert_close(sizes.sum(), size.sum(), rtol=1e-5, atol=0)
    before, after = (size[:, None] * x).double().sum(0), (sizes[:, None] * out).double().sum(0)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * max(float(x.abs().max()), 1e-3) * len(x))
    if r == 0:
        assert torch.equal(out, x)


@given(rows(20), st.data())
def test_batch_mates_change_nothing(x, data):
    n, k = len(x), data.draw(st.integers(1, len(x)))
    order = data.draw(st.permutations(range(3)))
    batch = torch.stack([x, x.flip(0), (x * 2).to(x.dtype)])
    for operator in (
        lambda b: ops.k_center(b, k),
        lambda b: ops.max_sum(b, k),
        lambda b: ops.bipartite_match(b, n // 2).assignment,
    ):
        alone, mixed = operator(batch), operator(batch[list(order)])
        assert torch.equal(mixed, alone[list(order)])


@given(rows(), st.data())
def test_scaling_a_token_changes_no_cosine_decision(x, data):
    factor = 2.0 ** torch.from_numpy(np.random.default_rng(0).integers(-3, 4, (len(x), 1))).to(x.dtype)
    k = data.draw(st.integers(1, len(x)))
    assert torch.equal(ops.k_center(x, k), ops.k_center(x * factor, k))
    assert torch.equal(ops.nearest(x, x)[1], ops.nearest(x * factor, x * factor)[1])


@given(rows(), st.data())
def test_clusters(x, data):
    k = data.draw(st.integers(1, len(x)))
    peaks = ops.density_peaks(x, k, min(5, len(x)))
    assert peaks.assignment[peaks.center].tolist() == list(range(k)) and peaks.center.unique().numel() == k
    result = ops.kmeans(x, k, num_iterations=3)
    assert result.size.sum() == len(x) and torch.isfinite(result.centroid).all()
    assert torch.equal(torch.bincount(result.assignment, minlength=k), result.size)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.data())
def test_top_keep_takes_the_largest(values, data):
    score, k = torch.tensor(values), data.draw(st.integers(1, len(values)))
    index = ops.top_keep(score, k).index.tolist()
    assert index == sorted(sorted(range(len(values)), key=lambda i: (-score[i].item(), i))[:k])
