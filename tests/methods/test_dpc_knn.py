"""Golden values: tests/golden/dpc_knn_dev.npz, official arrays computed by PKU-YuanGroup/Chat-UniVi @ ec0b3db and
zengwang430521/TCFormer @ 1ea72a8 (identical results, noise set to 0); masked cases belong to the operator.
"""

import pytest
import torch

from mmcompress import create
from mmcompress.methods.dpc_knn import DpcKnn
from mmcompress.tokens import Tokens


def cluster(x, K, **fields):
    x = x if x.dim() == 3 else x[None]
    return create("dpc_knn", keep_ratio=K / x.shape[1], **fields)(Tokens.of(x))


def test_golden(golden):
    cases = [c for c in golden("dpc_knn") if c["kind"] in ("cluster", "ties") and "mask" not in c]
    assert len(cases) == 4
    for case in cases:
        out = cluster(case["x"], case["num_clusters"], num_neighbors=case["k"])
        centers = case["centers"].long()
        assert torch.equal(out.anchor, centers.sort(1).values)
        rank = centers.argsort(1).argsort(1)  # the released number of a cluster -> its place in raster order
        assert torch.equal(out.assignment, rank.gather(1, case["idx"].long()))
        weight = case["weight"][..., 0] if "weight" in case else torch.ones(case["x"].shape[:2])
        tokens = Tokens.of(case["x"])
        weighted = create("dpc_knn", keep_ratio=case["num_clusters"] / tokens.num_tokens, num_neighbors=case["k"])(
            Tokens(tokens.x, tokens.position, tokens.group, weight, tokens.layout)
        )
        for b in range(len(rank)):
            torch.testing.assert_close(weighted.x[b][rank[b]], case["merged"][b], rtol=0, atol=1e-5)
            if "size" in case:
                assert out.size[b][rank[b]].tolist() == case["size"][b].tolist()


def test_golden_multi_stage(golden):
    (case,) = golden("dpc_knn", "multi_stage")
    x, token = case["x"], torch.arange(case["x"].shape[1])
    for i, (K, k) in enumerate(zip(case["ratios"], case["ks"], strict=True)):
        out = cluster(x, K, num_neighbors=k)
        token = out.assignment[0][token]
        released = case[f"idx_to_stage{i}"][0].long()
        torch.testing.assert_close(out.x[0][token], case[f"stage{i}"][0][released], rtol=0, atol=2e-5)
        x = out.x


def test_by_hand():
    x = torch.tensor([0, 0.1, 0.3, 1.0, 1.2, 1.25, 3.0])[:, None]
    out = cluster(x, 3, num_neighbors=3)
    assert out.anchor[0].tolist() == [1, 4, 6] and out.assignment[0].tolist() == [0, 0, 0, 1, 1, 1, 2]
    torch.testing.assert_close(out.x[0, :, 0], torch.tensor([0.4 / 3, 1.15, 3.0]))


def test_equal_tokens():
    out = cluster(torch.ones(8, 3), 3)
    assert out.anchor[0].tolist() == [0, 1, 2] and out.size[0].tolist() == [6, 1, 1]


def test_invariants():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator)
    out = cluster(x, 12)
    assert out.size[0].min() >= 1 and out.size.sum() == 60
    distance = torch.cdist(x, x[out.anchor[0]])
    assert torch.equal(distance.argmin(1), out.assignment[0])  # every token's centre is the nearest one
    torch.testing.assert_close((out.x * out.size[..., None]).sum(1)[0], x.sum(0), rtol=1e-4, atol=1e-4)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    assert torch.equal(cluster(x @ rotation + 3, 12).assignment, out.assignment)
    order = torch.randperm(60, generator=generator)
    assert torch.equal(order[cluster(x[order], 12).anchor[0]].sort().values, out.anchor[0])


def test_wide_features_do_not_underflow():
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 15  # mean d² far above 103
    distance = torch.cdist(x, x) / 4
    log_density = -distance.square().topk(5, largest=False).values.mean(1)
    denser = log_density[None] > log_density[:, None]
    delta = torch.where(denser, distance, torch.inf).amin(1)
    delta = torch.where(delta.isinf(), distance.max(), delta)
    expected = (log_density + delta.log()).topk(8).indices.sort().values
    assert log_density.max() < -104  # exp would be 0 in float32
    assert torch.equal(cluster(x.float(), 8).anchor[0], expected)


def test_weights():
    x = torch.tensor([[1.0, 0], [3.0, 0], [0, 40], [0, 0], [0, 0.0]])
    out = cluster(x, 2, weights="norm")
    near = out.assignment[0, 0]
    assert out.assignment[0].tolist() == [near, near, 1 - near, near, near]
    torch.testing.assert_close(out.x[0, near], torch.tensor([2.5, 0]))  # (1·1 + 3·3) / 4: zero tokens have no weight
    assert out.size[0, near] == 4
    assert torch.equal(cluster(torch.zeros(4, 2), 1, weights="norm").x, torch.zeros(1, 1, 2))  # the plain mean


def test_counts_and_neighbours():
    assert create("dpc_knn").keep_ratio == 0.45
    assert create("dpc_knn", keep_ratio=0.11).num_kept(10) == 1
    assert create("dpc_knn", keep_ratio=0.11, mode="official").num_kept(10) == 2
    assert DpcKnn(keep_ratio=0.9)(Tokens.of(torch.randn(4, 3))).anchor.tolist() == [[0, 1, 2, 3]]
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(cluster(x, 4, num_neighbors=5).anchor, cluster(x, 4, num_neighbors=2).anchor)  # min(3, 4 // 2)


@pytest.mark.parametrize("fields", [{"num_neighbors": 0}, {"num_neighbors": 2.5}, {"weights": "sum"}, {"mode": "x"}])
def test_bad_fields(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"{name} must be .*got"):
        create("dpc_knn", **fields)


def test_bad_input():
    with pytest.raises(ValueError):
        cluster(torch.full((5, 2), torch.inf), 2)
