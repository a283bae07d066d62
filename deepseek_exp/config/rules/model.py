"""Rules of the section `model`: constraints between its heads, layers and experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from deepseek_exp.config import (
    AttentionKind,
    Balance,
    ExperimentConfig,
    GroupScore,
    MoEConfig,
    RopeScalingKind,
)
from deepseek_exp.config.topology import divisors
from deepseek_exp.errors import Problem


def model_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem for each part of the model section that cannot be built."""
    yield from _heads(exp)
    yield from _latent_attention(exp)
    yield from _feed_forward(exp)


# Keys that only multi-head latent attention reads.
OF_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def unread_problems(exp: ExperimentConfig, named: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each model key that the command line sets and nothing reads.

    Args:
        exp: the experiment.
        named: the keys that the command line names. A model's own file may keep values of a part that is turned off.
    """
    m = exp.model
    off = {f"model.{name}": getattr(m, name) for name in OF_MLA if m.attention is AttentionKind.gqa}
    why = dict.fromkeys(off, "model.attention='gqa'")
    if not m.moe.n_routed_experts:
        off["model.moe.top_k"], why["model.moe.top_k"] = m.moe.top_k, "model.moe.n_routed_experts=0"
    for path, value in off.items():
        if path in named and value:
            yield Problem(path, value, f"does nothing while {why[path]}", f"leave {path} out")


def _heads(exp: ExperimentConfig) -> Iterator[Problem]:
    m = exp.model
    if m.n_kv_heads >= 1 and m.n_heads % m.n_kv_heads:
        legal = ", ".join(map(str, divisors(m.n_heads)))
        rule = f"does not divide model.n_heads={m.n_heads}"
        yield Problem("model.n_kv_heads", m.n_kv_heads, rule, f"use model.n_kv_heads of {legal}")
    if m.head_dim % 2:
        rule = "is odd, and the rotary embedding turns pairs"
        yield Problem("model.head_dim", m.head_dim, rule, f"use model.head_dim={m.head_dim + 1}")
    if m.rotary_dim % 2:
        rule = "is odd, and the rotary embedding turns pairs"
        yield Problem("model.rotary_dim", m.rotary_dim, rule, f"use model.rotary_dim={m.rotary_dim + 1}")
    if m.rotary_dim > m.head_dim and m.attention is AttentionKind.gqa:
        rule = f"is more than model.head_dim={m.head_dim}"
        yield Problem("model.rotary_dim", m.rotary_dim, rule, f"use {m.head_dim} or less; 0 turns all")


def _latent_attention(exp: ExperimentConfig) -> Iterator[Problem]:
    m = exp.model
    if m.attention is AttentionKind.mla:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(m, name) < 1:
                yield Problem(f"model.{name}", getattr(m, name), "must be at least 1 for mla", f"set model.{name}=16")
        if m.qk_rope_head_dim % 2:
            rule = "is odd, and the rotary embedding turns pairs"
            yield Problem("model.qk_rope_head_dim", m.qk_rope_head_dim, rule, f"use {m.qk_rope_head_dim + 1}")
        for name, off in (("qkv_bias", "false"), ("qk_norm", "false"), ("rotary_dim", "0")):
            if value := getattr(m, name):
                rule = "is for model.attention='gqa' and not for 'mla'"
                yield Problem(f"model.{name}", value, rule, f"set model.{name}={off}")
    s = m.rope_scaling
    if s.kind is RopeScalingKind.none and s.factor != 1:
        rule = "does nothing while model.rope_scaling.kind='none'"
        yield Problem(
            "model.rope_scaling.factor", s.factor, rule, "set model.rope_scaling.kind=yarn, or the factor to 1"
        )
    if s.low_freq_factor >= s.high_freq_factor:
        rule = f"must be less than model.rope_scaling.high_freq_factor={s.high_freq_factor:g}"
        yield Problem("model.rope_scaling.low_freq_factor", s.low_freq_factor, rule, "use 1 and 4")


def _feed_forward(exp: ExperimentConfig) -> Iterator[Problem]:
    m = exp.model
    if m.d_ff_active > m.d_ff:
        rule = f"is more than model.d_ff={m.d_ff}"
        yield Problem("model.d_ff_active", m.d_ff_active, rule, f"use {m.d_ff} or less; 0 keeps all")
    if m.n_mtp_layers and exp.data.seq_len <= m.n_mtp_layers:
        rule = f"leaves data.seq_len={exp.data.seq_len} nothing to predict"
        yield Problem("model.n_mtp_layers", m.n_mtp_layers, rule, f"use {exp.data.seq_len - 1} or less")
    if m.moe.n_routed_experts:
        yield from _experts(exp)
        return
    off = {"n_shared_experts": 0, "domains": [], "capacity_factor": 0, "balance": "none", "sequence_loss_weight": 0}
    for name, nothing in off.items():
        value = getattr(m.moe, name)
        value = getattr(value, "value", value)
        if value != nothing:
            rule = "does nothing while model.moe.n_routed_experts=0"
            fix = f"set model.moe.n_routed_experts, or model.moe.{name}={nothing}"
            yield Problem(f"model.moe.{name}", value, rule, fix)


def _experts(exp: ExperimentConfig) -> Iterator[Problem]:
    m, e = exp.model, exp.model.moe
    n = e.n_routed_experts
    if not 1 <= e.top_k <= n:
        rule = f"must be from 1 to model.moe.n_routed_experts={n}"
        yield Problem("model.moe.top_k", e.top_k, rule, f"use model.moe.top_k={min(2, n)}")
    if e.top_k == 1 and e.norm_top_k:
        rule = "makes every weight 1 with model.moe.top_k=1, so that the router learns nothing"
        yield Problem("model.moe.norm_top_k", True, rule, "set model.moe.norm_top_k=false")
    for name, width in (("moe.d_expert", e.d_expert), ("d_model", m.d_model)):
        if width < 8 or width % 8:
            rule = "is not a multiple of 8, which the experts' matrix products need"
            yield Problem(f"model.{name}", width, rule, f"use model.{name}={max(8, round(width / 8) * 8)}")
    if e.n_dense_layers >= m.n_layers:
        rule = f"leaves none of model.n_layers={m.n_layers} to the experts"
        yield Problem("model.moe.n_dense_layers", e.n_dense_layers, rule, f"use {m.n_layers - 1} or less")
    if m.d_ff_active and not e.n_dense_layers:
        rule = "does nothing while model.moe.n_dense_layers=0 makes every block a mixture of experts"
        yield Problem("model.d_ff_active", m.d_ff_active, rule, "set model.d_ff_active=0, or model.moe.n_dense_layers")
    yield from _groups(e)
    yield from _domains(exp)


def _groups(e: MoEConfig) -> Iterator[Problem]:
    n = e.n_routed_experts
    if e.n_groups < 1:
        return  # reported by the range of the key
    if n % e.n_groups:
        legal = ", ".join(map(str, divisors(n)))
        rule = f"does not divide model.moe.n_routed_experts={n}"
        yield Problem("model.moe.n_groups", e.n_groups, rule, f"use one of {legal}")
        return
    size = n // e.n_groups
    if e.top_k_groups > e.n_groups:
        rule = f"is more than model.moe.n_groups={e.n_groups}"
        yield Problem("model.moe.top_k_groups", e.top_k_groups, rule, f"use {e.n_groups} or less")
    elif e.top_k > e.top_k_groups * size:
        rule = f"is more than the {e.top_k_groups * size} experts of model.moe.top_k_groups={e.top_k_groups} groups"
        yield Problem("model.moe.top_k", e.top_k, rule, "lower it, or raise model.moe.top_k_groups")
    if e.group_score is GroupScore.top2_sum and e.n_groups > 1 and size < 2:
        rule = f"needs two experts in a group and model.moe.n_groups={e.n_groups} leaves {size}"
        yield Problem("model.moe.group_score", e.group_score.value, rule, "use model.moe.group_score=max")


def _domains(exp: ExperimentConfig) -> Iterator[Problem]:
    e, names = exp.model.moe, exp.model.moe.domains
    if not names:
        return
    if len(set(names)) < len(names) or len(names) < 2:
        yield Problem("model.moe.domains", names, "must be two different names or more", "name each domain once")
    elif e.n_routed_experts % len(names):
        rule = f"does not share model.moe.n_routed_experts={e.n_routed_experts} evenly"
        yield Problem("model.moe.domains", names, rule, f"use a multiple of {len(names)} experts")
    elif e.top_k > e.n_routed_experts // len(names):
        rule = f"is more than the {e.n_routed_experts // len(names)} experts of the domain {names[0]}"
        yield Problem("model.moe.top_k", e.top_k, rule, "lower it, or raise model.moe.n_routed_experts")
    if e.n_groups > 1:
        rule = "cannot be used with model.moe.domains, which narrow the choice already"
        yield Problem("model.moe.n_groups", e.n_groups, rule, "set model.moe.n_groups=1")
    if e.capacity_factor:
        rule = "cannot be used with model.moe.domains: it bounds by the mean over all domains, "
        rule += "whose texts differ in amount"
        yield Problem("model.moe.capacity_factor", e.capacity_factor, rule, "set model.moe.capacity_factor=0")
    if e.balance is Balance.aux_loss or e.sequence_loss_weight:
        key = "balance" if e.balance is Balance.aux_loss else "sequence_loss_weight"
        value = e.balance.value if e.balance is Balance.aux_loss else e.sequence_loss_weight
        rule = "would even out the load across model.moe.domains, whose texts differ in amount"
        fix = "set model.moe.balance=bias" if key == "balance" else "set model.moe.sequence_loss_weight=0"
        yield Problem(f"model.moe.{key}", value, rule, fix)
    for name in exp.data.mixture:  # the name of a part is the domain label of its text
        if name not in names:
            rule = f"is not one of model.moe.domains={names}"
            yield Problem("data.mixture", name, rule, "name the parts of the mixture after the domains")
