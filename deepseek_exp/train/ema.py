"""A moving average of the weights, kept in the optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_exp.checkpoint.shards import AVERAGE


@torch.no_grad()
def update_average(optimizer: Any, decay: float) -> None:
    """Update the average of all weights after a step: a = decay a + (1 - decay) w. After the first step, a = w.

    The average is one more elementwise state of the optimizer, in fp32, of the masters if there are any. So it is
    sharded, saved, resumed and loaded in other layouts like a moment. Source: Polyak and Juditsky 1992, "Acceleration
    of Stochastic Approximation by Averaging", in its exponential form.

    Args:
        optimizer: torch's, one with masters, or DeepSpeed's around one of these, after a step.
        decay: in [0, 1).
    """
    base = getattr(optimizer, "optimizer", optimizer)
    averages, weights = [], []
    for owner in _owners(optimizer):
        if AVERAGE in base.state[owner]:
            averages.append(base.state[owner][AVERAGE])
            weights.append(owner.detach())
        else:
            base.state[owner][AVERAGE] = owner.detach().clone()
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - decay)


def drop_average(optimizer: Any) -> None:
    """Remove the average of a checkpoint, which a training without one would leave behind."""
    base = getattr(optimizer, "optimizer", optimizer)
    for owner in _owners(optimizer):
        if owner in base.state:
            base.state[owner].pop(AVERAGE, None)


def _owners(optimizer: Any) -> list[Tensor]:
    """Return the tensors that the optimizer updates; ZeRO 3 takes them out of its groups between steps."""
    base = getattr(optimizer, "optimizer", optimizer)
    flat: list[Tensor] | None = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    return flat if flat is not None else [p for group in base.param_groups for p in group["params"]]
