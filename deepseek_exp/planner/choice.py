"""Which layout `parallel=auto` chooses, and which layouts are rejected before their ranks start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from deepseek_exp.config import Device, ExperimentConfig, Precision
from deepseek_exp.config.rules.parallel import largest
from deepseek_exp.config.topology import n_gpus
from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.planner.layers import layers_of
from deepseek_exp.planner.memory import USABLE
from deepseek_exp.planner.report import GB, describe, duration, keys_of, overrides
from deepseek_exp.planner.search import asked_layout, best_plans, make_plan

# Factors that remedies try: 2, 4, ... times as many machines, sequences of half, a quarter, ... the length.
TIMES = (2, 4, 8, 16, 32, 64)
PARTS = (2, 4, 8)
# The name of a rank in conf/cluster/cpu_host.yaml, the default.
CPU_PROCESS = "CPU process"


def choose(exp: ExperimentConfig) -> tuple[dict[str, Any], str]:
    """Choose the fastest layout that fits the cluster.

    Returns:
        The keys that the layout sets with their values, and a sentence that describes it.

    Raises:
        ConfigError: none fits.
    """
    best, room = best_plans(exp, 1), n_gpus(exp.cluster)
    if not best:
        rule = f"finds no layout that fits {room:,} ranks of {_usable(exp)}"
        raise ConfigError(Problem("parallel.auto", True, rule, _remedy(exp)))
    layout, seconds = best[0].layout, best[0].speed.step_seconds
    ranks = f"{layout.degrees.world_size:,} of {room:,} ranks: {describe(layout)}"
    micro = f"micro batches of {layout.micro_batch_seqs}"
    return (
        {"parallel.auto": False, **keys_of(layout)},
        f"chosen    {ranks}, {micro}; by the plan the fastest that fits, {duration(seconds)} a step",
    )


def misfit(exp: ExperimentConfig) -> Problem | None:
    """Return the problem of a layout of several ranks that needs more memory than a rank has; None if it fits.

    With adapters, a pipeline's stage that has none is a problem too: it would have nothing to train.
    """
    layout = asked_layout(exp)
    if layout.degrees.world_size == 1:
        return None
    plan = make_plan(exp, layout, layers_of(exp.model, exp.data.seq_len, exp.lora))
    idle = [i for i, stage in enumerate(plan.stages) if exp.lora.rank and not stage.adapters + stage.expert_adapters]
    if idle and exp.do.trains:
        rule = f"selects no matrix of stage {idle[0]} of parallel.pp={layout.degrees.pp}, which would train nothing"
        return Problem("lora.targets", exp.lora.targets, rule, "select matrices of every block, or set parallel.pp=1")
    if plan.fits:
        return None
    needed = max(m.total for m in plan.memory)
    stage = next(i for i, m in enumerate(plan.memory) if m.total == needed)
    best, name = best_plans(exp, 1), largest(layout.degrees)
    rule = f"does not fit: a rank of stage {stage} needs {needed / GB:,.2f} GB of {_usable(exp)}"
    fix = _gpus_first(exp, f"use {overrides(best[0].layout)}") if best else _remedy(exp)
    return Problem(f"parallel.{name}", getattr(layout.degrees, name), rule, fix)


def _usable(exp: ExperimentConfig) -> str:
    c = exp.cluster
    return f"{USABLE * c.memory_bytes / GB:,.2f} GB usable (cluster.memory_bytes={c.memory_bytes:g}, {c.gpu})"


def _remedy(exp: ExperimentConfig) -> str:
    found = list(_remedies(exp))
    return _gpus_first(exp, f"set {', or '.join(found)}" if found else "take a smaller model, or GPUs with more memory")


def _gpus_first(exp: ExperimentConfig, fix: str) -> str:
    """Ask for the GPUs' description first if the ranks may be GPUs but are planned as CPU processes."""
    planned_as_cpu = exp.cluster.gpu == CPU_PROCESS and exp.device is not Device.cpu
    gpus = "set cluster=<your GPUs>, for example cluster=h100_8 (the default plans for CPU processes)"
    return f"{gpus}, or {fix}" if planned_as_cpu else fix


def _remedies(exp: ExperimentConfig) -> Iterator[str]:
    """Yield changes of one key that make a layout fit."""
    t, c, seq_len = exp.trainer, exp.cluster, exp.data.seq_len
    bf16 = dataclasses.replace(exp, trainer=dataclasses.replace(t, precision=Precision.bf16))
    if t.precision is Precision.fp32 and best_plans(bf16, 1):
        yield "trainer.precision=bf16"
    for n in (seq_len // part for part in PARTS):
        if n and best_plans(dataclasses.replace(exp, data=dataclasses.replace(exp.data, seq_len=n)), 1):
            yield f"data.seq_len={n}"
            break
    for n in (c.n_nodes * times for times in TIMES):
        if best_plans(dataclasses.replace(exp, cluster=dataclasses.replace(c, n_nodes=n)), 1):
            yield f"cluster.n_nodes={n}"
            break
