"""The learning-rate schedule, a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from deepseek_exp.config import DecayShape, OptimConfig, Schedule


def schedule_of(cfg: OptimConfig, max_steps: int) -> Callable[[int], float]:
    """Return the function from the number of steps done to the learning rate as a fraction of the peak."""
    warmup, ratio = cfg.warmup_steps, cfg.min_lr_ratio
    if cfg.schedule is Schedule.cosine:
        return lambda step: lr_factor(step, warmup, max_steps, ratio)
    fraction, shape = cfg.decay_fraction, cfg.decay_shape
    return lambda step: wsd_factor(step, warmup, max_steps, ratio, fraction, shape)


def lr_factor(step: int, warmup_steps: int, max_steps: int, min_ratio: float) -> float:
    """Return the learning rate of a step as a fraction of the peak: linear warm-up, then cosine decay to `min_ratio`.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts.

    Args:
        step: number of steps done, 0 before the first.
        warmup_steps: number of steps until the peak.
        max_steps: total number of steps.
        min_ratio: the factor at max_steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd_factor(
    step: int, warmup_steps: int, max_steps: int, min_ratio: float, decay_fraction: float, shape: DecayShape
) -> float:
    """Return the learning rate of a step as a fraction of the peak: warm-up, stable, decay.

    The rate is constant after a linear warm-up and falls to `min_ratio` in the last decay_fraction * max_steps steps,
    but no earlier than the warm-up ends. The factor before the decay does not depend on max_steps, so a run that is
    resumed from there with more steps has the same past as a longer run. Sources: Hu et al. 2024, "MiniCPM", section 4;
    Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", for the shape
    1 - sqrt.

    Args:
        step: number of steps done, 0 before the first.
        warmup_steps: number of steps until the peak.
        max_steps: total number of steps.
        min_ratio: the factor at max_steps.
        decay_fraction: length of the decay / max_steps.
        shape: of the decay.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    n_decay = min(max(1, round(decay_fraction * max_steps)), max_steps - warmup_steps)
    progress = min(1.0, max(0, step - (max_steps - n_decay)) / n_decay)
    falls = {
        DecayShape.linear: progress,
        DecayShape.sqrt: math.sqrt(progress),
        DecayShape.cosine: 0.5 * (1 - math.cos(math.pi * progress)),
    }
    return 1 - (1 - min_ratio) * falls[shape]
