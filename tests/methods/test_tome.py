"""Golden values: tests/golden/tome_dev.npz, official arrays computed by facebookresearch/ToMe @ af95e4b (black-box outputs;
its code is non-commercial and nothing here is taken from it). Protected tokens, schedules and encoders belong to the operator
and the encoder placement.
"""

import pytest
import torch

from mmcompress import create
from mmcompress.tokens import Layout, Tokens


def tokens_of(case):
    tokens = Tokens.of(case["x"], keys=case["metric"])
    return Tokens(tokens.x, tokens.position, tokens.group, case["size"][..., 0], Layout(), tokens.signals)


def test_golden(golden):
    cases = [c for c in golden("tome") if c["kind"] in ("match", "match_ours") and not c.get("cls")]
    assert len(cases) == 3
    for case in cases:
        out = create("tome", r=case["r"], metric="keys")(tokens_of(case))
        assert out.num_kept == case["N"] - case.get("r_effective", case["r"])
        released = case["assignment"].long()  # the same clusters, numbered in the released order
        for b in range(case["B"]):
            slot = torch.full((out.num_kept,), -1)
            slot[released[b]] = out.assignment[b]
            assert torch.equal(slot[released[b]], out.assignment[b]) and sorted(slot.tolist()) == list(range(out.num_kept))
            torch.testing.assert_close(out.x[b][slot], case["out"][b], rtol=0, atol=1e-5)
            assert torch.equal(out.size[b][slot], case["size_out"][b, :, 0])
            if "anchor" in case:
                assert torch.equal(out.anchor[b][slot], case["anchor"][b].long())
        if "unmerged" in case:
            ones = tokens_of(case | {"size": torch.ones_like(case["size"])})
            plain = create("tome", r=case["r"], metric="keys")(ones)
            back = plain.x.gather(1, plain.assignment[..., None].expand_as(case["x"]))
            torch.testing.assert_close(back, case["unmerged"], rtol=0, atol=1e-5)


METRIC = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [0.5, 0.87], [1, 0.1], [-1, 0]])


@pytest.mark.parametrize(
    ("r", "anchor", "assignment", "size"),
    [(2, [0, 1, 3, 5], [0, 1, 2, 2, 1, 3], [1, 2, 2, 1]), (3, [1, 3, 5], [0, 0, 1, 1, 0, 2], [3, 2, 1])],
)
def test_by_hand(r, anchor, assignment, size):
    out = create("tome", r=r)(Tokens.of(METRIC))
    assert (out.anchor[0].tolist(), out.assignment[0].tolist(), out.size[0].tolist()) == (anchor, assignment, size)
    same = create("tome", keep_ratio=(6 - r) / 6)(Tokens.of(METRIC))
    assert torch.equal(same.assignment, out.assignment)


def test_equal_tokens():
    out = create("tome", r=3)(Tokens.of(torch.ones(10, 4)))
    assert sorted(out.size[0].tolist()) == [1] * 6 + [4] and torch.equal(out.x, torch.ones(1, 7, 4))


def test_rounds_below_one_half():
    tokens = Tokens.of(torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)))
    out = create("tome", keep_ratio=0.2)(tokens)
    half = create("tome", r=20)(tokens)
    quarter = create("tome", r=10)(tokens.take(half))
    last = create("tome", r=2)(tokens.take(half).take(quarter))
    assert out.num_kept == 8
    composed = last.assignment.gather(1, quarter.assignment.gather(1, half.assignment))
    assert torch.equal(out.assignment, composed)
    torch.testing.assert_close(out.x, last.x)


def test_sums_are_conserved_and_scale_does_not_matter():
    x = torch.randn(1, 33, 6, generator=torch.Generator().manual_seed(1))
    tokens = Tokens.of(x)
    size = torch.randint(1, 5, (1, 33), generator=torch.Generator().manual_seed(2)).float()
    tokens = Tokens(tokens.x, tokens.position, tokens.group, size)
    out = create("tome", keep_ratio=0.3)(tokens)
    torch.testing.assert_close(out.size.sum(), size.sum())
    torch.testing.assert_close((out.x * out.size[..., None]).sum(1), (x * size[..., None]).sum(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(create("tome")(Tokens.of(x * 16)).assignment, create("tome")(Tokens.of(x)).assignment)


def test_identity_settings():
    tokens = Tokens.of(torch.randn(1, 7, 3))
    for fields in ({"r": 0}, {"keep_ratio": 1}):
        assert create("tome", **fields)(tokens).x is tokens.x
    assert create("tome", metric="keys").reads == ("keys",) and create("tome").reads == ()


@pytest.mark.parametrize("fields", [{"r": -1}, {"r": 2.0}, {"r": True}, {"metric": "values"}])
def test_bad_fields(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"{name} must be .*got"):
        create("tome", **fields)


def test_bad_inputs():
    with pytest.raises(ValueError, match="reads the signal keys, got none"):
        create("tome", metric="keys")(Tokens.of(METRIC))
    with pytest.raises(ValueError, match=r"keys must have shape \[B, N"):
        create("tome", metric="keys")(Tokens.of(METRIC, keys=torch.randn(1, 5, 2)))
    with pytest.raises(ValueError):
        create("tome")(Tokens.of(METRIC * torch.nan))
