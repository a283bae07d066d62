"""What deepspeed_patches.py replaces exists in the installed DeepSpeed, which is the version it was checked against."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect

import pytest
import torch

from deepseek_exp.parallel import deepspeed_patches
from tests.runs import ROOT


def test_the_installed_version_is_the_checked_one():
    assert importlib.metadata.version("deepspeed") == deepspeed_patches.CHECKED_VERSION
    assert f"deepspeed=={deepspeed_patches.CHECKED_VERSION}" in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize(("module", "name", "attribute"), deepspeed_patches.PATCHED)
def test_a_patched_attribute_exists(module, name, attribute):
    assert hasattr(getattr(importlib.import_module(module), name), attribute)


def test_every_patch_names_the_checked_version():
    patches = [f for _, f in inspect.getmembers(deepspeed_patches, inspect.isfunction)]
    assert len(patches) == len(deepspeed_patches.PATCHED)
    for patch in patches:
        assert f"Checked against DeepSpeed {deepspeed_patches.CHECKED_VERSION}" in patch.__doc__, patch.__name__


def test_a_gradient_is_added_as_upstream_adds_it():
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(5, 7, dtype=torch.bfloat16))
    p.grad = torch.randn(5, 7, generator=generator).bfloat16()
    before = torch.randn(35, generator=generator)

    def sums(patch):
        optimizer = object.__new__(BF16_Optimizer)
        optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients = [[before.clone()]], [[False]]
        optimizer.autoep_folding_tp_group = None
        patch(optimizer)
        optimizer._update_hp_grad(p, 0, 0, clear_lp_grads=False)
        assert p._hp_grad is optimizer.fp32_groups_gradients[0][0] and optimizer.fp32_groups_has_gradients == [[True]]
        return optimizer.fp32_groups_gradients[0][0]

    assert torch.equal(sums(lambda optimizer: None), sums(deepspeed_patches.accumulate_in_one_pass))


def test_the_gradients_of_tied_weights_are_summed_before_the_average():
    from deepspeed.runtime.pipe import engine, schedule

    steps = list(schedule.TrainSchedule(micro_batches=2, stages=2, stage_id=1))
    kinds = [type(command) for step in steps for command in step]
    assert kinds.count(schedule.ReduceTiedGrads) == 1
    where = kinds.index(schedule.ReduceTiedGrads)
    assert max(i for i, kind in enumerate(kinds) if kind is schedule.BackwardPass) < where
    assert kinds[where + 1 : where + 3] == [schedule.ReduceGrads, schedule.OptimizerStep]

    called, some = [], object.__new__(engine.PipelineEngine)
    deepspeed_patches.replace_tied_gradient_sum(some, called.append)
    some._INSTRUCTION_MAP[schedule.ReduceTiedGrads](some)
    assert called == [some]
    assert some._INSTRUCTION_MAP.keys() == engine.PipelineEngine._INSTRUCTION_MAP.keys()
    own = engine.PipelineEngine._INSTRUCTION_MAP[schedule.ReduceTiedGrads]
    assert own is engine.PipelineEngine._exec_reduce_tied_grads  # other engines keep it
