"""The matrices of a model by name, and the patterns that select some of them. Does not import torch."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from deepseek_exp.config.enums import AttentionKind
from deepseek_exp.config.finetune_sections import LoraConfig
from deepseek_exp.config.schema import ModelConfig

Shape = tuple[int, ...]
WEIGHT = ".weight"


def matrix_shapes(m: ModelConfig) -> dict[str, Shape]:
    """Return the shape of each matrix of a model by its parameter name, in the model's order.

    A matrix has shape (d_out, d_in), a stack of experts (n_routed_experts, d_out, d_in). A tied output head is the
    embedding and is not listed.
    """
    table = (m.vocab_size, m.d_model)
    found: dict[str, Shape] = {"embedding.weight": table}
    for i in range(m.n_layers):
        is_moe = m.moe.n_routed_experts > 0 and i >= m.moe.n_dense_layers
        found |= _named(f"blocks.{i}.", _block(m, is_moe=is_moe))
    if not m.tie_embeddings:
        found["head.weight"] = table
    for k in range(m.n_mtp_layers):
        found[f"mtp.{k}.projection.weight"] = (m.d_model, 2 * m.d_model)
        found |= _named(f"mtp.{k}.block.", _block(m, is_moe=m.moe.n_routed_experts > 0))
    return found


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern with the wildcards * ? [...] matches a parameter name; a final `.weight` is ignored."""
    return fnmatch.fnmatchcase(name.removesuffix(WEIGHT), pattern.removesuffix(WEIGHT))


def select(names: Iterable[str], targets: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Return the names that a pattern of `targets` matches and none of `exclude` does, in their order."""
    found = [name for name in names if any(matches(name, pattern) for pattern in targets)]
    return [name for name in found if not any(matches(name, pattern) for pattern in exclude)]


def adapted(m: ModelConfig, lora: LoraConfig) -> dict[str, Shape]:
    """Return the shape of each matrix that has an adapter, by its parameter name; none with rank 0."""
    if not lora.rank:
        return {}
    shapes = matrix_shapes(m)
    return {name: shapes[name] for name in select(shapes, lora.targets, lora.exclude)}


def adapter_size(shapes: Mapping[str, Shape], rank: int) -> int:
    """Return the parameters of the adapters of some matrices: rank * (d_out + d_in) per matrix."""
    return sum(rank * math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes.values())


def _named(prefix: str, matrices: Iterable[tuple[str, Shape]]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in matrices}


def _block(m: ModelConfig, *, is_moe: bool) -> Iterator[tuple[str, Shape]]:
    for name, shape in _mla(m) if m.attention is AttentionKind.mla else _gqa(m):
        yield f"attention.{name}.weight", shape
    if not is_moe:
        yield from _swiglu("feed_forward.", m.d_model, m.d_ff)
        return
    n, d, f = m.moe.n_routed_experts, m.d_model, m.moe.d_expert
    yield "feed_forward.router.weight", (n, d)
    if m.moe.domains:
        yield "feed_forward.router.domain_weight", (len(m.moe.domains), d)
    yield "feed_forward.experts.w_gate", (n, f, d)
    yield "feed_forward.experts.w_up", (n, f, d)
    yield "feed_forward.experts.w_down", (n, d, f)
    if m.moe.n_shared_experts:
        yield from _swiglu("feed_forward.shared.", d, m.moe.n_shared_experts * f)


def _swiglu(prefix: str, d_model: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}w_gate.weight", (width, d_model)
    yield f"{prefix}w_up.weight", (width, d_model)
    yield f"{prefix}w_down.weight", (d_model, width)


def _gqa(m: ModelConfig) -> Iterator[tuple[str, Shape]]:
    d_q, d_kv = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    yield "wq", (d_q, m.d_model)
    yield "wk", (d_kv, m.d_model)
    yield "wv", (d_kv, m.d_model)
    yield "wo", (m.d_model, d_q)


def _mla(m: ModelConfig) -> Iterator[tuple[str, Shape]]:
    d_q = m.n_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)
    if m.q_lora_rank:
        yield "wq_a", (m.q_lora_rank, m.d_model)
        yield "wq_b", (d_q, m.q_lora_rank)
    else:
        yield "wq", (d_q, m.d_model)
    yield "wkv_a", (m.kv_lora_rank + m.qk_rope_head_dim, m.d_model)
    yield "wkv_b", (m.n_heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank)
    yield "wo", (m.d_model, m.n_heads * m.v_head_dim)
