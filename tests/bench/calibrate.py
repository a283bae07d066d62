"""Calibrate a cluster's description with measured runs, so that the plan takes the time that they took.

    python tests/bench/calibrate.py <tokens/s> <the run's overrides, with cluster=>

A run without experts gives cluster.matmul_efficiency. One with experts gives cluster.grouped_efficiency, with the other
as the overrides have it: first the dense run, then the mixture of experts with what the first one gave. The plan's time
of such a run is tokens / peak * (flops / matmul_efficiency + expert_flops / grouped_efficiency) + optimizer, which is
solved for the one that is not known. One whose matrices are cut over GPUs of one machine, after these, gives
cluster.intra_node_bandwidth: what the plan leaves of the step's time for exchanges, as a bandwidth, with all that the
plan does not know in it. Alone they are up to three times as fast (`collectives.py`).

    python tests/bench/calibrate.py 25000 model=v4_distill size=3b cluster=h200_8 trainer.precision=bf16
    python tests/bench/calibrate.py 60000 model=v2_moe size=1b cluster=h200_8 trainer.precision=bf16 \
        cluster.matmul_efficiency=0.47
    python tests/bench/calibrate.py 120000 model=v1_dense size=1b cluster=h200_8 trainer.precision=bf16 parallel.tp=2 \
        kernels=fused data.seq_len=2048 trainer.global_batch_seqs=32 trainer.micro_batch_seqs=8 \
        cluster.matmul_efficiency=0.54

`compare` gives a row of a table: what is planned beside what was measured.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.planner.layers import layers_of
from deepseek_exp.planner.search import Plan, asked_layout, make_plan
from tests.config.test_config import composed

HEADER = """\
| run | step, s: planned | measured | difference | fullest rank, GB: planned | measured | difference |
|---|---|---|---|---|---|---|"""


def planned(exp: ExperimentConfig) -> Plan:
    """Plan the layout that an experiment asks for."""
    return make_plan(exp, asked_layout(exp), layers_of(exp.model, exp.data.seq_len))


def calibrated(exp: ExperimentConfig, tokens_per_second: float) -> tuple[str, float]:
    """Find the efficiency, or the bandwidth, with which the plan of a run takes the time that was measured.

    Everything but the share of the unknown is planned with that share at nothing, where what is left of the measured
    time is its; the planned time of the share at 1, of the bandwidth at what the cluster says, over what is left is the
    unknown, as a part of that.

    Args:
        exp: the run.
        tokens_per_second: measured, of whole steps.

    Returns:
        The key of the cluster, and its value.

    Raises:
        ValueError: the run has more ranks than those of one tensor-parallel group within a machine, or took less time
            than the rest of its plan, or than the peak allows.
    """
    key, unit, most = _unknown(exp)
    one, half = (_seconds(exp, key, unit * part) for part in (1.0, 0.5))
    share = half - one  # the time of the unknown share at 1
    measured = exp.trainer.global_batch_seqs * exp.data.seq_len / tokens_per_second
    left = measured - (one - share)
    if left <= unit * share / most:
        raise ValueError(f"{tokens_per_second:,.0f} tokens/s are more than a plan with {key}={most:g} gives")
    return f"cluster.{key}", unit * share / left


def _unknown(exp: ExperimentConfig) -> tuple[str, float, float]:
    """Give the key that a run tells of, the value that its time is measured in, and the most that it can be."""
    d, c = asked_layout(exp).degrees, exp.cluster
    if d.world_size == 1:
        return "grouped_efficiency" if exp.model.moe.n_routed_experts else "matmul_efficiency", 1.0, 1.0
    if d.world_size == d.tp <= c.gpus_per_node:
        return "intra_node_bandwidth", c.intra_node_bandwidth, math.inf
    raise ValueError("a run on one GPU calibrates, or one with parallel.tp alone: the rest is planned by these")


def compare(name: str, exp: ExperimentConfig, step_seconds: float, peak_bytes: float) -> str:
    """Give a row under `HEADER`.

    Args:
        name: what the run is called.
        exp: the run.
        step_seconds: measured, the median of its steps.
        peak_bytes: measured, the most that a rank allocated.
    """
    plan = planned(exp)
    pairs = [
        (plan.speed.step_seconds, step_seconds),
        (max(m.total for m in plan.memory) / 1e9, peak_bytes / 1e9),
    ]
    cells = [f"{a:,.3f} | {b:,.3f} | {a / b - 1:+.1%}" for a, b in pairs]
    return f"| {name} | {' | '.join(cells)} |"


def _seconds(exp: ExperimentConfig, key: str, value: float) -> float:
    cluster = dataclasses.replace(exp.cluster, **{key: value})
    return planned(dataclasses.replace(exp, cluster=cluster)).speed.step_seconds


def main() -> None:
    """Print the calibrated key."""
    exp = composed("do=plan", *sys.argv[2:])
    key, value = calibrated(exp, float(sys.argv[1]))
    sys.stdout.write(f"{key}={value:.4g}\n")


if __name__ == "__main__":
    main()
