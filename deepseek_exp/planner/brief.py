"""The plan of an experiment in a few numbers, to be compared with that of others."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.config.batch_sizes import batch_sizes
from deepseek_exp.planner.cost import parameters
from deepseek_exp.planner.layers import layers_of
from deepseek_exp.planner.memory import USABLE
from deepseek_exp.planner.search import asked_layout, best_plans, make_plan


@dataclass(frozen=True)
class Brief:
    """The cost of training an experiment in its layout.

    Attributes:
        n_parameters: of the model.
        memory_bytes: of the rank that needs the most.
        usable_bytes: memory of one GPU of the cluster that can be used.
        step_seconds: time of a step.
        seconds: time of all steps.
        tokens: tokens of all steps.
    """

    n_parameters: int
    memory_bytes: float
    usable_bytes: float
    step_seconds: float
    seconds: float
    tokens: int

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory_bytes <= self.usable_bytes


def brief(exp: ExperimentConfig) -> Brief:
    """Return the plan of an experiment whose layout is legal, in the layout that parallel=auto chooses if it is set."""
    if exp.parallel.auto:
        plan = best_plans(exp, 1)[0]
    else:
        plan = make_plan(exp, asked_layout(exp), layers_of(exp.model, exp.data.seq_len))
    counted, step_seconds = parameters(exp.model), plan.speed.step_seconds
    n_seqs = batch_sizes(exp.trainer).total(0, exp.trainer.max_steps)
    return Brief(
        counted.total + counted.mtp,
        max(memory.total for memory in plan.memory),
        USABLE * exp.cluster.memory_bytes,
        step_seconds,
        n_seqs / exp.trainer.global_batch_seqs * step_seconds,
        n_seqs * exp.data.seq_len,
    )
