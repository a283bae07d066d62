"""A plan as text: the output of `do=plan`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from deepseek_exp.config import ActivationCheckpointing, ExperimentConfig, Precision
from deepseek_exp.config.topology import n_gpus
from deepseek_exp.planner import cost
from deepseek_exp.planner.adapters import coverage
from deepseek_exp.planner.layers import Layers, layers_of
from deepseek_exp.planner.memory import USABLE, Layout, Memory
from deepseek_exp.planner.search import Plan, asked_layout, best_plans, make_plan
from deepseek_exp.planner.speed import bubble_fraction
from deepseek_exp.planner.traffic import stage_traffic

GB = 1e9
TOP = 5
# Sequences per step and GPU that keep a pipeline busy; the closing hint recommends this batch.
SEQS_PER_GPU = 8
MEMORY = [f.name for f in dataclasses.fields(Memory)]


def report(exp: ExperimentConfig) -> str:
    """Return the plan of an experiment's layout, compared with the best layouts of its cluster.

    Args:
        exp: a validated configuration, so its layout is legal.

    Returns:
        Several lines of text.
    """
    layout = asked_layout(exp)
    plan = make_plan(exp, layout, layers_of(exp.model, exp.data.seq_len, exp.lora))
    best = best_plans(exp, TOP)
    lines = [*_head(exp, layout), "", *_memory(exp, plan), *_verdict(exp, plan, best), ""]
    lines += [*_traffic(exp, plan), "", *_time(exp, plan), "", *_best(exp, best)]
    return "\n".join([*lines, *_hint(exp), "", *_assumptions(exp)])


def _head(exp: ExperimentConfig, layout: Layout) -> Iterator[str]:
    m, t, c, d, p = exp.model, exp.trainer, exp.cluster, layout.degrees, cost.parameters(exp.model)
    mtp = f", and {_count(p.mtp)} for multi-token prediction" if p.mtp else ""
    yield f"model     {m.version}, {_count(p.total)} parameters, {_count(p.active)} active{mtp}"
    if exp.lora.rank:
        yield f"adapters  {coverage(exp).sentence()}"
    tokens = t.global_batch_seqs * exp.data.seq_len
    ramp = f"; {t.batch_ramp_seqs:,} sequences at first, and all after {t.batch_ramp_steps:,} steps"
    ramp *= bool(t.batch_ramp_seqs)
    yield (
        f"step      {t.global_batch_seqs:,} sequences x {exp.data.seq_len:,} tokens = {tokens:,} tokens, "
        f"{t.precision.value}{ramp}"
    )
    yield f"cluster   {c.n_nodes} x {c.gpus_per_node} {c.gpu}, {c.memory_bytes / GB:,.0f} GB each"
    n = layout.n_micro_batches(t.global_batch_seqs)
    yield f"layout    {d.world_size:,} of {n_gpus(c):,} ranks: {describe(layout)}; micro-batches per rank: {n:,}"


def _memory(exp: ExperimentConfig, plan: Plan) -> Iterator[str]:
    usable = USABLE * exp.cluster.memory_bytes
    yield f"memory per rank, GB ({usable / GB:.1f} usable)"
    rows = [["stages", "blocks", "parameters", *MEMORY, "total", "used"]]
    for first, last, stage, memory in _runs(plan):
        parts = [f"{getattr(memory, name) / GB:,.2f}" for name in MEMORY]
        label = f"{first}" if first == last else f"{first}-{last}"
        used = f"{memory.total / usable:.0%}"
        n_blocks = f"{stage.n_dense + stage.n_moe - stage.n_mtp}{f' + {stage.n_mtp} MTP' if stage.n_mtp else ''}"
        rows.append([label, n_blocks, _count(stage.parameters), *parts, f"{memory.total / GB:,.2f}", used])
    yield from _table(rows)


def _runs(plan: Plan) -> Iterator[tuple[int, int, Layers, Memory]]:
    """Group adjacent stages with the same layers, with the memory of the first, which keeps the most."""
    for stage, run in itertools.groupby(enumerate(plan.stages), key=lambda x: x[1]):
        indices = [i for i, _ in run]
        yield indices[0], indices[-1], stage, plan.memory[indices[0]]


def _verdict(exp: ExperimentConfig, plan: Plan, best: Sequence[Plan]) -> Iterator[str]:
    most = max(m.total for m in plan.memory)
    if plan.fits:
        yield "fits"
        return
    short = most / (USABLE * exp.cluster.memory_bytes)
    yield f"does not fit: the largest stage needs {short:,.1f}x the memory of one GPU"
    if best:
        yield f"a layout that fits: {overrides(best[0].layout)}"


def _traffic(exp: ExperimentConfig, plan: Plan) -> Iterator[str]:
    loads = [stage_traffic(exp, plan.layout, stage, i) for i, stage in enumerate(plan.stages)]
    yield "communication per rank and step, GB (stage that sends the most)"
    most = {axis.value: max(x[axis].n_bytes for x in loads) / GB for axis in loads[0]}
    yield "  " + (", ".join(f"{axis} {n:,.3f}" for axis, n in most.items() if n) or "nothing")


def _time(exp: ExperimentConfig, plan: Plan) -> Iterator[str]:
    s, seconds = plan.speed, plan.seconds
    yield f"time per step: {duration(s.step_seconds)}, of which"
    shares = dataclasses.asdict(seconds)
    yield "  " + ", ".join(f"{name} {value / seconds.step:.1%}" for name, value in shares.items() if value)
    d = plan.layout.degrees
    if d.pp > 1:
        bubble = bubble_fraction(d.pp, plan.layout.n_micro_batches(exp.trainer.global_batch_seqs))
        yield f"  pipeline bubble: (p - 1) / (m + p - 1) = {bubble:.1%} of the stages' time"
    price = f", ${s.price_per_billion_tokens:,.2f} per billion tokens" if s.price_per_billion_tokens else ""
    yield (
        f"MFU {s.mfu:.1%}, scaling efficiency {s.scaling_efficiency:.0%}, {s.tokens_per_second:,.0f} tokens/s, "
        f"{_count(s.tokens_per_day)} tokens per day{price}"
    )


def _best(exp: ExperimentConfig, best: Sequence[Plan]) -> Iterator[str]:
    if not best:
        yield f"no layout fits {n_gpus(exp.cluster):,} GPUs with {exp.trainer.global_batch_seqs:,} sequences per step"
        return
    world = best[0].layout.degrees.world_size
    yield f"fastest layouts of {world:,} ranks that fit"
    rows = [
        [
            "dp",
            "tp",
            "pp",
            "ep",
            "zero",
            "micro",
            "recompute",
            "GB",
            "bubble",
            "step",
            "MFU",
            "tokens/s",
            "$ per 1e9 tokens",
        ]
    ]
    for plan in best:
        x, s, d = plan.layout, plan.speed, plan.layout.degrees
        bubble = bubble_fraction(d.pp, x.n_micro_batches(exp.trainer.global_batch_seqs))
        cells = [d.dp, d.tp, d.pp, d.ep, x.zero_stage, x.micro_batch_seqs, x.checkpointing.value]
        cells += [f"{max(m.total for m in plan.memory) / GB:,.2f}", f"{bubble:.0%}", duration(s.step_seconds)]
        cells += [f"{s.mfu:.1%}", f"{s.tokens_per_second:,.0f}", f"{s.price_per_billion_tokens:,.0f}"]
        rows.append([str(cell) for cell in cells])
    yield from _table(rows)
    yield "use the first with parallel=auto, or"
    yield f"  {overrides(best[0].layout)}"


def _hint(exp: ExperimentConfig) -> Iterator[str]:
    """Yield what bf16 and a batch that suits the cluster would yield, if the configuration has another."""
    t, c = exp.trainer, exp.cluster
    fast = t.precision
    if t.precision is Precision.fp32 and c.peak_bf16_flops > c.peak_fp32_flops:
        fast = Precision.bf16
    n_seqs = max(t.global_batch_seqs, SEQS_PER_GPU * n_gpus(c))
    words = [f"trainer.precision={fast.value}"] if fast is not t.precision else []
    words += [f"trainer.global_batch_seqs={n_seqs}"] if n_seqs != t.global_batch_seqs else []
    if not words or n_gpus(c) == 1:
        return
    trainer = dataclasses.replace(t, precision=fast, global_batch_seqs=n_seqs)
    found = best_plans(dataclasses.replace(exp, trainer=trainer), 1)
    if found:
        s = found[0].speed
        yield f"with {' '.join(words)}: MFU {s.mfu:.1%}, {s.tokens_per_second:,.0f} tokens/s, using"
        yield f"  {overrides(found[0].layout)}"
    else:
        yield f"with {' '.join(words)}: no layout fits either"


def _assumptions(exp: ExperimentConfig) -> Iterator[str]:
    share = exp.cluster.overlap
    overlap = f"{share:.0%} of non-TP communication overlaps" if share else "no communication overlaps"
    yield f"Predicted, not measured. Assumes: {overlap} with compute; balanced experts;"
    yield f"{1 - USABLE:.0%} of GPU memory reserved for the driver, communication buffers and fragmentation."
    if exp.lora.rank:
        yield "Time is that of training every weight; that of adapters is shorter."
    yield "Hardware figures and their sources: conf/cluster. Not modelled: data loading, logging, validation,"
    yield "checkpoints, gradient clipping, and norm and loss time beyond the efficiency factors."


RECOMPUTED = {
    ActivationCheckpointing.none: "",
    ActivationCheckpointing.selective: ", selective recomputation",
    ActivationCheckpointing.full: ", full recomputation",
}


def describe(x: Layout) -> str:
    """Describe a layout in words."""
    d = x.degrees
    sequence = ", sequence parallel" if x.sequence_parallel else ""
    recompute = RECOMPUTED[x.checkpointing]
    return f"{d}, ep {d.ep}, ZeRO {x.zero_stage}{sequence}{recompute}"


def keys_of(x: Layout) -> dict[str, Any]:
    """Return the keys that select a layout, with their values."""
    return {f"parallel.{name}": degree for name, degree in dataclasses.asdict(x.degrees).items()} | {
        "parallel.zero_stage": x.zero_stage,
        "parallel.sequence_parallel": x.sequence_parallel,
        "trainer.micro_batch_seqs": x.micro_batch_seqs,
        "trainer.activation_checkpointing": x.checkpointing.value,
    }


def overrides(x: Layout) -> str:
    """Return the command-line overrides of a layout."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in keys_of(x).items())


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))


def _count(n: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if n >= size:
            return f"{n / size:,.2f}{unit}"
    return f"{n:,.0f}"


def duration(seconds: float) -> str:
    """Format a duration."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"
