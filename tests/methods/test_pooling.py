"""Golden values: tests/golden/pooling_stagewise_dev.npz, official arrays computed by Beckschen/LLaVolta @ 31ec151."""

import pytest
import torch

from mmcompress import create, num_kept
from mmcompress.tokens import Tokens


def pool_rows(case, **fields):
    """The whole sequence after pooling its items: hidden [B, L', D] and positions [B, L'], text untouched, as a seam would do
    it."""
    hidden, positions = case["hidden"].float(), case["positions"]
    out = []
    for row, starts in enumerate(case["starts"]):
        parts, ids, at = [], [], 0
        for start in starts:
            end = start + case["visual_length"]
            result = create("pooling", **fields)(Tokens.of(hidden[row, start:end]))
            parts += [hidden[row, at:start], result.x[0]]
            ids += [positions[row, at:start], positions[row, start:end][result.anchor[0]]]
            at = end
        out.append((torch.cat([*parts, hidden[row, at:]]), torch.cat([*ids, positions[row, at:]])))
    return torch.stack([h for h, _ in out]), torch.stack([p for _, p in out])


def test_golden_stride(golden):
    cases = golden("pooling_stagewise", "pool")
    for case in cases:
        hidden, positions = pool_rows(case, stride=case["stride"], tail="drop")
        torch.testing.assert_close(hidden, case["out_hidden"], rtol=0, atol=1e-6)
        assert torch.equal(positions, case["out_positions"])
        assert case["released_positions_exact"] and torch.equal(positions, case["out_positions_official"])
        hidden, positions = pool_rows(case, stride=case["stride"])
        torch.testing.assert_close(hidden, case["out_hidden_partial"], rtol=0, atol=1e-5)
        assert torch.equal(positions, case["out_positions_partial"])


def test_golden_items(golden):
    for case in golden("pooling_stagewise", "pool"):
        start = case["starts"][0][0]
        tokens = Tokens.of(case["hidden"][0, start : start + case["visual_length"]].float())
        for name, fields in (("partial", {"stride": case["stride"]}), ("balanced", {"keep_ratio": case["keep_ratio"]})):
            out = create("pooling", **fields)(tokens)
            torch.testing.assert_close(out.x[0], case[f"item_{name}"], rtol=0, atol=1e-5)
            assert torch.equal(out.anchor[0], case[f"item_{name}_anchor"].long())
        assert num_kept(case["visual_length"], case["keep_ratio"]) == case["num_kept"]


def test_by_hand():
    x = torch.tensor([1.0, 3, 5, 7, 9, 11, 20])[:, None]
    out = create("pooling", stride=3)(Tokens.of(x))
    assert out.x[0, :, 0].tolist() == [3, 9, 20]
    assert (out.anchor.tolist(), out.assignment.tolist(), out.size.tolist()) == (
        [[1, 4, 6]],
        [[0, 0, 0, 1, 1, 1, 2]],
        [[3, 3, 1]],
    )
    out = create("pooling", stride=3, tail="drop")(Tokens.of(x))
    assert (out.x[0, :, 0].tolist(), out.assignment.tolist()) == ([3, 9], [[0, 0, 0, 1, 1, 1, -1]])
    out = create("pooling", keep_ratio=0.4)(Tokens.of(x))  # 3 groups of 3, 2 and 2
    assert (out.anchor.tolist(), out.size.tolist()) == ([[1, 3, 5]], [[3, 2, 2]])


@pytest.mark.parametrize(("stride", "full", "count"), [(5, 115, 116), (7, 82, 83), (8, 72, 72), (600, 0, 1)])
def test_closed_forms(stride, full, count):
    x = 35.0 + torch.arange(576)[:, None]
    out = create("pooling", stride=stride)(Tokens.of(x))
    assert out.num_kept == count
    group = torch.arange(full)
    assert torch.equal(out.x[0, :full, 0], 35 + stride * group + (stride - 1) / 2)
    assert torch.equal(out.anchor[0, :full], stride * group + (stride - 1) // 2)


def test_ratio_equals_stride_where_both_divide():
    tokens = Tokens.of(torch.randn(2, 96, 5, generator=torch.Generator().manual_seed(0)))
    by_ratio, by_stride = create("pooling", keep_ratio=0.125)(tokens), create("pooling", stride=8)(tokens)
    assert torch.equal(by_ratio.x, by_stride.x) and torch.equal(by_ratio.anchor, by_stride.anchor)


def test_mean_and_gradient_are_conserved():
    x = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = create("pooling", keep_ratio=0.3)(Tokens.of(x))
    torch.testing.assert_close((out.x * out.size[..., None]).sum(1) / 50, x.mean(1))
    out.x.sum().backward()
    sizes = out.size.gather(1, out.assignment)
    torch.testing.assert_close(x.grad, (1 / sizes)[..., None].expand_as(x))


def test_merged_tokens_weigh_what_they_stand_for():
    tokens = Tokens.of(torch.tensor([[0.0], [4.0]]))
    tokens = Tokens(tokens.x, tokens.position, tokens.group, torch.tensor([[3.0, 1.0]]))
    out = create("pooling", stride=2)(tokens)
    assert (out.x.item(), out.size.item()) == (1.0, 4.0)


def test_identity_settings():
    tokens = Tokens.of(torch.randn(1, 7, 3))
    for fields in ({"stride": 1}, {"keep_ratio": 1}):
        method = create("pooling", **fields)
        assert method.is_identity and method(tokens).x is tokens.x and method.num_kept(7) == 7


@pytest.mark.parametrize("fields", [{"stride": 0}, {"stride": 2.0}, {"stride": True}, {"stride": "2"}, {"tail": "keep"}])
def test_bad_fields(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} must be .*got"):
        create("pooling", **fields)


def test_drop_must_leave_something():
    with pytest.raises(ValueError, match="stride 8 with tail='drop' would delete an item of 5 tokens"):
        create("pooling", stride=8, tail="drop")(Tokens.of(torch.randn(5, 2)))
