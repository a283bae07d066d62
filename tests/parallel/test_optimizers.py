"""Muon, factors on the learning rate and averaged weights: each layout against one process, and resumed."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.shards import open_state
from deepseek_exp.config.parameter_groups import GroupSettings
from deepseek_exp.parallel.rank_state import _like
from tests.config.test_config import composed
from tests.parallel.layouts import difference, layout

STEPS = (
    "trainer.max_steps=4",
    "trainer.eval_every_steps=2",
    "trainer.checkpoint_every_steps=2",
    "trainer.keep_checkpoints=2",
    "optim.warmup_steps=1",
    "optim.schedule=wsd",
    "trainer.global_batch_seqs=4",
    "data.seq_len=64",
)
MUON = ("model=v3_moe", "optim=muon", *STEPS)
FACTORS = ("model=v1_dense", "+optim.lr_multipliers={embedding.*:0.1,blocks.0.*:0.5}", *STEPS)


def states(folder, index=-1):
    """Read every weight and optimizer state of a run's checkpoint: (parameter, kind) -> tensor."""
    state = open_state(manifest.list_checkpoints(folder)[index])
    return {(name, kind): state.read(name, kind) for name in state.names for kind in state.kinds(name)}


def halfway(ran, folder):
    """Copy a run without its last checkpoint."""
    shutil.copytree(ran.folder, folder, dirs_exist_ok=True)
    shutil.rmtree(manifest.list_checkpoints(folder)[-1])
    return dataclasses.replace(ran, folder=folder)


def largest(a, b):
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def settings(folder):
    """Return the settings of each parameter group of a checkpoint's optimizer, by the names of its parameters."""
    state = open_state(manifest.list_checkpoints(folder)[-1])
    return {name: (group["lr"], group["weight_decay"]) for group in state.param_groups for name in group["param_names"]}


@pytest.mark.parametrize("degrees", [{"dp": 2, "ep": 2, "zero_stage": 0}], ids=str)
def test_muon_in_a_layout_is_muon_in_one_process(layouts, alone, degrees):
    """Experts are orthogonalized one by one, wherever they are."""
    found = difference(layouts.run(2, *MUON, *layout(**degrees)), alone(*MUON))
    assert found.loss <= 2e-6 and found.grad_norm <= 1e-4 and found.weight <= 5e-5


@pytest.mark.parametrize("after", [(1, ()), (2, layout(dp=2, zero_stage=0))], ids=["one", "dp2"])
def test_muon_resumes_where_it_was(layouts, alone, after, tmp_path):
    want = alone(*MUON)
    resumed = layouts.run(after[0], *MUON, *after[1], resume=halfway(want, tmp_path))
    found = largest(states(resumed.folder), states(want.folder))
    assert found == 0.0 if after[0] == 1 else found <= 5e-5
    assert {kind for _, kind in states(resumed.folder)} == {"weight", "momentum_buffer", "exp_avg", "exp_avg_sq"}


def averages(ran):
    return {name: value for (name, kind), value in states(ran.folder).items() if kind == "ema"}


@pytest.mark.parametrize("degrees", [{"pp": 2}, {"dp": 2, "zero_stage": 3}], ids=str)
def test_averages_are_those_of_one_process(layouts, alone, degrees):
    averaged = (*FACTORS, "optim.ema_decay=0.5")
    ran, want = layouts.run(2, *averaged, *layout(**degrees)), alone(*averaged)
    assert averages(ran).keys() == averages(want).keys() and len(averages(want)) > 10
    assert largest(averages(ran), averages(want)) <= 2e-5
    assert largest(averages(want), alone(*averaged).weights()) > 1e-4  # an average, not the last weights


def test_averages_go_through_a_change_of_layout(layouts, alone, tmp_path):
    averaged = (*FACTORS, "optim.ema_decay=0.5")
    want = alone(*averaged)
    resumed = layouts.run(2, *averaged, *layout(dp=2, zero_stage=1), resume=halfway(want, tmp_path))
    assert largest(averages(resumed), averages(want)) <= 2e-5
    dropped = layouts.run(1, *FACTORS, resume=halfway(want, tmp_path / "again"))
    assert not averages(dropped) and largest(dropped.weights(), want.weights()) == 0.0


@pytest.mark.parametrize("degrees", [{"pp": 2}, {"dp": 2, "zero_stage": 3}], ids=str)
def test_factors_hold_in_a_layout(layouts, alone, degrees):
    ran, want = layouts.run(2, *FACTORS, *layout(**degrees)), alone(*FACTORS)
    assert difference(ran, want).weight <= 2e-5
    found, expected = settings(ran.folder), settings(want.folder)
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name], rel=1e-12) for name in found)
    assert found["embedding.weight"][0] == pytest.approx(0.2 * found["blocks.0.attention.wq.weight"][0])


@pytest.mark.parametrize("multiplier", [{}, {"lr_multiplier": 2.0}], ids=["equal rates", "factors"])
def test_a_group_of_another_stage_keeps_its_own_settings(multiplier):
    """A stage with matrices of Muon alone saves the AdamW group of the others."""
    here = {"lr": 0.2, "decays": True, "weight_decay": 0.1, "orthogonal": True, **multiplier}
    elsewhere = GroupSettings(decays=False, orthogonal=False)
    found = _like(here, elsewhere, composed("optim=muon"))
    assert found.keys() == here.keys() and (found["orthogonal"], found["decays"]) == (False, False)
    assert found["weight_decay"] == 0.0 and found["lr"] == (0.1 if multiplier else 0.2)


RAMP = (
    *("model=v3_moe", *STEPS, "trainer.global_batch_seqs=8", "trainer.micro_batch_seqs=1"),
    *("trainer.batch_ramp_seqs=2", "trainer.batch_ramp_steps=3"),
)


@pytest.mark.long
def test_a_growing_batch_has_the_same_sequences_in_a_layout_and_after_a_resume_inside_the_ramp(
    layouts, alone, tmp_path
):
    want = alone(*RAMP)
    assert want.trace("data/position") == [2, 6, 12, 20]
    small = alone("model=v3_moe", *STEPS, "trainer.global_batch_seqs=2", "trainer.micro_batch_seqs=1")
    for name in ("train/loss", "optim/grad_norm"):
        assert small.trace(name)[0] == want.trace(name)[0]
    dp2 = layout(dp=2, zero_stage=0)
    found = difference(layouts.run(2, *RAMP, *dp2), want)
    assert found.loss <= 2e-6 and found.grad_norm <= 1e-4 and found.weight <= 5e-5
    half = halfway(want, tmp_path)
    resumed = layouts.run(1, *RAMP, resume=half)
    assert resumed.trace("train/loss") == want.trace("train/loss")[2:]
    assert largest(states(resumed.folder), states(want.folder)) == 0.0
    resumed = layouts.run(2, *RAMP, *dp2, resume=halfway(want, tmp_path / "dp2"))
    assert largest(states(resumed.folder), states(want.folder)) <= 5e-5
