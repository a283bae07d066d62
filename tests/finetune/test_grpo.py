"""Policy optimization: advantages, the clipped loss, and the step on sampled completions."""

from __future__ import annotations

import torch

from deepseek_exp.finetune.grpo import advantages, clipped_loss, informative


def test_advantages_are_differences_from_the_mean_of_the_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0])
    assert advantages(rewards, 4).tolist() == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0, 0.0, 0.0]
    assert informative(rewards, 4).tolist() == [True] * 4 + [False] * 4


def test_clipped_loss():
    ratio = torch.tensor([[1.0, 1.5, 0.5], [1.0, 1.5, 0.5]])
    log_probs = ratio.log().requires_grad_()
    loss, clipped = clipped_loss(log_probs, torch.zeros(2, 3), torch.tensor([[2.0], [-2.0]]), 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([[-2.0, -2.6, -1.0], [2.0, 3.0, 1.6]]))
    assert clipped.tolist() == [[0, 1, 0], [0, 0, 1]]
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-2.0, 0.0, -1.0], [2.0, 3.0, 0.0]]))
