"""How many sequences each optimizer step has."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from deepseek_exp.config.schema import TrainerConfig


@dataclass(frozen=True)
class BatchSizes:
    """How many sequences each optimizer step has: a ramp in equal multiples of the first step's, then a constant.

    Step s of the first n_ramp_steps has first_seqs * (1 + floor((seqs / first_seqs - 1) * s / n_ramp_steps)) sequences,
    all later ones have seqs. So the step that a position belongs to follows from the position alone. Source: Brown et
    al. 2020, "Language Models are Few-Shot Learners", appendix B, which raises the batch linearly.

    Attributes:
        seqs: sequences of a step after the ramp; a multiple of first_seqs.
        first_seqs: sequences of the first step; that of `seqs` without a ramp.
        n_ramp_steps: steps until `seqs` are reached.
    """

    seqs: int
    first_seqs: int
    n_ramp_steps: int = 0

    @cached_property
    def _starts(self) -> list[int]:
        """Positions at which the steps of the ramp begin, and the one at which it ends."""
        return [0, *accumulate(self._in_ramp(step) for step in range(self.n_ramp_steps))]

    def _in_ramp(self, step: int) -> int:
        return self.first_seqs * (1 + (self.seqs // self.first_seqs - 1) * step // self.n_ramp_steps)

    def seqs_from(self, position: int) -> int:
        """Return the sequences of the step that begins at a position, a number of sequences consumed."""
        if position >= self._starts[-1]:
            return self.seqs
        return self._in_ramp(bisect_right(self._starts, position) - 1)

    def total(self, first_step: int, last_step: int) -> int:
        """Return the sequences of the steps from first_step up to last_step, the latter left out."""
        return self._before(last_step) - self._before(first_step)

    def _before(self, step: int) -> int:
        within = min(step, self.n_ramp_steps)
        return self._starts[within] + (step - within) * self.seqs

    def steps_for(self, n_seqs: float) -> int:
        """Return the first step at which n_seqs sequences have been consumed."""
        if n_seqs <= self._starts[-1]:
            return bisect_left(self._starts, n_seqs)
        return self.n_ramp_steps + math.ceil((n_seqs - self._starts[-1]) / self.seqs)


def batch_sizes(t: TrainerConfig) -> BatchSizes:
    """Return how many sequences each optimizer step of a training has."""
    return BatchSizes(t.global_batch_seqs, t.batch_ramp_seqs or t.global_batch_seqs, t.batch_ramp_steps)
