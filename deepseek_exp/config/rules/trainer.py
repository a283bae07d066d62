"""Rules of the section `trainer`, and of sequence lengths and segment memory."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_exp.config.enums import Do, Order
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.config.topology import divisors
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
