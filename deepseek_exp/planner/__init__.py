"""The cost of a configuration before anything is built: parameters, FLOPs, memory, time, price, by arithmetic only."""

from deepseek_exp.planner.adapters import coverage
from deepseek_exp.planner.brief import Brief, brief
from deepseek_exp.planner.choice import choose, misfit
from deepseek_exp.planner.cost import flops_per_token, parameters
from deepseek_exp.planner.graph import plan_artifacts
from deepseek_exp.planner.layers import stage_bounds
from deepseek_exp.planner.memory import optimizer_bytes
from deepseek_exp.planner.report import report
from deepseek_exp.planner.speed import bubble_fraction

__all__ = [
    "Brief",
    "brief",
    "bubble_fraction",
    "choose",
    "coverage",
    "flops_per_token",
    "misfit",
    "optimizer_bytes",
    "parameters",
    "plan_artifacts",
    "report",
    "stage_bounds",
]
