"""The names of a model's parameters, and which of them share optimizer settings, without making the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from deepseek_exp.config.enums import AttentionKind
from deepseek_exp.config.optim_section import OptimConfig
from deepseek_exp.config.schema import ModelConfig

MUON = "deepseek_exp.train.muon.Muon"


@dataclass(frozen=True)
class GroupSettings:
    """What the parameters of one optimizer group have in common.

    Attributes:
        decays: weight decay applies.
        orthogonal: Muon orthogonalizes the update; otherwise it is AdamW's. False for every other optimizer.
        lr_multiplier: learning rate / that of optim.lr.
    """

    decays: bool
    orthogonal: bool = False
    lr_multiplier: float = 1.0


def settings_of(optim: OptimConfig, name: str, ndim: int) -> GroupSettings:
    """Return the optimizer settings of a parameter.

    Matrices decay, vectors do not. Muon orthogonalizes the matrices of blocks and of MTP modules. The factors of all
    patterns of optim.lr_multipliers that match the name multiply.

    Args:
        optim: the optimizer.
        name: of the parameter in the whole model.
        ndim: its number of dimensions.
    """
    is_matrix, factor = ndim >= 2, 1.0
    for pattern, multiplier in optim.lr_multipliers.items():
        if fnmatchcase(name, pattern):
            factor *= multiplier
    orthogonal = is_muon(optim) and is_matrix and re.match(r"(blocks|mtp)\.", name) is not None
    return GroupSettings(is_matrix, orthogonal, factor)


def is_muon(optim: OptimConfig) -> bool:
    """Return whether the optimizer is Muon."""
    return optim.optimizer.get("_target_") == MUON


def group_names(optim: OptimConfig, ndims: Mapping[str, int]) -> dict[GroupSettings, list[str]]:
    """Return the names of each group's parameters: first the groups that decay, each in order of appearance.

    Args:
        optim: the optimizer.
        ndims: parameter -> its number of dimensions, in the model's order.
    """
    groups: dict[GroupSettings, list[str]] = {}
    for name, ndim in ndims.items():
        groups.setdefault(settings_of(optim, name, ndim), []).append(name)
    return dict(sorted(groups.items(), key=lambda group: not group[0].decays))


def parameter_names(m: ModelConfig) -> list[str]:
    """Return the names of all parameters of a model; a tied output head has none."""
    names = ["embedding.weight"]
    n_dense = m.moe.n_dense_layers if m.moe.n_routed_experts else m.n_layers
    for i in range(m.n_layers):
        names += [f"blocks.{i}.{name}" for name in _block(m, is_moe=i >= n_dense)]
    names += [] if m.tie_embeddings else ["head.weight"]
    names += ["head.norm.weight"]
    for i in range(m.n_mtp_layers):
        own = [f"{name}.weight" for name in ("embedding_norm", "hidden_norm", "projection", "head_norm")]
        block = [f"block.{name}" for name in _block(m, is_moe=m.moe.n_routed_experts > 0)]
        names += [f"mtp.{i}.{name}" for name in (*own, *block)]
    return names


def _block(m: ModelConfig, *, is_moe: bool) -> Iterator[str]:
    """Yield the names of the parameters of one block."""
    yield from ("attention_norm.weight", "feed_forward_norm.weight")
    if m.window and m.n_global_tokens:
        yield "attention.gate"
    if m.attention is AttentionKind.mla:
        q = ("wq_a", "q_norm", "wq_b") if m.q_lora_rank else ("wq",)
        yield from (f"attention.{name}.weight" for name in (*q, "wkv_a", "kv_norm", "wkv_b", "wo"))
    else:
        norms = ("q_norm", "k_norm") if m.qk_norm else ()
        yield from (f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo", *norms))
        yield from (f"attention.{name}.bias" for name in ("wq", "wk", "wv") if m.qkv_bias)
    matrices = ("w_gate", "w_up", "w_down")
    if not is_moe:
        yield from (f"feed_forward.{name}.weight" for name in matrices)
        return
    yield "feed_forward.router.weight"
    if m.moe.domains:
        yield "feed_forward.router.domain_weight"
    yield from (f"feed_forward.experts.{name}" for name in matrices)
    if m.moe.n_shared_experts:
        yield from (f"feed_forward.shared.{name}.weight" for name in matrices)
