"""The set of operations handed to every model part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deepseek_exp.kernels import attention, grouped, reference


@dataclass(frozen=True)
class Ops:
    """One callable for each operation; signatures and meaning are those of reference.py."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    top_k_swiglu: Callable[[Tensor, Tensor, int], Tensor]
    grouped_mm: Callable[[Tensor, Tensor, Tensor], Tensor]
    local_global_attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, float, int, int, int], Tensor]
    cross_entropy: Callable[[Tensor, Tensor], Tensor]


TORCH = Ops(
    rms_norm=reference.rms_norm,
    rope=reference.rope,
    swiglu=reference.swiglu,
    top_k_swiglu=reference.top_k_swiglu,
    grouped_mm=grouped.grouped_mm,
    local_global_attention=attention.local_global_attention,
    cross_entropy=reference.cross_entropy,
)
