"""Golden values: tests/golden/ppe_dev.npz. Cases `select_release`, `cascade_inherit`, `rope_contiguous` and `rope_vanilla` were
computed by MouxiaoHuang/PPE @ 7b6aa7d (noise 0, at most 16 tokens, where its sort is stable), the others by a plain loop over
the specification, each recomputed by a second, independent implementation. The rope cases: tests/models/test_rotary.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from mmcompress import create
from mmcompress.ledger import ItemCount
from mmcompress.methods.position_merge import carry, member_rank
from mmcompress.tokens import Layout, Tokens


def rows(ids):
    """[3P, M] axis-major rows -> [1, M, P, 3]."""
    return ids.long().unflatten(0, (3, -1)).permute(2, 1, 0)[None]


def tokens_of(x, ids, num_valid=None):
    """Tokens with the ids [3, N] or, with num_valid, carried ids [3P, N]."""
    tokens = Tokens.of(x, positions=rows(ids))
    if num_valid is not None:
        tokens.signals["num_positions"] = num_valid.long()[None]
    return tokens


def by_distance(x, idx, centers):
    center = centers.long()[idx[0]]
    distance = (x - x[center]).square().sum(-1)
    distance[centers.long()] = -torch.inf
    return member_rank(distance[None])


def by_index(N):
    return torch.arange(N).flip(0)[None]


def test_golden_select_released(golden):
    """The whole released step: clusters, means, order in the sequence and ids."""
    cases = golden("ppe", "select_release")
    assert [c["P"] for c in cases] == [1, 2, 4, 8]
    for case in cases:
        method = create(
            "position_merge",
            keep_ratio=case["M"] / case["N"],
            num_positions=case["P"],
            member_order="index_desc",
            mode="official",
        )
        out = method(tokens_of(case["x"], case["pos"]))
        assert torch.equal(out.positions, rows(case["ids"]))
        assert torch.equal(out.assignment[0], case["idx"].long())
        torch.testing.assert_close(out.x, case["merged"], rtol=0, atol=1e-5)
        index = torch.arange(case["N"])[None, :, None, None].expand(1, -1, 1, 3)
        source, _ = carry(
            index,
            torch.ones(1, case["N"]).long(),
            case["idx"].long()[None],
            by_index(case["N"]),
            case["M"],
            case["P"],
            "cyclic",
        )
        assert torch.equal(source[0, ..., 0], case["selected"].long())


def test_golden_select_ours(golden):
    (case,) = golden("ppe", "select_ours")
    idx, N, M, P = case["idx"].long()[None], case["N"], case["M"], case["P"]
    one, position = torch.ones(1, N, dtype=torch.long), rows(case["pos"])
    for fill in ("cyclic", "first", "spread"):
        rank = by_distance(case["x"], idx, case["centers"])
        ids, num = carry(position, one, idx, rank, M, P, fill)
        assert torch.equal(ids, rows(case[f"ids_{fill}"])) and torch.equal(num[0], case["num_valid"].long())
        index = torch.arange(N)[None, :, None, None].expand(1, -1, 1, 3)
        assert torch.equal(carry(index, one, idx, rank, M, P, fill)[0][0, ..., 0], case[f"selected_{fill}"].long())
    ids, _ = carry(position, one, idx, by_index(N), M, P, "cyclic")
    assert torch.equal(ids, rows(case["ids_index_desc_cyclic"]))


def test_golden_cascade_interleave(golden):
    cases = golden("ppe", "cascade_interleave")
    assert len(cases) == 2
    for case in cases:
        idx = case["idx2"].long()[None]
        rank = by_distance(case["x1"], idx, case["centers2"])
        ids, num = carry(rows(case["ids1"]), case["num_valid1"].long()[None], idx, rank, case["M2"], case["P"], "cyclic")
        assert torch.equal(ids, rows(case["ids2"])) and torch.equal(num[0], case["num_valid2"].long())


def test_golden_cascade_inherit(golden):
    (case,) = golden("ppe", "cascade_inherit")
    full = torch.full((case["M1"],), case["P"])
    method = create(
        "position_merge",
        keep_ratio=case["M2"] / case["M1"],
        num_positions=case["P"],
        member_order="index_desc",
        cascade="inherit",
        mode="official",
    )
    out = method(tokens_of(case["x1"], case["ids1"], full))
    assert torch.equal(out.assignment[0], case["idx2"].long())
    assert torch.equal(out.positions, rows(case["ids2"]))
    torch.testing.assert_close(out.x, case["x2"], rtol=0, atol=1e-5)


def test_figure():
    """Members with ids [2, 6] and [7, 5, 9, 14] and four slots: [2, 7, 6, 5]."""
    ids = torch.tensor([[2, 6, 2, 6], [7, 5, 9, 14]])[None, :, :, None].expand(-1, -1, -1, 3)
    got, num = carry(ids, torch.tensor([[2, 4]]), torch.zeros(1, 2).long(), torch.tensor([[0, 1]]), 1, 4, "cyclic")
    assert got[0, 0, :, 0].tolist() == [2, 7, 6, 5] and num.tolist() == [[4]]


@pytest.mark.parametrize(
    "fill, ids, expected",
    [
        ("spread", [2, 6], [2, 2, 6, 6]),
        ("spread", [11, 12, 15], [11, 11, 12, 15]),
        ("cyclic", [11, 12, 15], [11, 12, 15, 11]),
        ("first", [11, 12, 15], [11, 12, 15, 11]),
        ("first", [2, 6], [2, 6, 2, 2]),
        ("cyclic", [2, 6], [2, 6, 2, 6]),
    ],
)
def test_fill(fill, ids, expected):
    n = len(ids)
    position = torch.tensor(ids)[None, :, None, None].expand(1, n, 1, 3)
    got, num = carry(position, torch.ones(1, n).long(), torch.zeros(1, n).long(), torch.arange(n)[None], 1, 4, fill)
    assert got[0, 0, :, 0].tolist() == expected and num.tolist() == [[n]]


def test_by_hand():
    """Two groups of four; the centre of a group is its anchor 1 or 5, and the others follow by distance, ties by index."""
    x = torch.tensor([0.0, 1, 3, 2, 10, 11, 12, 13])[:, None]
    out = create("position_merge", merger="pooling", keep_ratio=0.25, num_positions=4)(Tokens.of(x))
    assert out.anchor.tolist() == [[1, 5]] and out.x[0, :, 0].tolist() == [1.5, 11.5]
    assert out.positions[0, :, :, 0].tolist() == [[1, 0, 3, 2], [5, 4, 6, 7]] and not out.positions[..., 1:].any()
    assert out.num_positions.tolist() == [[4, 4]] and out.size.tolist() == [[4, 4]]
    last = create("position_merge", merger="pooling", keep_ratio=0.25, num_positions=3, member_order="index_desc")(Tokens.of(x))
    assert last.positions[0, :, :, 0].tolist() == [[3, 2, 1], [7, 6, 5]]


def test_cascade_by_hand():
    x = torch.tensor([0.0, 1, 3, 2, 10, 11, 12, 13])[:, None]
    pooled = {"merger": "pooling", "keep_ratio": 0.5, "num_positions": 4}
    two = create("position_merge", **pooled) | create("position_merge", **pooled)
    out = two(Tokens.of(x))
    # first 0 1 | 2 3 | 4 5 | 6 7, each with its first member as the centre; then pairs of these
    assert out.anchor.tolist() == [[0, 4]] and out.positions[0, :, :, 0].tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]]
    assert out.num_positions.tolist() == [[4, 4]]
    inherited = create("position_merge", **pooled) | create("position_merge", cascade="inherit", **pooled)
    out = inherited(Tokens.of(x))
    assert out.positions[0, :, :, 0].tolist() == [[2, 3, 2, 3], [6, 7, 6, 7]] and out.num_positions.tolist() == [[2, 2]]
    pruned = (create("position_merge", **pooled) | create("uniform_keep", keep_ratio=0.5))(Tokens.of(x))
    first = create("position_merge", **pooled)(Tokens.of(x))
    kept = [first.anchor[0].tolist().index(a) for a in pruned.anchor[0].tolist()]
    assert torch.equal(pruned.positions, first.positions[:, kept])  # who survives keeps what it carries


@pytest.mark.parametrize("merger", ["dpc_knn", "tome", "pooling", "kmeans", {"method": "dpc_knn", "num_neighbors": 3}])
@pytest.mark.parametrize("num_positions", [1, 3, "auto"])
def test_merges_as_its_merger_does(merger, num_positions):
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens.of(torch.randn(3, 40, 6, generator=generator), Layout(grid=(1, 5, 8)))
    fields = dict(merger) if isinstance(merger, dict) else {"method": merger}
    plain = create(fields.pop("method"), keep_ratio=0.3, **fields)(tokens)
    out = create("position_merge", keep_ratio=0.3, merger=merger, num_positions=num_positions)(tokens)
    for name in ("x", "anchor", "assignment", "size"):
        assert torch.equal(getattr(out, name), getattr(plain, name))
    anchors = tokens.position[torch.arange(3)[:, None], plain.anchor]
    assert torch.equal(out.positions[:, :, 0], anchors), "slot 0 is the place of the plain merger's token"
    assert out.positions.shape[2] == (8 if num_positions == "auto" else num_positions)
    for b, k in itertools.product(range(3), range(12)):
        members = tokens.position[b][plain.assignment[b] == k].tolist()
        carried = out.positions[b, k].tolist()
        assert all(p in members for p in carried)
        own = int(out.num_positions[b, k])
        assert own == min(len(members), out.positions.shape[2]) == len(set(map(tuple, carried)))


def test_order_of_tome_is_by_cosine():
    """Four tokens end in one; by cosine the last is nearest to the centre, by distance the first."""
    x = torch.tensor([[1.0, 0.3], [1, 0], [40, 1], [900, 0.1]])
    out = create("position_merge", merger="tome", keep_ratio=0.25, num_positions=4)(Tokens.of(x))
    center = int(out.anchor[0, 0])
    cosine = torch.nn.functional.cosine_similarity(x, x[center][None])
    expected = [center, *(i for i in (-cosine).argsort().tolist() if i != center)]
    assert out.positions[0, 0, :, 0].tolist() == expected
    nearest = [center, *(i for i in (x - x[center]).norm(dim=-1).argsort().tolist() if i != center)]
    assert expected != nearest


def test_plain_means_in_a_cascade():
    """The second stage averages the first one's tokens, whatever they stand for; sizes still add up."""
    x = torch.tensor([0.0, 1, 2, 9])[:, None]
    tokens = replace(Tokens.of(x), size=torch.tensor([[3.0, 1, 1, 1]]))
    out = create("position_merge", merger="pooling", keep_ratio=0.5)(tokens)
    assert out.x[0, :, 0].tolist() == [0.5, 5.5] and out.size.tolist() == [[4, 2]]


def test_identity_where_nothing_merges():
    tokens = Tokens.of(torch.randn(4, 3))
    out = create("position_merge", keep_ratio=0.9, num_positions=2)(tokens)
    assert torch.equal(out.x, tokens.x) and torch.equal(out.positions, tokens.position[:, :, None].expand(-1, -1, 2, -1))
    assert create("position_merge", merger={"method": "pooling", "stride": 1}).is_identity


def test_official_clips_step_by_step():
    """As released, the tokens of one temporal step of the grid merge among themselves, in order of descending score."""
    x = torch.randn(2, 3 * 10, 5, generator=torch.Generator().manual_seed(1))
    method = create("position_merge", keep_ratio=0.45, num_positions=4, mode="official")
    clip = method(Tokens.of(x, Layout("video", (3, 2, 5))))
    assert clip.num_kept == 3 * 5  # ⌈4.5⌉ a step
    for t in range(3):
        alone = method(Tokens.of(x[:, 10 * t : 10 * t + 10], Layout("image", (1, 2, 5))))
        mine = slice(5 * t, 5 * t + 5)
        assert torch.equal(clip.x[:, mine], alone.x) and torch.equal(clip.anchor[:, mine], alone.anchor + 10 * t)
        assert (
            torch.equal(clip.positions[:, mine, :, 1:], alone.positions[..., 1:]) and (clip.positions[:, mine, :, 0] == t).all()
        )
        assert torch.equal(clip.assignment[:, 10 * t : 10 * t + 10], alone.assignment + 5 * t)
    with pytest.raises(ValueError, match="equally many tokens"):
        method(Tokens.of(x[:, :29], Layout("video", (3, 2, 5))))


def test_processed_tokens_by_depth():
    """The cascade of the release keeps 9.1 % at the end and processes 52.6 % on average over 36 layers; one cut before the
    language model to the same ratio would process 45 %."""
    N, stage = 64000, create("position_merge")
    kept_from, n = {0: N}, N
    for layer in (11, 23, 35):
        n = stage.num_kept(n)
        kept_from[layer] = n
    kept = ItemCount("image", N, kept_from=kept_from).kept(36)
    assert kept[0] == N and kept[-1] / N == pytest.approx(0.091125, abs=1e-9)
    assert sum(kept) / (36 * N) == pytest.approx((11 + 12 * 0.45 + 12 * 0.2025 + 0.091125) / 36, abs=1e-9)
    assert round(100 * sum(kept) / (36 * N), 1) == 52.6
    assert sum(ItemCount("image", N, kept_from={0: stage.num_kept(N)}).kept(36)) / (36 * N) == 0.45


@pytest.mark.parametrize(
    "fields",
    [
        {"num_positions": 0},
        {"num_positions": True},
        {"num_positions": "many"},
        {"member_order": "index"},
        {"fill": "last"},
        {"cascade": "drop"},
        {"mode": "released"},
        {"merger": "k_center"},
        {"merger": 3},
        {"merger": {"method": "dpc_knn", "keep_ratio": 0.2}},
        {"merger": "tome", "mode": "official"},
    ],
)
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=rf"^{next(iter(fields))} must .*got"):
        create("position_merge", **fields)


def test_bad_input():
    x = torch.randn(1, 8, 2)
    for positions in (torch.rand(1, 8, 1, 3), torch.zeros(1, 8, 3).long(), torch.zeros(1, 7, 1, 3).long()):
        with pytest.raises(ValueError, match="positions must be integers of shape"):
            create("position_merge")(Tokens.of(x, positions=positions))
    with pytest.raises(ValueError, match="a member"):
        carry(
            torch.zeros(1, 2, 1, 3).long(),
            torch.ones(1, 2).long(),
            torch.tensor([[0, 0]]),
            torch.tensor([[0, 1]]),
            2,
            2,
            "first",
        )


def test_sections():
    method = create("position_merge", num_positions=16)
    method.check_sections((16, 24, 24))
    with pytest.raises(ValueError, match=r"num_positions must be at most .*\[2, 3, 3\], got 16"):
        method.check_sections((2, 3, 3))
    with pytest.raises(ValueError, match=r"num_positions must divide .*\[16, 24, 24\].*got 16"):
        create("position_merge", num_positions=16, mode="official").check_sections((16, 24, 24))
    create("position_merge", num_positions=8, mode="official").check_sections((16, 24, 24))
    create("position_merge").check_sections((2, 3, 3))


def test_baselines_keep_one_position_each_of_the_same_merging():
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(3))
    line = (5 + torch.arange(16))[None, :, None, None].expand(2, 16, 1, 3)
    row, column = (7 + torch.arange(16) // 4), (7 + torch.arange(16) % 4)
    square = torch.stack([torch.full((16,), 7), row, column], -1)[None, :, None].expand(2, 16, 1, 3)
    for ids in (line, square):
        tokens = Tokens.of(x, positions=ids)
        carry_, anchor, renumber = (
            create("position_merge", keep_ratio=0.5, positions=p)(tokens) for p in ("carry", "anchor", "renumber")
        )
        assert torch.equal(carry_.assignment, anchor.assignment) and torch.equal(carry_.assignment, renumber.assignment)
        assert torch.equal(carry_.x, renumber.x) and torch.equal(carry_.size, anchor.size)
        assert torch.equal(anchor.positions[:, :, 0], ids[:, :, 0].gather(1, anchor.anchor[..., None].expand(-1, -1, 3)))
        assert torch.equal(anchor.positions[:, :, 0], carry_.positions[:, :, 0])
        assert renumber.num_positions.eq(1).all()
    assert renumber.positions[0, :, 0].tolist() == [[7, 7 + k // 3, 7 + k % 3] for k in range(8)]
    out = create("position_merge", keep_ratio=0.5, positions="renumber")(Tokens.of(x, positions=line))
    assert out.positions[1, :, 0].tolist() == [[5 + k] * 3 for k in range(8)]
    with pytest.raises(ValueError, match="positions must be one of 'carry', 'anchor', 'renumber'; got 'none'"):
        create("position_merge", positions="none")
