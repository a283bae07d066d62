"""Low-rank adapters: W + alpha / rank * B A is used in place of W, and only A and B are trained.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1. A stack of experts has one
pair of matrices per expert. There is no dropout: it would act on the input of A, which a function of W does not see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek_exp.adapt.transforms import apply
from deepseek_exp.config import LoraConfig, LoraInit
from deepseek_exp.models.moe import MoE
from deepseek_exp.models.transformer import Transformer, generator_for

A, B = "lora_a", "lora_b"


class Adapter(NamedTuple):
    """The two matrices of an adapter.

    Attributes:
        a: (..., rank, d_in).
        b: (..., d_out, rank).
    """

    a: Tensor
    b: Tensor


def low_rank_sum(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return w + scale * b a.

    Args:
        w: (d_out, d_in) or, of stacked experts, (experts, d_out, d_in).
        a: (..., rank, d_in).
        b: (..., d_out, rank).
        scale: alpha / rank.
    """
    return (torch.addmm if w.ndim == 2 else torch.baddbmm)(w, b, a, alpha=scale)


class LowRank(nn.Module):
    """The transform of a weight with an adapter."""

    def __init__(self, adapter: Adapter, scale: float) -> None:
        super().__init__()
        self.lora_a, self.lora_b, self.scale = nn.Parameter(adapter.a), nn.Parameter(adapter.b), scale

    def forward(self, w: Tensor) -> Tensor:
        """Return the weight that is used in place of w, (..., d_out, d_in)."""
        return low_rank_sum(w, self.lora_a, self.lora_b, self.scale)


def attach(model: Transformer, adapters: Mapping[str, Adapter], scale: float) -> None:
    """Freeze a model and give some of its weights an adapter, which are then all that is trained.

    The biases that balance a router's load are frozen too, so that the adapters are all that changes.

    Args:
        model: changed in place.
        adapters: parameter name -> its adapter, of the weight's type and on its device.
        scale: alpha / rank.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, MoE):
            module.updates_bias = False
    apply(model, {name: LowRank(adapter, scale) for name, adapter in adapters.items()})


def initial_adapters(shapes: Mapping[str, Sequence[int]], lora: LoraConfig, seed: int) -> dict[str, Adapter]:
    """Draw the adapters of matrices with these names and shapes; see `initial`."""
    return {name: initial(name, shape, lora, seed) for name, shape in shapes.items()}


def initial(name: str, shape: Sequence[int], lora: LoraConfig, seed: int) -> Adapter:
    """Draw A from the weight's name and the seed only, and set B to 0, so that every layout starts equal.

    kaiming is how `torch.nn.Linear` starts; Hu et al. 2021, section 4.1, draw A from a normal distribution. Standard
    deviation and bounds are those of the peft library.

    Args:
        name: of the weight.
        shape: of the whole weight, (..., d_out, d_in).
        lora: rank and distribution.
        seed: of the experiment.

    Returns:
        The whole matrices in fp32, on the CPU.
    """
    *stack, d_out, d_in = shape
    a = torch.empty(*stack, lora.rank, d_in)
    draws = generator_for(seed, f"{name}.{A}")
    if lora.init is LoraInit.kaiming:
        a.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=draws)
    else:
        a.normal_(0, 1 / lora.rank, generator=draws)
    return Adapter(a, torch.zeros(*stack, d_out, lora.rank))
