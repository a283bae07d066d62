"""Linear layers with adapters, as two narrow products in addition to the wide one, instead of a sum of weights.

    x (W + s B A)^T = x W^T + s (x A^T) B^T

The right side needs neither the sum of the weights nor its gradient: for T tokens and a frozen W, backward has one wide
product instead of two, and nothing of the size of W is kept for it. In fp8 the second product is still computed, and
discarded. kernels.linears=accumulated computes all of it as one operation, see kernels/low_rank_linears.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepseek_exp.adapt.lora import LowRank

Linears = Callable[[Tensor, Sequence[nn.Module]], list[Tensor]]
LowRankLinears = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], float], list[Tensor]]


class Stored:
    """A linear layer without the transforms of its weight, with what operations read of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.weight, self.bias = layer.parametrizations.weight.original, layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return F.linear(x, self.weight, self.bias)


def with_adapters(linears: Linears, low_rank: LowRankLinears | None = None) -> Linears:
    """Return `linears` for layers of which some have an adapter and no other transform of their weight.

    Args:
        linears: an implementation of `kernels.reference.linears`.
        low_rank: computes layers with adapters as one operation; None: as separate products.
    """

    def adapted_linears(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
        adapters = [_adapter(layer) for layer in layers]
        if low_rank is not None:
            return _together(x, layers, adapters, linears, low_rank)
        stored = [layer if a is None else Stored(layer) for layer, a in zip(layers, adapters, strict=True)]
        results = linears(x, stored)  # type: ignore[arg-type]
        return [y if a is None else _added(y, x, a) for y, a in zip(results, adapters, strict=True)]

    return adapted_linears


def _together(
    x: Tensor,
    layers: Sequence[nn.Module],
    adapters: Sequence[LowRank | None],
    linears: Linears,
    low_rank: LowRankLinears,
) -> list[Tensor]:
    """Compute the layers with adapters in one operation, and the others in one."""
    pairs = list(zip(layers, adapters, strict=True))
    stored = [Stored(layer) for layer, a in pairs if a is not None]
    own = [a for _, a in pairs if a is not None]
    others = [layer for layer, a in pairs if a is None]
    without = iter(linears(x, others) if others else [])
    weights, a, b = [s.weight for s in stored], [a.lora_a for a in own], [a.lora_b for a in own]
    products = low_rank(x, weights, a, b, own[0].scale) if own else []
    added = iter([y if s.bias is None else y + s.bias for y, s in zip(products, stored, strict=True)])
    return [next(without if a is None else added) for a in adapters]


def _adapter(layer: nn.Module) -> LowRank | None:
    """Return the adapter of a layer if it is the only transform of its weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    transforms = layer.parametrizations.weight
    return transforms[0] if len(transforms) == 1 and isinstance(transforms[0], LowRank) else None


def _added(y: Tensor, x: Tensor, adapter: LowRank) -> Tensor:
    """Return y + scale * (x A^T) B^T, with the sum inside of the product; in bf16 it is rounded once."""
    narrow = F.linear(x, adapter.lora_a).flatten(0, -2)  # (tokens, rank)
    return torch.addmm(y.flatten(0, -2), narrow, adapter.lora_b.T, alpha=adapter.scale).view_as(y)
