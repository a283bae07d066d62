"""A calibrated plan takes the measured time."""

from __future__ import annotations

import dataclasses

import pytest

from deepseek_exp.config import ActivationCheckpointing
from tests.bench.calibrate import calibrated, compare, planned
from tests.planner.plan_parts import experiment

DENSE = experiment("model=v4_distill", "size=3b", "cluster=h200_8", "trainer.precision=bf16", "data.seq_len=2048")
EXPERTS = experiment("model=v2_moe", "size=1b", "cluster=h200_8", "trainer.precision=bf16", "data.seq_len=2048")


@pytest.mark.parametrize(("exp", "key"), [(DENSE, "matmul_efficiency"), (EXPERTS, "grouped_efficiency")])
@pytest.mark.parametrize("full", [False, True])
def test_the_plan_then_takes_the_measured_time(exp, key, full):
    kind = ActivationCheckpointing.full if full else ActivationCheckpointing.none
    exp = dataclasses.replace(exp, trainer=dataclasses.replace(exp.trainer, activation_checkpointing=kind))
    measured = planned(exp).speed.tokens_per_second * 0.8
    name, value = calibrated(exp, measured)
    assert name == f"cluster.{key}"
    assert value < getattr(exp.cluster, key)
    mended = dataclasses.replace(exp, cluster=dataclasses.replace(exp.cluster, **{key: value}))
    assert planned(mended).speed.tokens_per_second == pytest.approx(measured)


def test_a_run_with_cut_matrices_tells_of_the_bandwidth():
    exp = experiment("model=v1_dense", "size=1b", "cluster=h200_8", "trainer.precision=bf16", "parallel.tp=2")
    measured = planned(exp).speed.tokens_per_second * 0.8
    name, value = calibrated(exp, measured)
    assert name == "cluster.intra_node_bandwidth" and value < exp.cluster.intra_node_bandwidth
    mended = dataclasses.replace(exp, cluster=dataclasses.replace(exp.cluster, intra_node_bandwidth=value))
    assert planned(mended).speed.tokens_per_second == pytest.approx(measured)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"more than a plan with matmul_efficiency=1 gives"):
        calibrated(DENSE, 1e9)
    with pytest.raises(ValueError, match="a run on one GPU calibrates"):
        calibrated(experiment("parallel=3d"), 1e3)
    with pytest.raises(ValueError, match="more than a plan with intra_node_bandwidth=inf"):
        calibrated(experiment("model=v1_dense", "size=1b", "cluster=h200_8", "parallel.tp=2"), 1e9)


def test_a_row():
    plan = planned(DENSE)
    row = compare("dense 3b", DENSE, plan.speed.step_seconds / 1.1, plan.memory[0].total / 0.95)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (cells[0], cells[3], cells[6]) == ("dense 3b", "+10.0%", "-5.0%")
