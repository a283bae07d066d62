"""The rules of a configuration: the range of each key, and what must hold between keys and sections."""

from __future__ import annotations

from typing import Any

from deepseek_exp.config import (
    ExperimentConfig,
)
from deepseek_exp.config.rules.bounds import range_problems
from deepseek_exp.config.rules.classes import class_problems
from deepseek_exp.config.rules.data import data_problems, mixture_problems, vocabulary_problems
from deepseek_exp.config.rules.kernels import (
    adamw_problems,
    device_problems,
    fp8_problems,
    kernel_problems,
    weight_bits_problems,
)
from deepseek_exp.config.rules.launch import launch_problems
from deepseek_exp.config.rules.model import model_problems
from deepseek_exp.config.rules.parallel import layout_problems
from deepseek_exp.config.rules.trainer import batch_problems, length_problems
from deepseek_exp.config.rules.values import text_problems, tracking_problems
from deepseek_exp.config.rules.verbs import export_problems, sample_problems, temperature_problems, verify_problems
from deepseek_exp.errors import Problem


def problems(exp: ExperimentConfig) -> list[Problem]:
    """Find everything that is wrong with an experiment, without importing torch or touching the network."""
    found = [*text_problems(exp), *range_problems(exp, "")]
    if any(_is_huge(p.value) for p in found):  # the rules would count up to it
        return found
    for rule in RULES:
        found += rule(exp)
    return found


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value > 10**9


RULES = (
    model_problems,
    sample_problems,
    temperature_problems,
    export_problems,
    length_problems,
    vocabulary_problems,
    batch_problems,
    data_problems,
    mixture_problems,
    tracking_problems,
    class_problems,
    device_problems,
    kernel_problems,
    fp8_problems,
    adamw_problems,
    weight_bits_problems,
    layout_problems,
    launch_problems,
    verify_problems,
)
