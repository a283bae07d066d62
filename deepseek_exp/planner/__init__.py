"""What a configuration costs before anything is built: parameters, FLOPs, memory, time, price, by arithmetic alone."""

from deepseek_exp.planner.choice import choose, misfit
from deepseek_exp.planner.cost import flops_per_token, parameters
from deepseek_exp.planner.graph import plan_artifacts
from deepseek_exp.planner.layers import stage_bounds
from deepseek_exp.planner.report import report

__all__ = [
    "choose",
    "flops_per_token",
    "misfit",
    "parameters",
    "plan_artifacts",
    "report",
    "stage_bounds",
]
