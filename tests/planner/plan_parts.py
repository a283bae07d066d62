"""Experiments and layouts that the planner's tests share."""

from __future__ import annotations

from deepseek_exp.config import ActivationCheckpointing, ExperimentConfig
from deepseek_exp.planner.layers import layers_of
from deepseek_exp.planner.memory import Layout
from deepseek_exp.planner.search import Plan, make_plan
from deepseek_exp.topology import Degrees
from tests.test_config import composed


def experiment(*overrides: str) -> ExperimentConfig:
    """Compose one to plan."""
    return composed("do=plan", *overrides)


def layout(
    dp: int = 1, tp: int = 1, pp: int = 1, ep: int = 1, *, zero: int = 0, micro: int = 1, full=False, sequence=False
) -> Layout:
    """Give a layout; nothing is cut unless told."""
    kind = ActivationCheckpointing.full if full else ActivationCheckpointing.none
    return Layout(Degrees(dp, tp, pp, ep), zero, micro, kind, sequence)


def planned(exp: ExperimentConfig, how: Layout) -> Plan:
    """Plan one layout."""
    return make_plan(exp, how, layers_of(exp.model, exp.data.seq_len))
