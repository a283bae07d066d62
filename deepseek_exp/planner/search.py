"""The plan of one layout, and the best of the legal ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepseek_exp.config import ActivationCheckpointing, ExperimentConfig
from deepseek_exp.config.rules.parallel import illegal, is_elementwise
from deepseek_exp.config.topology import Degrees, degrees, divisors, n_gpus
from deepseek_exp.planner.layers import Layers, layers_of, stages_of
from deepseek_exp.planner.memory import USABLE, Layout, Memory, stage_memory
from deepseek_exp.planner.speed import Seconds, Speed, speed


@dataclass(frozen=True)
class Plan:
    """The cost of a layout.

    Attributes:
        layout: the layout.
        stages: the layers of each stage.
        memory: bytes on one rank of each stage.
        seconds: breakdown of the time of a step.
        speed: the resulting throughput and price.
        fits: every stage fits into the GPU's usable memory.
    """

    layout: Layout
    stages: list[Layers]
    memory: list[Memory]
    seconds: Seconds
    speed: Speed
    fits: bool


def asked_layout(exp: ExperimentConfig) -> Layout:
    """Return the layout that a configuration selects."""
    t, p = exp.trainer, exp.parallel
    return Layout(degrees(exp), p.zero_stage, t.micro_batch_seqs, t.activation_checkpointing, p.sequence_parallel)


def make_plan(exp: ExperimentConfig, layout: Layout, layers: Sequence[Layers]) -> Plan:
    """Return the plan of one layout.

    Args:
        exp: model, batch, precision, cluster.
        layout: a legal layout.
        layers: the model's layers, from `layers_of`.
    """
    stages = stages_of(layers, layout.degrees.pp, exp.cluster)
    seconds, result = speed(exp, layout, stages)
    memory = [stage_memory(exp, layout, stage, i) for i, stage in enumerate(stages)]
    fits = max(m.total for m in memory) <= USABLE * exp.cluster.memory_bytes
    return Plan(layout, stages, memory, seconds, result, fits)


def best_plans(exp: ExperimentConfig, count: int) -> list[Plan]:
    """Return the fastest layouts that fit.

    Tries all dp x tp x pp that use the whole cluster, with tp inside a machine, every ep, micro-batches as configured
    and of 1 sequence, and blocks recomputed as configured and fully. If no layout of that many ranks is legal (the
    batch is too small), half as many are tried. ZeRO is 1, or any stage if only data parallelism is used; 0 if it
    cannot shard the optimizer's state, and on one rank. Sequence parallelism is as configured, if there are tensor
    ranks.

    Args:
        exp: model, batch, precision, cluster.
        count: maximum number of layouts.

    Returns:
        Plans sorted by tokens per second, the most first; none if nothing fits.
    """
    layers, world = layers_of(exp.model, exp.data.seq_len, exp.lora), n_gpus(exp.cluster)
    while True:
        legal = list(_layouts(exp, world))
        if legal or world == 1:
            break
        world //= 2
    stages = {pp: stages_of(layers, pp, exp.cluster) for pp in {x.degrees.pp for x in legal}}
    ranked = sorted(legal, key=lambda x: speed(exp, x, stages[x.degrees.pp])[0].step)
    found: list[Plan] = []
    for layout in ranked:
        plan = make_plan(exp, layout, layers) if _may_fit(exp, layout, stages[layout.degrees.pp]) else None
        if plan is not None and plan.fits:
            found.append(plan)
            if len(found) == count:
                break
    return found


def _may_fit(exp: ExperimentConfig, layout: Layout, stages: Sequence[Layers]) -> bool:
    """Check the first and the last stage, which usually need the most memory."""
    ends = {0, len(stages) - 1}
    return all(stage_memory(exp, layout, stages[i], i).total <= USABLE * exp.cluster.memory_bytes for i in ends)


def _layouts(exp: ExperimentConfig, world: int) -> Iterator[Layout]:
    """List the legal layouts of `world` ranks."""
    t = exp.trainer
    micros = sorted({1, t.micro_batch_seqs}, reverse=True)  # the first of equals wins, with the largest matrices
    kinds = sorted({t.activation_checkpointing, ActivationCheckpointing.full})
    variants = [dataclasses.replace(t, micro_batch_seqs=n, activation_checkpointing=k) for n in micros for k in kinds]
    for d in _degrees(exp, world):
        sequence = exp.parallel.sequence_parallel and d.tp > 1
        for zero in _zero_stages(exp, d):
            parallel = dataclasses.replace(exp.parallel, zero_stage=zero, sequence_parallel=sequence)
            for v in variants:
                if next(illegal(dataclasses.replace(exp, trainer=v, parallel=parallel), d), None) is None:
                    yield Layout(d, zero, v.micro_batch_seqs, v.activation_checkpointing, sequence)


def _degrees(exp: ExperimentConfig, world: int) -> Iterator[Degrees]:
    """List the ways to factor `world` ranks into degrees, most of which are legal."""
    m = exp.model
    for tp in divisors(math.gcd(world, m.n_heads)):
        if tp > exp.cluster.gpus_per_node:
            break
        for pp in divisors(world // tp):
            if pp > m.n_layers:
                break
            dp = world // tp // pp
            for ep in divisors(math.gcd(dp, m.moe.n_routed_experts) if m.moe.n_routed_experts else 1):
                yield Degrees(dp, tp, pp, ep)


def _zero_stages(exp: ExperimentConfig, d: Degrees) -> tuple[int, ...]:
    """List the ZeRO stages worth trying."""
    if d.world_size == 1 or not is_elementwise(exp):
        return (0,)
    return (1, 2, 3) if d.dp == d.world_size and d.ep == 1 else (1,)
