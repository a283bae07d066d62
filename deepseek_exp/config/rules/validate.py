"""The rules of a configuration: the range of each key, and what must hold between keys and sections."""

from __future__ import annotations

from typing import Any

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.rules.bounds import range_problems
from deepseek_exp.config.rules.branches import branch_problems
from deepseek_exp.config.rules.chat import chat_problems, isolation_problems
from deepseek_exp.config.rules.classes import class_problems
from deepseek_exp.config.rules.data import data_problems, mixture_problems, vocabulary_problems
from deepseek_exp.config.rules.evaluate import evaluate_problems
from deepseek_exp.config.rules.finetune import finetune_problems
from deepseek_exp.config.rules.kernels import (
    adamw_problems,
    cuda_graph_problems,
    device_problems,
    fp8_problems,
    kernel_problems,
    weight_bits_problems,
)
from deepseek_exp.config.rules.launch import launch_problems
from deepseek_exp.config.rules.lora import lora_problems
from deepseek_exp.config.rules.model import model_problems
from deepseek_exp.config.rules.optim import lr_multiplier_problems
from deepseek_exp.config.rules.parallel import layout_problems
from deepseek_exp.config.rules.trainer import batch_problems, length_problems, ramp_problems
from deepseek_exp.config.rules.values import text_problems, tracking_problems
from deepseek_exp.config.rules.verbs import (
    average_problems,
    export_problems,
    sample_problems,
    temperature_problems,
    verify_problems,
)
from deepseek_exp.errors import Problem


def problems(exp: ExperimentConfig, machine: Machine) -> list[Problem]:
    """Find everything that is wrong with an experiment on a machine, without importing torch or touching the network.

    Args:
        exp: the experiment, of the right types.
        machine: where it is to run; the rules read nothing of this machine themselves but files and folders.
    """
    found = [*text_problems(exp), *range_problems(exp, "")]
    if any(_is_huge(p.value) for p in found):  # the rules would count up to it
        return found
    return [
        *found,
        *model_problems(exp),
        *lora_problems(exp),
        *branch_problems(exp),
        *sample_problems(exp),
        *temperature_problems(exp),
        *export_problems(exp),
        *evaluate_problems(exp),
        *average_problems(exp),
        *length_problems(exp),
        *vocabulary_problems(exp),
        *batch_problems(exp),
        *ramp_problems(exp),
        *lr_multiplier_problems(exp),
        *data_problems(exp),
        *mixture_problems(exp),
        *chat_problems(exp),
        *isolation_problems(exp),
        *finetune_problems(exp),
        *tracking_problems(exp),
        *class_problems(exp),
        *device_problems(exp, machine),
        *kernel_problems(exp, machine),
        *cuda_graph_problems(exp, machine),
        *fp8_problems(exp, machine),
        *adamw_problems(exp),
        *weight_bits_problems(exp, machine),
        *layout_problems(exp),
        *launch_problems(exp, machine),
        *verify_problems(exp),
    ]


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value > 10**9
