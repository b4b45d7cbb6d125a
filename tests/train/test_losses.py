import pytest
import torch

from mmcompress import create
from mmcompress.tokens import Tokens
from mmcompress.train.losses import commitment_loss


def test_by_hand():
    x = torch.tensor([[[2.0, 0], [0, 3], [-1, 0], [5, 0]]])
    assignment = torch.tensor([[0, 0, 1, -1]])
    # the codes are (1/2, 1/2) and (-1, 0): 1/2 for each of the first two tokens, 0 for the third, the last is dropped
    assert commitment_loss(x, assignment).item() == pytest.approx(1 / 3)
    assert commitment_loss(x.bfloat16(), assignment).dtype == torch.float32
    assert commitment_loss(x, torch.full((1, 4), -1)).item() == 0


def test_gradient_stops_at_the_codes():
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assignment = torch.tensor([[0, 1, 0, 1, 2, 2], [0, 0, 0, 0, 1, -1]])
    loss = commitment_loss(x, assignment)
    loss.backward()
    u = torch.nn.functional.normalize(x, dim=-1)
    members = [[u[b][assignment[b] == k].mean(0).detach() for k in range(3)] for b in range(2)]
    rows = [
        (u[b, i] - members[b][assignment[b, i]]).square().sum() for b in range(2) for i in range(6) if assignment[b, i] >= 0
    ]
    want = torch.stack(rows).mean()
    assert loss.item() == pytest.approx(want.item())
    torch.testing.assert_close(x.grad, torch.autograd.grad(want, x)[0])
    assert not x.grad[1, 5].any()


def test_tokens_that_are_drawn_to_their_codes_lie_closer():
    x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assignment = create("vq_hash", num_codes=5)(Tokens.of(x)).assignment
    losses = []
    for _ in range(5):
        loss = commitment_loss(x, assignment)
        losses.append(loss.item())
        x = (x - 5 * torch.autograd.grad(loss, x)[0]).detach().requires_grad_()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_wrong_shapes():
    with pytest.raises(ValueError, match="x must have shape"):
        commitment_loss(torch.zeros(1, 4, 2), torch.zeros(1, 5, dtype=torch.int64))
