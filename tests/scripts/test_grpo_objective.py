"""The objective, against examples worked out by hand."""

import math

import pytest
import torch
from grpo.objective import advantages, objective


def test_advantages_are_normalised_within_each_group() -> None:
    # Group 1: mean 0.5, unbiased standard deviation 0.5; group 2: mean 2, standard deviation 1.
    got = advantages(torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 3.0]), samples=3)
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0]), rtol=0, atol=3e-4)


def test_a_group_that_agrees_has_no_advantage() -> None:
    assert advantages(torch.full((4,), 0.3), samples=4).abs().max() == 0


def test_the_loss_of_a_hand_written_example() -> None:
    # A = +2: ratio 1.5 clips to 1.2, ratio 0.5 stays. A = -1: ratio 1.5 stays, ratio 0.5 clips to 0.8.
    behaviour = torch.zeros(2, 2)
    present = torch.log(torch.tensor([[1.5, 0.5], [1.5, 0.5]]))
    got = objective(
        present, behaviour, torch.tensor([2.0, -1.0]), torch.zeros(2, 2, dtype=torch.int64), clip=0.2, max_staleness=1
    )
    assert got.loss.item() == pytest.approx(-(2.4 + 1.0 - 1.5 - 0.8) / 4)
    assert got.masked_tokens == 0


def test_without_staleness_the_gradient_is_the_policy_gradient() -> None:
    present = torch.full((2, 3), -1.0, requires_grad=True)
    staleness = torch.zeros(2, 3, dtype=torch.int64)
    objective(
        present, present.detach(), torch.tensor([1.0, -2.0]), staleness, clip=0.2, max_staleness=0
    ).loss.backward()
    torch.testing.assert_close(present.grad, -torch.tensor([[1.0], [-2.0]]).expand(2, 3) / 6)


def test_tokens_that_are_too_old_are_left_out() -> None:
    present = torch.zeros(1, 4, requires_grad=True)
    staleness = torch.tensor([[0, 1, 2, 3]])
    got = objective(present, torch.zeros(1, 4), torch.ones(1), staleness, clip=0.2, max_staleness=1)
    got.loss.backward()
    assert got.masked_tokens == 2
    assert got.staleness == 1.5
    assert present.grad is not None
    assert present.grad.tolist() == [[-0.5, -0.5, 0.0, 0.0]]


def test_an_old_tokens_ratio_may_overflow_without_harm() -> None:
    present = torch.tensor([[0.0, 200.0]], requires_grad=True)
    staleness = torch.tensor([[0, 9]])
    got = objective(present, torch.zeros(1, 2), torch.ones(1), staleness, clip=0.2, max_staleness=1)
    got.loss.backward()
    assert math.isfinite(got.loss.item())
    assert present.grad is not None
    assert present.grad.tolist() == [[-1.0, 0.0]]


def test_a_batch_of_old_tokens_only_teaches_nothing() -> None:
    staleness = torch.full((1, 2), 5)
    got = objective(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), staleness, clip=0.2, max_staleness=1)
    assert got.loss.item() == 0


def test_tokens_from_the_future_are_refused() -> None:
    with pytest.raises(ValueError, match="down to -1"):
        objective(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.tensor([[-1]]), clip=0.2, max_staleness=1)
