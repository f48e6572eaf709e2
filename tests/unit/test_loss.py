"""The policy-gradient loss and its gradient, by hand."""

import pytest
import torch

from poweropd_megatron.objectives.loss import policy_gradient_loss


def test_the_loss_is_minus_the_sum_of_reward_times_log_prob() -> None:
    logp = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    reward = torch.tensor([0.5, -0.25, 1.0])
    loss = policy_gradient_loss(logp, reward)
    assert loss.item() == 0.5 - 0.5 + 4.0
    loss.backward()
    assert torch.equal(logp.grad, -reward)


def test_the_reward_is_held_constant() -> None:
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    reward = logp * 3
    policy_gradient_loss(logp, reward).backward()
    assert torch.equal(logp.grad, torch.tensor([3.0, 6.0]))


def test_tokens_without_reward_have_no_gradient_even_at_probability_zero() -> None:
    logp = torch.tensor([-torch.inf, -1.0], requires_grad=True)
    loss = policy_gradient_loss(logp, torch.tensor([0.0, 2.0]))
    assert loss.item() == 2.0
    loss.backward()
    assert torch.equal(logp.grad, torch.tensor([0.0, -2.0]))


def test_no_tokens_make_a_loss_of_zero_that_can_be_differentiated() -> None:
    logp = torch.empty(0, requires_grad=True)
    loss = policy_gradient_loss(logp, torch.empty(0))
    assert loss.item() == 0
    loss.backward()
    assert logp.grad.shape == (0,)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_reward_is_not_hidden(bad: float) -> None:
    loss = policy_gradient_loss(torch.tensor([-1.0, -1.0]), torch.tensor([bad, 1.0]))
    assert not loss.isfinite()
