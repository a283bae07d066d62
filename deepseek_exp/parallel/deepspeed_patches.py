"""Every change to DeepSpeed's own objects. Nothing else in the package replaces an attribute of a library.

A patch replaces an attribute of one object, so other objects of the process stay as they are. tests/parallel/
test_deepspeed_patches.py checks that the attributes still exist and that the installed version is the one checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The version of DeepSpeed that every patch here was read against. Read them again before you raise it.
CHECKED_VERSION = "0.19.8"
# The replaced attributes: module, class, attribute.
PATCHED = (
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer", "_update_hp_grad"),
    ("deepspeed.runtime.pipe.engine", "PipelineEngine", "_INSTRUCTION_MAP"),
)


def accumulate_in_one_pass(optimizer: Any) -> None:
    """Patch a BF16_Optimizer to add bf16 gradients directly into the fp32 buffers.

    That moves 10 bytes per element on a GPU. Upstream casts each gradient to fp32 first, which makes it 18. The sums
    are equal bit for bit.

    Checked against DeepSpeed 0.19.8: runtime/bf16_optimizer.py, `_update_hp_grad`. Upstream also clears the bf16
    gradient if `clear_lp_grads` is set, which `immediate_grad_update` never does, and corrects gradients of experts
    for its own expert parallelism, which is not used here.

    Args:
        optimizer: DeepSpeed's, of a pipeline in bf16.
    """

    @torch.no_grad()
    def update_hp_grad(p: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        if p.grad is not None:
            p._hp_grad = optimizer.fp32_groups_gradients[group][index]  # type: ignore[attr-defined]
            p._hp_grad.add_(p.grad.view(p._hp_grad.shape))  # type: ignore[attr-defined]
            optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer._update_hp_grad = update_hp_grad


def replace_tied_gradient_sum(engine: Any, sum_gradients: Callable[[Any], None]) -> None:
    """Patch a PipelineEngine to run `sum_gradients` where it would sum the gradients of tied weights.

    Checked against DeepSpeed 0.19.8: runtime/pipe/engine.py, `_INSTRUCTION_MAP`, and runtime/pipe/schedule.py:
    `TrainSchedule` issues `ReduceTiedGrads` once per step, after the last backward pass and before `ReduceGrads`
    averages gradients over the data axis.

    Args:
        engine: DeepSpeed's.
        sum_gradients: is called with the engine.
    """
    from deepspeed.runtime.pipe import schedule

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.ReduceTiedGrads: sum_gradients}
