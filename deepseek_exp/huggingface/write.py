"""Convert our model section to config.json of the Hugging Face family that computes the same."""

from __future__ import annotations

from typing import Any

from deepseek_exp.config import AttentionKind, Balance, GroupScore, ModelConfig, RopeScalingKind, Score
from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.huggingface.read import MLA_EPS

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def family_of(m: ModelConfig) -> str:
    """Return the Hugging Face family that can express a model.

    Raises:
        ConfigError: none can; lists every key that rules out the nearest family.
    """
    family = _nearest(m)
    problems = []
    for key, (value, wanted) in _wanted(m, family).items():
        if value not in wanted:
            shown = " or ".join(str(getattr(w, "value", w)).lower() for w in wanted)
            rule = f"has no place in a Hugging Face model of the family {family}, which is the nearest and has {shown}"
            fix = f"train a model with {key}={shown}; this one stays usable from its own checkpoints"
            problems.append(Problem(key, getattr(value, "value", value), rule, fix))
    if problems:
        raise ConfigError(*problems)
    return family


def write_config(m: ModelConfig, *, dtype: str, start_id: int | None, end_id: int) -> dict[str, Any]:
    """Return the config.json of a model for its Hugging Face family.

    Rotary scaling is written as rope_theta and rope_scaling, which all versions of transformers read.

    Args:
        m: the model.
        dtype: type of its weights, such as bfloat16.
        start_id: the token that a document begins with, if there is one.
        end_id: the token that ends a document.

    Raises:
        ConfigError: no family can express the model.
    """
    family = family_of(m)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "torch_dtype": dtype,
        "bos_token_id": start_id,
        "eos_token_id": end_id,
        "pad_token_id": None,
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "intermediate_size": m.d_ff,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "num_key_value_heads": m.n_heads if m.attention is AttentionKind.mla else m.n_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": m.max_seq_len,
        "initializer_range": m.init_std,
        "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings,
        "rope_theta": m.rope_theta,
        "rope_scaling": _rope_scaling(m),
        "attention_dropout": 0.0,
    }
    if family.startswith("deepseek"):
        return config | _deepseek(m) | (_deepseek_v2(m) if family == "deepseek_v2" else _deepseek_v3(m))
    return config | {"head_dim": m.head_dim} | _own_fields(m, family)


def _own_fields(m: ModelConfig, family: str) -> dict[str, Any]:
    """Return the fields that not all families without MLA have."""
    window, all_dense = {"sliding_window": m.window or None}, 0 if m.window else m.n_layers
    switched = {"use_sliding_window": bool(m.window), **window}
    experts = {
        "num_experts_per_tok": m.moe.top_k,
        "router_aux_loss_coef": m.moe.aux_loss_weight if m.moe.balance is Balance.aux_loss else 0.0,
    }
    fields: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": window,
        "qwen2": {**switched, "max_window_layers": all_dense},
        "qwen3": {"attention_bias": False, **switched, "max_window_layers": all_dense},
        "qwen3_moe": {"attention_bias": False, **switched, **experts, **_qwen3_moe(m)},
        "mixtral": {
            **window,
            **experts,
            "num_local_experts": m.moe.n_routed_experts,
            "intermediate_size": m.moe.d_expert,
        },
        "phi3": {**window, "partial_rotary_factor": _turning(m)},
        "glm4": {"attention_bias": m.qkv_bias, "partial_rotary_factor": _turning(m)},
    }
    return fields[family]


def _nearest(m: ModelConfig) -> str:
    if m.attention is AttentionKind.mla:
        softmax = m.moe.n_routed_experts and m.moe.score is Score.softmax
        return "deepseek_v2" if softmax else "deepseek_v3"
    if m.moe.n_routed_experts:
        return "qwen3_moe" if m.qk_norm else "mixtral"
    if m.sandwich_norm:
        return "glm4"
    if m.rotary_dim:
        return "phi3"
    if m.qk_norm:
        return "qwen3"
    if m.qkv_bias:
        return "qwen2"
    return "mistral" if m.window or m.d_model % m.n_heads else "llama"


def _wanted(m: ModelConfig, family: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return for each key its value and the values that the family supports."""
    moe = m.moe
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "model.n_global_tokens": (m.n_global_tokens if m.window else 0, (0,)),
        "model.memory_len": (m.memory_len, (0,)),
        "model.d_ff_active": (m.d_ff_active, (0,)),
        "model.moe.domains": (", ".join(moe.domains) or "[]", ("[]",)),
        "model.sandwich_norm": (m.sandwich_norm, (family == "glm4",)),
    }
    if family != "deepseek_v3":
        wanted["model.n_mtp_layers"] = m.n_mtp_layers, (0,)
    if family in ("mixtral", "qwen3_moe", "deepseek_v2"):
        wanted["model.moe.balance"] = moe.balance, (Balance.none, Balance.aux_loss)
    if family in ("mixtral", "qwen3_moe"):
        wanted |= _of_plain_experts(m, family)
    return wanted | (_of_deepseek(m, family) if family.startswith("deepseek") else _of_attention(m, family))


def _of_attention(m: ModelConfig, family: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the keys of attention in which the families without MLA differ."""
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    if family not in ("glm4", "phi3"):
        wanted["model.rotary_dim"] = m.rotary_dim, (0,)
    if family in ("glm4", "phi3"):
        wanted["model.qk_norm"] = m.qk_norm, (False,)
    if family in ("qwen3", "qwen3_moe", "mixtral", "phi3"):
        wanted["model.qkv_bias"] = m.qkv_bias, (False,)
    if family == "phi3":
        wanted["model.rope_scaling.kind"] = m.rope_scaling.kind, (RopeScalingKind.none,)
    if family == "glm4":
        wanted["model.window"] = m.window, (0,)
    return wanted


def _of_deepseek(m: ModelConfig, family: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the keys of attention and experts of DeepSeek's families."""
    moe = m.moe
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "model.window": (m.window, (0,)),
        "model.norm_eps": (m.norm_eps, (MLA_EPS,)),
    }
    if moe.n_groups > 1:
        score = GroupScore.max if family == "deepseek_v2" else GroupScore.top2_sum
        wanted["model.moe.group_score"] = moe.group_score, (score,)
    if moe.n_routed_experts and not moe.n_shared_experts:
        wanted["model.moe.n_shared_experts"] = 0, ("1 or more",)
    if family == "deepseek_v2":
        wanted["model.moe.norm_top_k"] = moe.norm_top_k, (False,)
        if m.d_model % m.n_heads:
            wanted["model.n_heads"] = m.n_heads, (f"a divisor of model.d_model={m.d_model}",)
    return wanted


def _of_plain_experts(m: ModelConfig, family: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the keys of experts without DeepSeek's parts: Mixtral's, and Qwen's with less restricted weights."""
    moe = m.moe
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "model.moe.n_shared_experts": (moe.n_shared_experts, (0,)),
        "model.moe.score": (moe.score, (Score.softmax,)),
        "model.moe.route_scale": (moe.route_scale, (1.0,)),
        "model.moe.n_groups": (moe.n_groups, (1,)),
    }
    if family == "mixtral":
        wanted["model.moe.n_dense_layers"] = moe.n_dense_layers, (0,)
        wanted["model.moe.norm_top_k"] = moe.norm_top_k, (True,)
    return wanted


def _turning(m: ModelConfig) -> float:
    """Return the factor of head_dim whose product, rounded down, is rotary_dim."""
    rotary = m.rotary_dim or m.head_dim
    exact = rotary / m.head_dim
    return exact if int(m.head_dim * exact) == rotary else (rotary + 0.5) / m.head_dim


def _qwen3_moe(m: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": m.moe.n_routed_experts,
        "moe_intermediate_size": m.moe.d_expert,
        "norm_topk_prob": m.moe.norm_top_k,
        "mlp_only_layers": list(range(m.moe.n_dense_layers)),
        "decoder_sparse_step": 1,
    }


def _deepseek(m: ModelConfig) -> dict[str, Any]:
    """Return the fields that the two DeepSeek families share. Without experts, all blocks are declared dense."""
    moe, by_sequence = m.moe, m.moe.sequence_loss_weight > 0
    alpha = moe.sequence_loss_weight
    if not by_sequence and moe.balance is Balance.aux_loss:
        alpha = moe.aux_loss_weight
    return {
        "attention_bias": False,
        "q_lora_rank": m.q_lora_rank or None,
        "kv_lora_rank": m.kv_lora_rank,
        "qk_nope_head_dim": m.qk_nope_head_dim,
        "qk_rope_head_dim": m.qk_rope_head_dim,
        "v_head_dim": m.v_head_dim,
        "n_routed_experts": moe.n_routed_experts or 1,
        "n_shared_experts": moe.n_shared_experts or 1,
        "moe_intermediate_size": moe.d_expert or 8,
        "first_k_dense_replace": moe.n_dense_layers if moe.n_routed_experts else m.n_layers + m.n_mtp_layers,
        "num_experts_per_tok": moe.top_k or 1,
        "routed_scaling_factor": moe.route_scale,
        "n_group": moe.n_groups,
        "topk_group": moe.top_k_groups if moe.n_groups > 1 else 1,
        "norm_topk_prob": moe.norm_top_k,
        "aux_loss_alpha": alpha,
        "seq_aux": by_sequence or not alpha,
        "moe_layer_freq": 1,
    }


def _deepseek_v2(m: ModelConfig) -> dict[str, Any]:
    method = "group_limited_greedy" if m.moe.n_groups > 1 else "greedy"
    return {"scoring_func": "softmax", "topk_method": method, "mlp_bias": False}


def _deepseek_v3(m: ModelConfig) -> dict[str, Any]:
    own = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}
    return own | {"num_nextn_predict_layers": m.n_mtp_layers}


def _rope_scaling(m: ModelConfig) -> dict[str, Any] | None:
    s, kind = m.rope_scaling, m.rope_scaling.kind
    if kind is RopeScalingKind.none:
        return None
    fields: dict[str, Any] = {"rope_type": kind.value, "factor": s.factor}
    if kind is not RopeScalingKind.linear:
        fields["original_max_position_embeddings"] = s.original_max_seq_len
    if kind is RopeScalingKind.llama3:
        fields |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if kind is RopeScalingKind.yarn:
        fields |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
    if kind is RopeScalingKind.yarn or m.attention is AttentionKind.mla:
        fields |= {name: value for name in ("mscale", "mscale_all_dim") if (value := getattr(s, name))}
    return fields
