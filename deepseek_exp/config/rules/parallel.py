"""Rules of the section `parallel`: what the degrees must divide, and what they cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from deepseek_exp.config import (
    ActivationCheckpointing,
    AttentionKind,
    Do,
    ExperimentConfig,
    ModelConfig,
)
from deepseek_exp.config.limits import FP8_MULTIPLE
from deepseek_exp.config.parameter_groups import is_muon
from deepseek_exp.config.topology import AUTO, Degrees, degrees, divisors, n_gpus
from deepseek_exp.errors import Problem

# Optimizers whose update is elementwise, so that ranks may hold any shard of a parameter. Adagrad is excluded because
# DeepSpeed replaces it with another instance that the learning rate schedule does not reach.
ELEMENTWISE = ("AdamW", "Adam", "SGD", "RMSprop", "NAdam", "RAdam", "Adamax")
# Verbs that use the full checkpoint in one process, whatever layout it was trained with.
IN_ONE_PROCESS = (Do.sample, Do.export)
MOST_RANKS = 10**6


def layout_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield the problems of an experiment's layout."""
    p = exp.parallel
    asked = {"dp": p.dp, "tp": p.tp, "pp": p.pp}
    if exp.do in IN_ONE_PROCESS:
        return
    if p.auto:
        yield from _chosen(exp)
        return
    if min(*asked.values(), p.ep) < 0 or n_gpus(exp.cluster) < 1:
        return  # reported by the ranges
    auto = [name for name, degree in asked.items() if degree == AUTO]
    try:
        found = degrees(exp)
    except ValueError as error:
        if len(auto) > 1:
            rule = f"is auto as parallel.{auto[0]} is, and one alone can follow from the others"
            yield Problem(
                f"parallel.{auto[1]}", AUTO, rule, f"set parallel.{auto[1]}=1; parallel=auto takes the fastest layout"
            )
        else:
            rule = f"cannot be worked out: {error} of the cluster"
            others = " and ".join(f"parallel.{name}" for name in asked if name not in auto)
            yield Problem(f"parallel.{auto[0]}", AUTO, rule, f"lower {others}, or set parallel.{auto[0]}")
        return
    if found.world_size > MOST_RANKS:
        yield too_many(found, f"a layout has {MOST_RANKS:,} at most", "lower parallel.dp, parallel.tp or parallel.pp")
        return
    yield from illegal(exp, found)
    room = n_gpus(exp.cluster)
    if exp.do is Do.plan and found.world_size > room:
        fix = f"lower parallel.dp, parallel.tp or parallel.pp to {room} ranks or less, or take a larger cluster"
        yield too_many(found, f"the cluster has {room}", fix)


def too_many(d: Degrees, there: str, fix: str) -> Problem:
    """Return the problem for a layout with more ranks than are available."""
    first, product = largest(d), f"{d.world_size} ranks (dp={d.dp} x tp={d.tp} x pp={d.pp})"
    return Problem(f"parallel.{first}", getattr(d, first), f"makes {product} and {there}", fix)


def _chosen(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems that rule out parallel.auto, before a layout is chosen."""
    p = exp.parallel
    for name in ("dp", "tp", "pp", "ep"):
        if getattr(p, name) != AUTO:
            rule = "cannot be used with parallel.auto=true, which chooses it"
            fix = f"leave parallel.{name} out, or set parallel.auto=false"
            yield Problem(f"parallel.{name}", getattr(p, name), rule, fix)
    if exp.trainer.precision.computes_in_fp8:
        yield from _fp8(exp, 1)
    if n_gpus(exp.cluster) > 1:
        yield from _several(exp, n_gpus(exp.cluster))


def _several(exp: ExperimentConfig, n_ranks: int) -> Iterator[Problem]:
    """Yield problems that rule out every layout of several ranks."""
    ranks, memory_len = f"cannot be used with {n_ranks:,} ranks", exp.model.memory_len
    if memory_len:
        rule = f"{ranks}: the memory of a segment lies on one"
        yield Problem("model.memory_len", memory_len, rule, "set model.memory_len=0, or parallel=single")


def illegal(exp: ExperimentConfig, d: Degrees) -> Iterator[Problem]:
    """Yield the problems of a layout for an experiment, regardless of the degrees that the experiment sets.

    Args:
        exp: the experiment. Its model, batch, trainer, optimizer, zero_stage and sequence_parallel are checked.
        d: the layout.
    """
    m, t = exp.model, exp.trainer
    if d.world_size > 1:
        yield from _several(exp, d.world_size)
    rule = _tensor_rule(m, d.tp)
    if rule is not None:
        legal = _listed(tp for tp in divisors(m.n_heads) if _tensor_rule(m, tp) is None)
        yield Problem("parallel.tp", d.tp, rule, f"use parallel.tp of {legal}")
    if d.pp > m.n_layers:
        rule = f"is more than model.n_layers={m.n_layers}"
        yield Problem("parallel.pp", d.pp, rule, f"use parallel.pp={m.n_layers} or less")
    rule = _expert_rule(m, d, d.ep)
    if rule is not None:
        legal = _listed(ep for ep in divisors(d.dp) if _expert_rule(m, d, ep) is None)
        yield Problem("parallel.ep", d.ep, rule, f"use parallel.ep of {legal}")
    yield from _zero(exp, d)
    if t.compile and exp.parallel.zero_stage == 3 and d.world_size > 1:
        rule = "cannot be used with parallel.zero_stage=3 (weights come and go inside of what is compiled)"
        yield Problem("trainer.compile", True, rule, "set trainer.compile=false, or parallel.zero_stage=1")
    if t.compile and d.ep > 1 and t.activation_checkpointing is not ActivationCheckpointing.none:
        rule = f"compiles no block that is computed again (trainer.activation_checkpointing) with parallel.ep={d.ep}"
        fix = "set trainer.compile=false, or trainer.activation_checkpointing=none"
        yield Problem("trainer.compile", True, rule, fix)
    if exp.parallel.sequence_parallel:
        yield from _sequence(exp, d.tp)
    yield from _batch(d, t.global_batch_seqs, t.micro_batch_seqs)
    if t.precision.computes_in_fp8 and (exp.do.trains or exp.do is Do.plan):
        yield from _fp8(exp, d.tp)


def is_elementwise(exp: ExperimentConfig) -> bool:
    """Return whether the optimizer is elementwise, so that its parameters may be sharded anywhere."""
    return str(exp.optim.optimizer.get("_target_")) in {f"torch.optim.{name}" for name in ELEMENTWISE}


def _zero(exp: ExperimentConfig, d: Degrees) -> Iterator[Problem]:
    """Yield problems that rule out sharding optimizer state, gradients and weights."""
    key, zero = "parallel.zero_stage", exp.parallel.zero_stage
    cut = next((f"parallel.{name}={getattr(d, name)}" for name in ("tp", "ep") if getattr(d, name) > 1), None)
    if zero != 1 and d.pp > 1:
        why = "a DeepSpeed pipeline refuses ZeRO 2 and 3, and with 0 its clipping misses the later stages' norms"
        rule = f"cannot be used with parallel.pp={d.pp} ({why})"
        yield Problem(key, zero, rule, "set parallel.zero_stage=1, or parallel.pp=1")
    elif zero > 1 and cut:
        why = "it cuts gradients while they are made, before they can be summed over tp and ep"
        fix = f"set parallel.zero_stage=1, or {cut.partition('=')[0]}=1"
        yield Problem(key, zero, f"cannot be used with {cut} ({why})", fix)
    if is_muon(exp.optim) and d.tp == 1:
        cut = None  # experts are whole matrices, on whichever rank
    if (zero or cut) and d.world_size > 1 and not is_elementwise(exp):
        why = "ZeRO cuts flattened parameters" if zero else "a rank has a part of a matrix"
        with_what = f"{key}={zero}" if zero else str(cut)
        rule = f"cannot be used with {with_what} on {d.world_size:,} ranks ({why}, and this class may need whole ones)"
        fix = f"use one of torch.optim.{{{', '.join(ELEMENTWISE)}}}"
        fix += f", or {key}=0" if zero and d.pp == 1 and not cut else ""
        yield Problem("optim.optimizer._target_", exp.optim.optimizer.get("_target_"), rule, fix)


def _sequence(exp: ExperimentConfig, tp: int) -> Iterator[Problem]:
    """Yield problems that rule out sharding the sequence over the tensor-parallel ranks."""
    key, off = "parallel.sequence_parallel", "set parallel.sequence_parallel=false"
    if tp == 1:
        yield Problem(key, True, "has no tensor ranks to cut a sequence over: parallel.tp=1", f"{off}, or parallel.tp")
    if exp.data.seq_len % tp:
        rule = f"cannot cut data.seq_len={exp.data.seq_len} into parallel.tp={tp} equal parts"
        yield Problem(key, True, rule, f"use data.seq_len={-(-exp.data.seq_len // tp) * tp}, or {off[4:]}")
    if exp.model.n_mtp_layers:
        rule = f"cannot be used with model.n_mtp_layers={exp.model.n_mtp_layers}, whose inputs are shorter sequences"
        yield Problem(key, True, rule, f"{off}, or model.n_mtp_layers=0")


def _fp8(exp: ExperimentConfig, tp: int) -> Iterator[Problem]:
    """Yield problems for matrices whose shard on a rank has a width that fp8 products do not support."""
    for key, width, most in _widths(exp.model, routed=exp.kernels.fp8_experts):
        ways = min(tp, most)
        rule = f"not a multiple of {FP8_MULTIPLE}, which trainer.precision='fp8' needs"
        if width % FP8_MULTIPLE:
            fix = "set trainer.precision=bf16, or change it"
            yield Problem(f"model.{key}", _value(exp.model, key), f"makes a matrix {width} wide, {rule}", fix)
        elif width // ways % FP8_MULTIPLE:
            legal = _listed(n for n in divisors(ways) if width // n % FP8_MULTIPLE == 0)
            rule = f"leaves {width // ways} of a width of {width} (model.{key}) to a rank, {rule}"
            yield Problem("parallel.tp", tp, rule, f"use parallel.tp of {legal}, or trainer.precision=bf16")


def _widths(m: ModelConfig, *, routed: bool) -> Iterator[tuple[str, int, int]]:
    """Yield the widths of the blocks' matrices, with those of routed experts if `routed`.

    Each is a tuple of the key that determines it, the width, and the number of shards.
    """
    any_ways = m.n_heads
    yield "d_model", m.d_model, 1
    if m.attention is AttentionKind.mla:
        yield "q_lora_rank", m.q_lora_rank, 1
        yield "kv_lora_rank", m.kv_lora_rank + m.qk_rope_head_dim, 1
        yield "qk_nope_head_dim", m.n_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim), any_ways
        yield "v_head_dim", m.n_heads * m.v_head_dim, any_ways
    else:
        yield "head_dim", m.n_heads * m.head_dim, any_ways
        yield "head_dim", m.n_kv_heads * m.head_dim, m.n_kv_heads
    if not m.moe.n_routed_experts or m.moe.n_dense_layers:
        yield "d_ff", m.d_ff, any_ways
    if m.moe.n_routed_experts and routed:
        yield "moe.d_expert", m.moe.d_expert, any_ways
    if m.moe.n_routed_experts and m.moe.n_shared_experts:
        yield "moe.d_expert", m.moe.n_shared_experts * m.moe.d_expert, any_ways


def _value(m: ModelConfig, key: str) -> int:
    return m.moe.d_expert if key == "moe.d_expert" else int(getattr(m, key))


def _tensor_rule(m: ModelConfig, tp: int) -> str | None:
    """Return the rule that tensor parallelism of degree `tp` breaks, or None."""
    if m.n_heads % tp:
        return f"does not divide model.n_heads={m.n_heads}"
    if m.attention is AttentionKind.gqa and m.n_kv_heads > 0 and m.n_kv_heads % tp and tp % m.n_kv_heads:
        return f"neither divides model.n_kv_heads={m.n_kv_heads} nor is a multiple of it"
    if (not m.moe.n_routed_experts or m.moe.n_dense_layers) and m.d_ff % tp:
        return f"does not divide model.d_ff={m.d_ff}"
    if m.moe.n_routed_experts and m.moe.d_expert % tp:
        return f"does not divide model.moe.d_expert={m.moe.d_expert}"
    if m.vocab_size % tp:
        return f"does not divide model.vocab_size={m.vocab_size}"
    return None


def _expert_rule(m: ModelConfig, d: Degrees, ep: int) -> str | None:
    """Return the rule that expert parallelism of degree `ep` breaks, or None."""
    n = m.moe.n_routed_experts
    if ep > 1 and not n:
        return "has no experts to shard: model.moe.n_routed_experts=0"
    if n % ep:
        return f"does not divide model.moe.n_routed_experts={n}"
    return f"does not divide parallel.dp={d.dp}" if d.dp % ep else None


def _batch(d: Degrees, seqs: int, micro: int) -> Iterator[Problem]:
    """Yield a problem if the sequences of a step cannot be split evenly into complete micro-batches."""
    if d.dp == 1 or micro < 1 or seqs < 1 or seqs % (micro * d.dp) == 0:
        return
    rule = f"is not a multiple of trainer.micro_batch_seqs={micro} x parallel.dp={d.dp}"
    fix = f"use trainer.global_batch_seqs={-(-seqs // (micro * d.dp)) * micro * d.dp}"
    if seqs % d.dp == 0:
        legal = _listed(n for n in divisors(seqs // d.dp) if n < micro)
        fix += f", or trainer.micro_batch_seqs of {legal}"
    yield Problem("trainer.global_batch_seqs", seqs, rule, fix)


def largest(d: Degrees) -> str:
    """Return the name of the largest degree."""
    return max(("dp", "tp", "pp"), key=lambda name: int(getattr(d, name)))


def _listed(degrees: Iterable[int]) -> str:
    return ", ".join(map(str, degrees))
