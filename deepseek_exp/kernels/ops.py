"""The set of operations handed to every model part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepseek_exp.config import Kernel, KernelsConfig, Linears
from deepseek_exp.kernels import attention, grouped, reference


@dataclass(frozen=True)
class Ops:
    """One callable per operation; signatures and meaning are those of reference.py."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
    linears: Callable[[Tensor, Sequence[nn.Module]], list[Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    top_k_swiglu: Callable[[Tensor, Tensor, int], Tensor]
    grouped_mm: Callable[[Tensor, Tensor, Tensor], Tensor]
    route: Callable[..., tuple[Tensor, Tensor, Tensor]]
    sort_by_expert: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
    permute: Callable[[Tensor, Tensor, Tensor], Tensor]
    unpermute: Callable[[Tensor, Tensor, Tensor], Tensor]
    routed_experts: Callable[..., Tensor] | None  # None: dispatch, products and sums are separate operations
    local_global_attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor]]


TORCH = Ops(
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    rope=reference.rope,
    linears=reference.linears,
    swiglu=reference.swiglu,
    top_k_swiglu=reference.top_k_swiglu,
    grouped_mm=grouped.grouped_mm,
    route=reference.route,
    sort_by_expert=reference.sort_by_expert,
    permute=reference.permute,
    unpermute=reference.unpermute,
    routed_experts=None,
    local_global_attention=attention.local_global_attention,
    linear_cross_entropy=reference.linear_cross_entropy,
)


def resolve(cfg: KernelsConfig, *, fp8: bool = False) -> Ops:
    """Return the operations that a configuration names; import Triton only if one of its kernels is used.

    Args:
        cfg: the implementation of each operation.
        fp8: compute the blocks' matrix products in 8 bits during training.
    """
    chosen: dict[str, Callable[..., Any]] = {}
    if cfg.rms_norm is Kernel.triton:
        from deepseek_exp.kernels.triton.rms_norm import add_rms_norm, rms_norm

        chosen |= {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}
    if cfg.rope is Kernel.triton:
        from deepseek_exp.kernels.triton.rope import rope

        chosen |= {"rope": rope}
    if cfg.swiglu is Kernel.triton:
        from deepseek_exp.kernels.triton.swiglu import swiglu

        chosen |= {"swiglu": swiglu}
    if cfg.router is Kernel.triton:
        from deepseek_exp.kernels.triton.router import route

        chosen |= {"route": route}
    if cfg.experts is Kernel.triton:
        from deepseek_exp.kernels.routed_experts import routed_experts
        from deepseek_exp.kernels.triton.experts import permute, unpermute
        from deepseek_exp.kernels.triton.sorting import sort_by_expert

        chosen |= {"sort_by_expert": sort_by_expert, "routed_experts": routed_experts}
        chosen |= {"permute": permute, "unpermute": unpermute}
    if cfg.linear_cross_entropy is Kernel.triton:
        chosen |= {"linear_cross_entropy": _fused_cross_entropy}
    if cfg.local_global_attention is Kernel.triton:
        chosen |= {"local_global_attention": _windowed}
    if cfg.linears is Linears.accumulated:
        from deepseek_exp.kernels.linears import linears

        chosen |= {"linears": linears}
    if fp8:
        chosen |= _in_fp8(cfg)
    return dataclasses.replace(TORCH, **chosen)


def _in_fp8(cfg: KernelsConfig) -> dict[str, Callable[..., Any]]:
    from deepseek_exp.kernels import fp8, fp8_grouped

    fused = cfg.fp8_quantize is Kernel.triton
    chosen: dict[str, Callable[..., Any]] = {"linears": functools.partial(fp8.linears, fused=fused)}
    if cfg.fp8_experts:
        chosen["grouped_mm"] = functools.partial(fp8_grouped.grouped_mm, fused=fused)
    if cfg.fp8_experts and cfg.experts is Kernel.triton:
        from deepseek_exp.kernels.routed_experts import routed_experts_in_fp8

        chosen["routed_experts"] = functools.partial(routed_experts_in_fp8, fused=fused)
    return chosen


def _fused_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the loss without all logits, from a whole vocabulary."""
    from deepseek_exp.kernels.triton.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, weight, targets, token_weights=token_weights)


def _windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    scale: float,
    n_memory: int,
    window: int,
    n_global_tokens: int,
    document: Tensor | None = None,
) -> Tensor:
    """Skip keys outside the window; without a window there is nothing to skip, and PyTorch's kernels are faster."""
    if not window:
        return attention.local_global_attention(q, k, v, gate, scale, n_memory, window, n_global_tokens, document)
    from deepseek_exp.kernels.local_global_attention import local_global_attention

    if document is not None:
        raise ValueError("the fused attention kernel sees no documents; use kernels.local_global_attention=torch")
    return local_global_attention(q, k, v, gate, scale, n_memory, window, n_global_tokens)
