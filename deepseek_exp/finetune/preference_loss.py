"""Losses on pairs of a chosen and a rejected completion: DPO, IPO and ORPO.

Shapes: pairs; a last dimension of 2 holds the chosen completion, then the rejected one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_exp.config import DPOConfig, PreferenceLoss


class Preference(NamedTuple):
    """The losses of pairs.

    Attributes:
        loss: (pairs,), to differentiate.
        rewards: (pairs, 2), implicit rewards of both completions, without gradient.
    """

    loss: Tensor
    rewards: Tensor


def preference_loss(cfg: DPOConfig, policy: Tensor, reference: Tensor | None, n_tokens: Tensor) -> Preference:
    """Return the loss and the implicit rewards of pairs.

    With r = log pi(y | x) - log pi_ref(y | x) for the chosen (c) and the rejected (r) completion y:

        dpo   -(1 - s) log sigmoid(beta (r_c - r_r)) - s log sigmoid(-beta (r_c - r_r))
        ipo   (r_c / |y_c| - r_r / |y_r| - 1 / (2 beta))^2
        orpo  -l_c - beta log sigmoid(o_c - o_r)

    where s is the label smoothing, |y| the number of tokens, l = log pi(y | x) / |y|, o = l - log(1 - exp(l)). Rewards
    are beta r, for orpo beta l. Sources: Rafailov et al. 2023, "Direct Preference Optimization", section 4; Azar et al.
    2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", equation 17, with log-ratios
    per token as in TRL; Hong et al. 2024, "ORPO", section 4.

    Args:
        cfg: loss, beta and label_smoothing.
        policy: (pairs, 2), log-probability of each completion.
        reference: (pairs, 2), the same under the reference; None for orpo, which has none.
        n_tokens: (pairs, 2), number of tokens of each completion, at least 1.
    """
    if cfg.loss is PreferenceLoss.orpo:
        mean = policy / n_tokens
        odds = mean - _log_complement(mean)  # (pairs, 2)
        loss = -mean[:, 0] - cfg.beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
        return Preference(loss, cfg.beta * mean.detach())
    assert reference is not None, "dpo and ipo compare with a reference"
    ratio = policy - reference
    rewards = cfg.beta * ratio.detach()
    if cfg.loss is PreferenceLoss.ipo:
        mean = ratio / n_tokens
        return Preference((mean[:, 0] - mean[:, 1] - 1 / (2 * cfg.beta)).square(), rewards)
    margin = cfg.beta * (ratio[:, 0] - ratio[:, 1])  # (pairs,)
    smoothing = cfg.label_smoothing
    loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    return Preference(loss, rewards)


def accuracy(rewards: Tensor) -> Tensor:
    """Return for each pair whether the chosen reward is higher, (pairs,): 1, 0, or 1/2 if both are equal."""
    return (1 + (rewards[:, 0] - rewards[:, 1]).sign()) / 2


def _log_complement(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of x < 0, accurate near 0 and far below.

    Source: Maechler 2012, "Accurately Computing log(1 - exp(-|a|))", equation 7.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    # each form gets values at which its derivative is finite, also where the other one is used
    return torch.where(
        near, (-torch.expm1(torch.where(near, x, -0.5))).log(), torch.log1p(-torch.where(near, -1.0, x).exp())
    )
