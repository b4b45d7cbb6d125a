"""Wrong input: a ValueError or TypeError whose one sentence is the same from every implementation."""

import pytest
import torch
from ops_oracle import AVAILABLE, image_like

from mmcompress import ops

OPS = torch.ops.mmcompress
X = image_like(12, 4)
ENDS, HALF = torch.tensor([0, 12]), torch.tensor([0, 4])


def bad(row: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = X.to(dtype, copy=True)
    x[row, 2] = value
    return x


CASES = {
    "k above N": (lambda: ops.k_center(X, 13), "k must be between 1 and N = 12, got 13"),
    "k of zero": (lambda: ops.max_sum(X, 0), "k must be between 1 and N = 12, got 0"),
    "k no integer": (lambda: ops.k_center(X, 2.0), "k must be an integer, got float"),
    "k above N in an item": (lambda: ops.k_center(X, [2, 9], offsets=[0, 4, 12]), "between 1 and N = 8 in item 1, got 9"),
    "first": (lambda: ops.k_center(X, 2, first=12), "first must be between 0 and N - 1 = 11, got 12"),
    "start": (
        lambda: OPS.k_center(X, ENDS, HALF, 4, torch.tensor([-1])),
        "start must be between 0 and N - 1 = 11 in item 0, got -1",
    ),
    "metric": (lambda: ops.k_center(X, 2, metric="l1"), "metric must be 'cosine' or 'sqeuclidean', got 'l1'"),
    "rank": (lambda: ops.k_center(X[0], 2), r"x must have shape \[N, D\] or \[B, N, D\], got \[4\]"),
    "rank of the operator": (lambda: OPS.max_sum(X[0], ENDS, HALF, 4), r"x must have shape \[M, D\] with D >= 1, got \[4\]"),
    "integers": (lambda: ops.k_center(X.long(), 2), "x must be float32, bfloat16, float16 or float64, got torch.int64"),
    "offsets": (lambda: ops.k_center(X, 2, offsets=[0, 5, 11]), r"offsets must rise from 0 to 12, got \[0, 5, 11\]"),
    "offsets fall": (lambda: OPS.dpc_knn(X, torch.tensor([0, 9, 5, 12]), 2), "offsets must rise from 0 to 12"),
    "dtype mix": (lambda: ops.nearest(X, X.bfloat16()), "a and b must have one dtype, got torch.float32 and torch.bfloat16"),
    "width": (lambda: ops.nearest(X, X[:, :3]), "a and b must have one width D, got 4 and 3"),
    "empty b": (lambda: ops.nearest(X, X[:0]), "b must have at least one row in every item, got none in item 0"),
    "negative r": (lambda: ops.bipartite_match(X, -1), r"r must be between 0 and \(N - protect\) // 2 = 6, got -1"),
    "r above half": (lambda: ops.bipartite_match(X, 6, protect=1), r"\(N - protect\) // 2 = 5, got 6"),
    "assignment": (
        lambda: ops.merge(X, torch.full((12,), 3), 3),
        "assignment must be between -1 and num_out - 1 = 2, got 3 to 3",
    ),
    "sizes": (lambda: ops.merge(X, torch.zeros(12).long(), 1, torch.ones(3)), "size must have the shape of assignment"),
    "index": (
        lambda: OPS.gather_rows(X, torch.arange(12), torch.tensor([12])),
        "index must be between 0 and M - 1 = 11, got 12 to 12",
    ),
    "neighbours": (lambda: ops.neighbors(X, 12), "k must be between 1 and N - 1 = 11, got 12"),
    "num_neighbors": (lambda: ops.density_peaks(X, 2, 13), "num_neighbors must be between 1 and N = 12, got 13"),
    "clusters": (lambda: ops.kmeans(X, 13), "num_clusters must be between 1 and N = 12, got 13"),
    "init": (lambda: ops.kmeans(X, 3, init=X[:2]), r"init must have shape \[K, D\] = \[3, 4\] per item, got \[2, 4\]"),
    "uniform": (lambda: OPS.kmeans_pp(X, torch.ones(2), 2), r"uniform must be in \[0, 1\), got 1 to 1"),
    "score NaN": (lambda: ops.top_keep(bad(7, torch.nan)[:, 2], 3), "score must not be NaN, got NaN in row 7"),
    "NaN": (lambda: ops.k_center(bad(7, torch.nan), 3), "x must be finite .*, got a bad value in row 7"),
    "infinity": (lambda: ops.max_sum(bad(3, torch.inf, torch.bfloat16), 3), "x must be finite .*, got a bad value in row 3"),
    "large": (lambda: ops.neighbors(bad(3, 1e25), 3), "x must be finite .* squared norms within float32"),
    "NaN in b": (lambda: ops.nearest(X, bad(5, torch.nan)), "b must be finite .*, got a bad value in row 5"),
    "NaN, match": (lambda: ops.bipartite_match(bad(8, torch.nan), 3), "a must be finite .*, got a bad value in row 4"),
    "NaN, density": (
        lambda: ops.density_peaks(bad(1, torch.nan, torch.float16), 3),
        "x must be finite .*, got a bad value in row 1",
    ),
    "NaN, k-means": (lambda: ops.kmeans(bad(1, torch.nan), 3, init=X[:3]), "x must be finite .*, got a bad value in row 1"),
    "NaN, seeds": (
        lambda: OPS.kmeans_pp(bad(1, -torch.inf), torch.rand(3), 3),
        "x must be finite .*, got a bad value in row 1",
    ),
    "NaN, merge": (
        lambda: ops.merge(bad(9, torch.nan), torch.arange(12) // 4, 3),
        "merged x must be finite .* bad value in row 2",
    ),
    "NaN, copied": (
        lambda: ops.merge(bad(9, torch.nan), torch.arange(12), 12),
        "merged x must be finite .* bad value in row 9",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sentence_is_one_and_the_same(case):
    call, sentence = CASES[case]
    said = set()
    for level in AVAILABLE:
        ops.set_cpu_level(level)
        with pytest.raises((ValueError, TypeError), match=sentence) as error:
            call()
        said.add((type(error.value), str(error.value)))
    ops.set_cpu_level("avx512")
    assert len(said) == 1


def test_the_check_can_be_switched_off(level):
    for value in (torch.nan, torch.inf):
        x = image_like(100, 8)
        x[17, 3] = value
        off = {"check_finite": False}
        for picks in (
            ops.k_center(x, 5, **off),
            ops.k_center(x, 60, **off),
            ops.max_sum(x, 5, **off),
            ops.nearest(x, x, **off)[1],
        ):
            assert picks.min() >= 0 and picks.max() < 100
        ops.merge(x, torch.arange(100) // 2, 50, **off)
        ops.kmeans(x, 4, init=x[:4], **off)
        assert ops.top_keep(x[:, 3], 60, **off).index.unique().numel() == 60
        assert ops.neighbors(x, 3, **off)[1].max() < 100
        assert ops.density_peaks(x, 7, **off).assignment.max() < 7
        assert torch.ops.mmcompress.kmeans_pp(x, torch.rand(5), 5, False, 0.0, False).max() < 100


def test_levels():
    with pytest.raises(ValueError, match="level must be one of avx512, avx2, scalar, reference, got 'sse'"):
        ops.set_cpu_level("sse")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        ops.require("tpu")
    built = len(AVAILABLE) > 1
    assert all(line["cpu"].startswith("compiled" if built else "reference (mmcompress._C") for line in ops.status().values())
    if built:
        ops.require("cpu")
    ops.set_cpu_level("reference")
    with pytest.raises(RuntimeError, match=r"switched off by set_cpu_level|kernels for cpu are missing"):
        ops.require("cpu")
    assert ops.status()["k_center"]["cpu"].startswith("reference (")
    ops.set_cpu_level("avx512")


def test_a_check_on_a_device_waits_where_it_is_told_to(monkeypatch):
    """As on a GPU: an assertion by itself, the ValueError of the CPU inside the block, and after it as before."""
    from mmcompress.ops import core

    monkeypatch.setattr(core, "_on_host", lambda first: False)

    def asserts():
        with pytest.raises(RuntimeError, match=r"x must be finite .* found on the device"):
            ops.k_center(bad(7, torch.nan), 3)

    asserts()
    with pytest.raises(ValueError, match=r"x must be finite .*, got a bad value in row 7"), ops.checks_wait():
        with ops.checks_wait():
            ops.k_center(X, 3)
        ops.k_center(bad(7, torch.nan), 3)
    asserts()
    with pytest.raises(ValueError, match="score must not be NaN, got NaN in row 5"), ops.checks_wait():
        ops.top_keep(bad(5, torch.nan)[:, 2], 3)
    asserts()
