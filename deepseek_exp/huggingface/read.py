"""Convert the config.json of the families in `FAMILIES` to our model section.

Every field is used, known not to affect the computation, or rejected. The meaning of a field is what transformers 5.23
does with it (models/<family>/modeling_<family>.py, modeling_rope_utils.py).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.huggingface.files import CONFIG, read_json, stored_weights

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "phi3", "glm4", "deepseek_v2", "deepseek_v3",
)  # fmt: skip
# Families that are often asked for, and what of them is not built.
MISSING = (
    "gates with GELU, embeddings scaled by sqrt(hidden_size), and layers that take turns with a window and a rotary "
)
MISSING += "base of their own"
NOT_BUILT = {"gemma3_text": MISSING, "gemma3": f"images, {MISSING}"}
# Families in which a part of each head may turn, and which part if config.json does not say.
PARTIAL = {"phi3": 1.0, "glm4": 0.5}
# Epsilon of DeepSeek's norms inside attention, regardless of rms_norm_eps.
MLA_EPS = 1e-6
# Fields that do not affect what a model computes from tokens.
HARMLESS = (
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "ep_size", "id2label",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "router_jitter_noise",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
REQUIRED: Any = object()
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}
OTHER = "use another checkpoint: this part is not built"
FIX_FIELD = "fix the field, or download the file again"
# Bounds on the values of fields. Larger numbers describe no real model and would take very long to process.
MOST = 2**31 - 1
MOST_LAYERS = 10_000

OFF: dict[str, Any] = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 0),
    **{"attention": "gqa", "qkv_bias": False, "qk_norm": False, "window": 0, "n_global_tokens": 0, "memory_len": 0},
    **{"d_ff_active": 0, "n_mtp_layers": 0, "mtp_loss_weight": 0.3, "sandwich_norm": False},
}
NO_EXPERTS: dict[str, Any] = {
    **{"n_routed_experts": 0, "n_shared_experts": 0, "d_expert": 0, "n_dense_layers": 0, "top_k": 0},
    **{"score": "softmax", "norm_top_k": False, "route_scale": 1.0},
    **{"n_groups": 1, "top_k_groups": 1, "group_score": "max"},
    **{"capacity_factor": 0.0, "balance": "none", "bias_update_rate": 0.001, "aux_loss_weight": 0.01},
    **{"sequence_loss_weight": 0.0, "domains": [], "domain_loss_weight": 0.0},
}


@dataclass(frozen=True)
class Release:
    """The model that a config.json describes.

    Attributes:
        family: its model_type.
        model: the values of our model section, with the keys of `config.ModelConfig`.
        interleaved: whether MLA's rotary pairs are adjacent in the weights rather than half a head apart.
    """

    family: str
    model: dict[str, Any]
    interleaved: bool


class Fields:
    """The fields of a JSON object, taken one by one. Problems with them are collected in `problems`."""

    def __init__(self, values: Mapping[str, Any], file: Path, prefix: str = "") -> None:
        self.values, self.file, self.prefix = values, file, prefix
        self.untouched = set(values)
        self.problems: list[Problem] = []

    def take(self, name: str, kind: type, default: Any = REQUIRED, null: Any = REQUIRED) -> Any:
        """Return a field's value.

        Args:
            name: name of the field.
            kind: its type; float accepts integers too.
            default: the value if the field is missing.
            null: the value if the field is null; `default` if not set.
        """
        self.untouched.discard(name)
        value = self.values.get(name)
        if value is None:
            given = null if name in self.values and null is not REQUIRED else default
            if given is not REQUIRED:
                return given
            self.refuse(name, f"is needed: {WORDS[kind]}", "fetch the file again")
            return kind()
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            self.refuse(name, f"is not {WORDS[kind]}", FIX_FIELD)
            return kind()
        if kind is int and not 0 <= value <= MOST:
            self.refuse(name, f"is not a whole number from 0 to {MOST}", FIX_FIELD)
            return 0
        if kind is float and not abs(value) <= sys.float_info.max:
            self.refuse(name, "is not a finite number", FIX_FIELD)
            return 0.0
        return kind(value)

    def must(self, name: str, allowed: Iterable[Any], rule: str, fix: str = OTHER) -> None:
        """Record a problem if the field is present with a value that is not allowed."""
        self.untouched.discard(name)
        if name in self.values and self.values[name] not in allowed:
            self.refuse(name, rule, fix)

    def refuse(self, name: str, rule: str, fix: str = OTHER) -> None:
        """Record a problem with a field."""
        self.problems.append(Problem(self.prefix + name, self.values.get(name), f"in {self.file} {rule}", fix))

    def close(self, harmless: Iterable[str] = ()) -> list[Problem]:
        """Return all problems; each unknown field is one."""
        for name in sorted(self.untouched - set(harmless)):
            rule = "is not a field that is known here, so it may change what the model computes"
            self.refuse(name, rule, "remove it if it changes nothing, or use another checkpoint")
        return self.problems


def read_release(folder: Path, key: str = "init_from") -> Release:
    """Return the description of a Hugging Face checkpoint.

    The number of MTP modules is taken from the weights: a folder that was saved without them has none.

    Args:
        folder: contains config.json and the weights.
        key: the configuration key that led here, for the messages.

    Raises:
        ConfigError: config.json is missing or not JSON, or has fields that our model cannot express; all are reported.
        CheckpointError: there are no readable weights.
    """
    values = read_json(folder / CONFIG, key)
    f = Fields(values, folder / CONFIG)
    family = values.get("model_type")
    if family in NOT_BUILT:
        f.refuse("model_type", f"needs {NOT_BUILT[family]}", f"use a checkpoint of one of {', '.join(FAMILIES)}")
        raise ConfigError(*f.problems)
    if family not in FAMILIES:
        f.refuse("model_type", f"is not one of {', '.join(FAMILIES)}", "use a checkpoint of one of these")
        raise ConfigError(*f.problems)
    model = {**OFF, **_common(f, family), **READERS[family](f)}
    if family == "deepseek_v3":
        model["n_mtp_layers"] = _modules_ahead(folder, key, f)
    if model["moe"]["n_dense_layers"] >= model["n_layers"] + model["n_mtp_layers"]:
        model["moe"] = {**NO_EXPERTS}
    problems = [*_unsupported(f), *f.close(HARMLESS)]
    if problems:
        raise ConfigError(*problems)
    interleaved = bool(values.get("rope_interleave", True))
    return Release(family, model, interleaved)


def _common(f: Fields, family: str) -> dict[str, Any]:
    f.must("hidden_act", ("silu",), "is not silu, the only gate of our feed-forward network")
    f.must("mlp_bias", (False,), "asks for biases in the feed-forward network, which ours has not")
    if family != "glm4":
        f.must("attention_bias", (False,), "asks for biases in the attention, of the output too, which ours has not")
    d_model, n_heads = f.take("hidden_size", int), f.take("num_attention_heads", int)
    max_seq_len, n_layers = f.take("max_position_embeddings", int), f.take("num_hidden_layers", int)
    if n_layers > MOST_LAYERS:
        f.refuse("num_hidden_layers", f"is more than {MOST_LAYERS:,}", FIX_FIELD)
    default_head_dim = REQUIRED if family in ("qwen3", "glm4") else d_model // max(1, n_heads)
    head_dim = 0 if family.startswith("deepseek") else f.take("head_dim", int, default_head_dim)
    theta, scaling, rotary_dim = _rope(f, family, max_seq_len, head_dim)
    return {
        "version": family,
        "vocab_size": f.take("vocab_size", int),
        "max_seq_len": max_seq_len,
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": f.take(
            "num_key_value_heads", int, n_heads if family in ("llama", "phi3") else REQUIRED, null=n_heads
        ),
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "d_ff": f.take("intermediate_size", int),
        "moe": dict(NO_EXPERTS),
        "norm_eps": f.take("rms_norm_eps", float),
        "tie_embeddings": f.take("tie_word_embeddings", bool, False),
        "init_std": f.take("initializer_range", float, 0.02) or 0.02,
    }


def _llama(f: Fields) -> dict[str, Any]:
    return {}


def _mistral(f: Fields) -> dict[str, Any]:
    return {"window": f.take("sliding_window", int, null=0)}


def _qwen2(f: Fields) -> dict[str, Any]:
    return {"window": _window_of_all_layers(f), "qkv_bias": True}


def _qwen3(f: Fields) -> dict[str, Any]:
    return {"window": _window_of_all_layers(f), "qk_norm": True}


def _qwen3_moe(f: Fields) -> dict[str, Any]:
    used, window = f.take("use_sliding_window", bool, False), f.take("sliding_window", int, 4096, null=0)
    f.must("decoder_sparse_step", (1,), "is not 1: blocks with and without experts would take turns")
    dense = f.take("mlp_only_layers", list, [])
    if dense != list(range(len(dense))):
        f.refuse("mlp_only_layers", "are not the first blocks, the only ones that can be dense here")
    f.untouched.discard("max_window_layers")  # in files of Qwen; transformers does not read it
    name = "num_local_experts" if f.values.get("num_local_experts") is not None else "num_experts"
    moe = {"n_routed_experts": f.take(name, int), "top_k": f.take("num_experts_per_tok", int)}
    moe |= {"d_expert": f.take("moe_intermediate_size", int), "norm_top_k": f.take("norm_topk_prob", bool, False)}
    moe |= {"n_dense_layers": len(dense), **_aux_loss(f)}
    return {"window": window if used else 0, "qk_norm": True, "moe": {**NO_EXPERTS, **moe}}


def _aux_loss(f: Fields) -> dict[str, Any]:
    weight = f.take("router_aux_loss_coef", float, 0.001)
    return {"balance": "aux_loss", "aux_loss_weight": weight} if weight > 0 else {}


def _mixtral(f: Fields) -> dict[str, Any]:
    moe = {"n_routed_experts": f.take("num_local_experts", int), "top_k": f.take("num_experts_per_tok", int)}
    moe |= {"d_expert": f.take("intermediate_size", int), "norm_top_k": True, **_aux_loss(f)}
    return {"window": f.take("sliding_window", int, 0), "moe": {**NO_EXPERTS, **moe}}


def _phi3(f: Fields) -> dict[str, Any]:
    # dropout is for training, and the original length for a scaling that is not built
    f.untouched -= {"resid_pdrop", "embd_pdrop", "original_max_position_embeddings"}
    return {"window": f.take("sliding_window", int, 0)}


def _glm4(f: Fields) -> dict[str, Any]:
    return {"qkv_bias": f.take("attention_bias", bool, True), "sandwich_norm": True}


def _deepseek(f: Fields) -> dict[str, Any]:
    """Read the fields that the two DeepSeek families share."""
    if f.take("rms_norm_eps", float) != MLA_EPS:
        rule = f"is not {MLA_EPS:g}, which the norms of the latents use whatever it says, and ours are all alike"
        f.refuse("rms_norm_eps", rule)
    f.untouched -= {"head_dim", "qk_head_dim"}  # implied by the widths of the parts
    f.must("moe_layer_freq", (1,), "is not 1: blocks with and without experts would take turns")
    rope_dim, nope_dim = f.take("qk_rope_head_dim", int), f.take("qk_nope_head_dim", int)
    n_heads = f.values.get("num_attention_heads")
    f.must("num_key_value_heads", (n_heads, None), f"is not num_attention_heads={n_heads}, as latent attention needs")
    n_shared = f.take("n_shared_experts", int)
    if n_shared < 1:
        f.refuse("n_shared_experts", "is less than 1, which transformers cannot build")
    alpha, by_sequence = f.take("aux_loss_alpha", float, 0.0), f.take("seq_aux", bool, True)
    n_experts = f.take("n_routed_experts", int)
    moe = {
        "n_routed_experts": n_experts,
        "n_shared_experts": n_shared,
        "d_expert": f.take("moe_intermediate_size", int),
        "n_dense_layers": f.take("first_k_dense_replace", int),
        "top_k": f.take("num_experts_per_tok", int),
        "route_scale": f.take("routed_scaling_factor", float),
        "sequence_loss_weight": alpha if by_sequence else 0.0,
    }
    if alpha > 0 and not by_sequence:
        moe |= {"balance": "aux_loss", "aux_loss_weight": alpha}
    return {
        "attention": "mla",
        "head_dim": nope_dim + nope_dim % 2 or rope_dim,  # not used by this attention
        "q_lora_rank": f.take("q_lora_rank", int, null=0),
        "kv_lora_rank": f.take("kv_lora_rank", int),
        "qk_nope_head_dim": nope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": f.take("v_head_dim", int),
        "moe": {**NO_EXPERTS, **moe},
    }


def _deepseek_v2(f: Fields) -> dict[str, Any]:
    model = _deepseek(f)
    moe = model["moe"]
    f.must("scoring_func", ("softmax",), "is not softmax, as in DeepSeek-V2")
    rule = "is ignored by transformers, while the code of the release divides the weights by their sum without scaling"
    f.must("norm_topk_prob", (False, None), rule)
    method = f.take("topk_method", str, "greedy")
    groups, chosen = f.take("n_group", int, 1), f.take("topk_group", int, 1)
    if method == "group_limited_greedy":
        moe |= {"n_groups": groups, "top_k_groups": chosen}
    elif method != "greedy":
        f.refuse("topk_method", "is not one of greedy, group_limited_greedy")
    return model


def _deepseek_v3(f: Fields) -> dict[str, Any]:
    model = _deepseek(f)
    f.must("scoring_func", ("sigmoid",), "is not sigmoid, as in DeepSeek-V3")
    f.must("topk_method", ("noaux_tc",), "is not noaux_tc, as in DeepSeek-V3")
    f.must("rope_interleave", (True, False), "is not true or false")
    f.untouched -= {"num_nextn_predict_layers", "num_mtp_layers"}
    moe = {"score": "sigmoid", "norm_top_k": f.take("norm_topk_prob", bool), "group_score": "top2_sum"}
    moe |= {"n_groups": f.take("n_group", int), "top_k_groups": f.take("topk_group", int)}
    model["moe"] |= {**moe, "balance": "bias"}
    return model


READERS: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "glm4": _glm4,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}


def _window_of_all_layers(f: Fields) -> int:
    """Return the window that all layers share, or 0 if they do not share one."""
    used, window = f.take("use_sliding_window", bool, False), f.take("sliding_window", int, 4096, null=0)
    first, n_layers = f.take("max_window_layers", int, 28), f.take("num_hidden_layers", int)
    window = window if used else 0
    kinds = {str(kind) for kind in f.take("layer_types", list, [])} or {
        "sliding_attention" if window and i >= first else "full_attention" for i in range(min(n_layers, MOST_LAYERS))
    }
    if kinds == {"sliding_attention"} and window:
        return int(window)
    if kinds != {"full_attention"}:
        name = "layer_types" if f.values.get("layer_types") else "max_window_layers"
        f.refuse(name, f"with use_sliding_window={used} gives layers different windows, and ours share one")
    return 0


def _modules_ahead(folder: Path, key: str, f: Fields) -> int:
    asked = f.take("num_nextn_predict_layers", int, f.take("num_mtp_layers", int, 0))
    pattern = re.compile(r"model\.layers\.\d+\.eh_proj\.weight")
    there = any(pattern.fullmatch(name) for name in stored_weights(folder, key))
    return int(asked) if there else 0


def _rope(f: Fields, family: str, max_seq_len: int, head_dim: int) -> tuple[float, dict[str, Any], int]:
    """Read the rotary embedding: rope_parameters of transformers 5, or rope_theta and rope_scaling of older files.

    Returns:
        The base, the values of our section rope_scaling, and rotary_dim.
    """
    name = "rope_scaling" if f.values.get("rope_scaling") else "rope_parameters"
    f.untouched -= {"rope_scaling", "rope_parameters"}
    inner = f.values.get(name) or {}
    if not isinstance(inner, dict):
        f.refuse(name, "is not a mapping", FIX_FIELD)
        inner = {}
    r = Fields(inner, f.file, f"{name}.")
    theta = r.take("rope_theta", float, f.take("rope_theta", float, 1e6 if family == "mixtral" else 1e4))
    rotary_dim = _rotary_dim(f, r, family, head_dim)
    kind = _scaling_kind(r, family)
    original = r.take("original_max_position_embeddings", int, max_seq_len)
    scaling = {
        "kind": "none" if kind == "default" else kind,
        "factor": 1.0,
        "original_max_seq_len": original,
        "low_freq_factor": r.take("low_freq_factor", float, REQUIRED if kind == "llama3" else 1.0),
        "high_freq_factor": r.take("high_freq_factor", float, REQUIRED if kind == "llama3" else 4.0),
        "beta_fast": r.take("beta_fast", float, 32.0) or 32.0,
        "beta_slow": r.take("beta_slow", float, 1.0) or 1.0,
        "mscale": r.take("mscale", float, 0.0),
        "mscale_all_dim": r.take("mscale_all_dim", float, 0.0),
    }
    factor_left_out = max_seq_len / max(1, original) if kind == "yarn" else REQUIRED
    factor = r.take("factor", float, 1.0 if kind == "default" else factor_left_out)
    if kind != "default":
        scaling["factor"] = factor
    else:
        scaling["original_max_seq_len"] = max_seq_len
    if kind == "yarn":
        r.must("truncate", (True, None), "is not true: the borders of YaRN's blend are rounded to whole pairs here")
        factor_of_tables = r.take("attention_factor", float, None)
        implied = yarn_table_factor(scaling)
        if not 0 < implied < math.inf:
            name = "mscale_all_dim" if scaling["mscale_all_dim"] < 0 else "mscale"
            r.refuse(name, "makes the factor of the rotary tables no number above 0", FIX_FIELD)
        elif factor_of_tables is not None and not math.isclose(factor_of_tables, implied, rel_tol=1e-6):
            r.refuse("attention_factor", f"is not the {implied:.6g} that follows from factor and mscale")
    f.problems += r.close(("truncate", "attention_factor", "finetuned"))
    return theta, scaling, rotary_dim


def _rotary_dim(f: Fields, r: Fields, family: str, head_dim: int) -> int:
    """Return how many coordinates of a head turn; 0 if all of them do."""
    name = "partial_rotary_factor"
    if family not in PARTIAL:
        for fields in (f, r):
            fields.must(name, (1, None), f"is not 1: the family {family} turns whole heads")
        return 0
    turning = int(head_dim * r.take(name, float, f.take(name, float, PARTIAL[family])))
    if turning % 2 or not 0 < turning <= head_dim:
        fields = r if r.values.get(name) is not None else f
        fields.refuse(name, f"turns {turning} of {head_dim} coordinates, and pairs of them turn")
    return 0 if turning == head_dim else turning


def _scaling_kind(r: Fields, family: str) -> str:
    kind, kinds = str(r.take("rope_type", str, r.take("type", str, "default"))), ["default", "linear", "llama3", "yarn"]
    if family == "phi3":
        kinds = ["default"]
    if kind not in kinds:
        rule = f"is not {'' if len(kinds) == 1 else 'one of '}{', '.join(kinds)}"
        if kind in ("longrope", "su"):
            rule += ": it chooses the wavelengths by the length of each text"
        r.refuse("rope_type" if "rope_type" in r.values else "type", rule)
    return kind


def yarn_table_factor(scaling: Mapping[str, Any]) -> float:
    """Return YaRN's factor of the rotary tables, derived as in `models/rope.py`."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling["mscale"] and scaling["mscale_all_dim"]:
        by = mscale(scaling["mscale_all_dim"])
        return mscale(scaling["mscale"]) / by if by else math.inf
    return mscale(1.0)


def _unsupported(f: Fields) -> list[Problem]:
    """Return problems for known fields whose feature is not implemented for any family."""
    if f.values.get("quantization_config"):
        f.untouched.discard("quantization_config")
        said = f.values["quantization_config"]
        key, value = "quantization_config", said
        if isinstance(said, dict):
            key, value = "quantization_config.quant_method", said.get("quant_method")
        rule = f"in {f.file} says that the weights are quantized, and only plain ones are read"
        return [Problem(key, value, rule, "write the weights out as bf16 first")]
    return []
