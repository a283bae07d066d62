"""Rules of the section `trainer`, and of sequence lengths and segment memory."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_exp.config.enums import Do, Order
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.config.topology import degrees, divisors
from deepseek_exp.errors import Problem


def length_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems for inconsistent lengths of sequences and segment memories."""
    m, d = exp.model, exp.data
    if d.seq_len > m.max_seq_len:
        rule = f"is longer than model.max_seq_len={m.max_seq_len}"
        fix = f"set data.seq_len={m.max_seq_len} or less, or raise model.max_seq_len"
        yield Problem("data.seq_len", d.seq_len, rule, fix)
    if m.memory_len and not m.window:
        rule = "needs a local window: without one the memory would have to hold all earlier tokens"
        yield Problem("model.memory_len", m.memory_len, rule, "set model.window to a length, or model.memory_len=0")
    if m.memory_len and m.window and m.memory_len >= m.window:
        rule = f"is more than a query of model.window={m.window} sees of it"
        yield Problem("model.memory_len", m.memory_len, rule, f"set model.memory_len={m.window - 1} or less")
    if m.memory_len and exp.trainer.compile:
        rule = f"does not reach the segments of a model with model.memory_len={m.memory_len}"
        yield Problem("trainer.compile", True, rule, "set trainer.compile=false, or model.memory_len=0")
    if m.memory_len and d.order is not Order.contiguous:
        rule = f"needs each sequence to continue the previous one, and data.order is '{d.order.value}'"
        yield Problem("model.memory_len", m.memory_len, rule, "set data.order=contiguous, or model.memory_len=0")


def ramp_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems for a ramp of the batch that cannot be divided, or that the engine or the verb does not have."""
    t, key = exp.trainer, "trainer.batch_ramp_seqs"
    first = t.batch_ramp_seqs
    if bool(first) is not bool(t.batch_ramp_steps):
        name, other = ("batch_ramp_steps", key) if first else ("batch_ramp_seqs", "trainer.batch_ramp_steps")
        rule = f"makes no ramp of {other}={first or t.batch_ramp_steps}"
        yield Problem(f"trainer.{name}", 0, rule, f"set both, or {other}=0")
        return
    if not first:
        return
    if t.global_batch_seqs % first:
        near = min(divisors(t.global_batch_seqs), key=lambda d: abs(d - first))
        rule = f"does not divide trainer.global_batch_seqs={t.global_batch_seqs}"
        yield Problem(key, first, rule, f"use {key}={near}")
    if t.max_epochs is None and t.batch_ramp_steps >= t.max_steps:
        rule = f"leaves no step of trainer.max_steps={t.max_steps} with trainer.global_batch_seqs={t.global_batch_seqs}"
        fix = f"set trainer.batch_ramp_steps={t.max_steps // 10}, or train for more steps"
        yield Problem("trainer.batch_ramp_steps", t.batch_ramp_steps, rule, fix)
    if exp.do in (Do.verify, Do.grpo):
        yield Problem(key, first, f"is not for do={exp.do.value}", f"set {key}=0 and trainer.batch_ramp_steps=0")
    if exp.data.order is Order.contiguous:
        rule = "cannot be used with data.order='contiguous', whose lanes are the sequences of a step"
        yield Problem(key, first, rule, f"set data.order=shuffled, or {key}=0 and trainer.batch_ramp_steps=0")
    try:
        d = degrees(exp)
    except ValueError:
        return  # reported by layout_problems
    share = t.micro_batch_seqs * d.dp
    if share and first % share:
        rule = f"is not a multiple of trainer.micro_batch_seqs={t.micro_batch_seqs}"
        rule += f" x parallel.dp={d.dp}" if d.dp > 1 else ""
        yield Problem(key, first, rule, f"use {key}={-(-first // share) * share}, or lower trainer.micro_batch_seqs")
    if d.world_size > 1 and exp.parallel.zero_stage:
        why = "DeepSpeed accumulates a fixed number of micro batches"
        rule = f"cannot be used with parallel.zero_stage={exp.parallel.zero_stage} on {d.world_size:,} ranks ({why})"
        yield Problem(key, first, rule, f"set parallel.zero_stage=0, or {key}=0 and trainer.batch_ramp_steps=0")


def batch_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems for batches that micro-batches do not divide, and for a warm-up that never ends."""
    t = exp.trainer
    if min(t.micro_batch_seqs, t.global_batch_seqs) >= 1 and t.global_batch_seqs % t.micro_batch_seqs:
        near = min(divisors(t.global_batch_seqs), key=lambda d: abs(d - t.micro_batch_seqs))
        rule = f"does not divide trainer.global_batch_seqs={t.global_batch_seqs}"
        yield Problem("trainer.micro_batch_seqs", t.micro_batch_seqs, rule, f"use trainer.micro_batch_seqs={near}")
    if t.max_epochs is not None and exp.do is Do.plan:
        rule = "is a number of steps only once the data is read, which do=plan does not do"
        yield Problem("trainer.max_epochs", t.max_epochs, rule, "set trainer.max_epochs=null and trainer.max_steps")
    if t.max_epochs is None and exp.optim.warmup_steps >= t.max_steps:
        rule = f"leaves no step of trainer.max_steps={t.max_steps} at full learning rate"
        fix = f"set optim.warmup_steps={t.max_steps // 10}, or train for more steps"
        yield Problem("optim.warmup_steps", exp.optim.warmup_steps, rule, fix)
