"""The operations without gradients that `kernels.py` measures: the optimizer's step, and products with integers.

A step clips to a global norm, updates the fp32 masters of bf16 parameters and rounds them. What it cannot do without is
what `kernels/adamw.py` counts and one more reading of the gradients, for their norm. The products are those of
generation, one row and 16.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_exp.kernels import reference
from deepseek_exp.kernels.triton.adamw import FusedAdamW
from deepseek_exp.kernels.triton.weight_only import quantize_weight, weight_only_linear
from tests.bench.kernel_cases import DEVICE, Call, Function, Inputs, rand, repeats, worst_ratio

CLIP_NORM = 1.0
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
LAYER = [(2048,), (2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (2048,), *[(5632, 2048)] * 2, (2048, 5632)]
LARGE_SHAPES = ((32768, 2048), *LAYER * 5, (2048,))  # 293 million
SMALL_SHAPES = ((40, 30), (7,), (256, 4))


@dataclass
class Step:
    """An optimizer's step with clipping.

    Attributes:
        state_bits: of each moment.
    """

    state_bits: int
    by_bytes: ClassVar[bool] = True
    graphed: ClassVar[bool] = False
    has_memory: ClassVar[bool] = True

    def large(self) -> Inputs:
        return LARGE_SHAPES

    def forms(self, shapes: Inputs) -> dict[str, Callable[[], Call]]:
        """Give for each form what makes a call of it."""
        made = {"ours": lambda: Ours(shapes, self.state_bits).step}
        if self.state_bits == 8:
            return made | {"torchao": lambda: OverMasters(shapes, torchao_adamw).step}
        fused = functools.partial(torch.optim.AdamW, **SETTINGS, fused=True)
        return made | {"PyTorch fused": lambda: OverMasters(shapes, fused).step}

    def floor(self, shapes: Inputs) -> tuple[float, float]:
        bytes_of_one = 28 + 2 if self.state_bits == 32 else 16 + 1 / 16 + 2
        return bytes_of_one * sum(torch.Size(shape).numel() for shape in shapes), 0.0

    def check(self) -> tuple[float | None, bool]:
        """Do what Case.check does; moments of 8 bits have no error here: what they round is tested by itself."""
        shapes, steps = LARGE_SHAPES if DEVICE.type == "cuda" else SMALL_SHAPES, 3
        same = repeats(lambda: masters_after(steps, Ours(shapes, self.state_bits)))
        if self.state_bits == 8:
            return None, same
        make = functools.partial(torch.optim.AdamW, **SETTINGS)
        exact = masters_after(steps, OverMasters(SMALL_SHAPES, make, torch.float64))
        plain = masters_after(steps, OverMasters(SMALL_SHAPES, make))
        return worst_ratio(exact, plain, masters_after(steps, Ours(SMALL_SHAPES, 32))), same


def problem(shapes: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Give parameters and their gradients, the same ones each time."""
    torch.manual_seed(0)
    return [rand(*shape) for shape in shapes], [rand(*shape) for shape in shapes]


class Ours:
    """FusedAdamW with its gradients in place."""

    def __init__(self, shapes: Inputs, state_bits: int) -> None:
        params, gradients = problem(shapes)
        self.optimizer = FusedAdamW([p.requires_grad_() for p in params], **SETTINGS, state_bits=state_bits)
        self.masters = self.optimizer.masters
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient

    def step(self) -> None:
        self.optimizer.clip(CLIP_NORM)
        self.optimizer.step()


class OverMasters:
    """What optim.MasterWeights does, with PyTorch's fastest means: widen the gradients, clip, step, round."""

    def __init__(self, shapes: Inputs, make: Function, dtype: torch.dtype = torch.float32) -> None:
        self.params, self.gradients = problem(shapes)
        self.masters = [p.to(dtype).clone() for p in self.params]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.optimizer = make(self.masters)

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_([master.grad for master in self.masters], self.gradients)
        nn.utils.clip_grad_norm_(self.masters, CLIP_NORM)
        self.optimizer.step()
        torch._foreach_copy_(self.params, self.masters)


def torchao_adamw(params: Sequence[Tensor]) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, **SETTINGS)


def masters_after(steps: int, trained: Ours | OverMasters) -> list[Tensor]:
    gc.collect()  # optimizers of before are held by cycles
    for _ in range(steps):
        trained.step()
    return [m.detach() for m in trained.masters]


@dataclass
class Product:
    """A matrix product with weights of few bits.

    Attributes:
        bits: of a weight.
        n_rows: of x.
    """

    bits: int
    n_rows: int
    by_bytes: ClassVar[bool] = False
    graphed: ClassVar[bool] = True
    has_memory: ClassVar[bool] = False

    def make(self, d_out: int, d_in: int) -> Inputs:
        """Give x, the weight, and that in integers with its scales."""
        weight = rand(d_out, d_in, scale=d_in**-0.5)
        return rand(self.n_rows, d_in), weight, *quantize_weight(weight, self.bits)

    def large(self) -> Inputs:
        return self.make(4096, 14336)

    def forms(self, inputs: Inputs) -> dict[str, Callable[[], Call]]:
        """Give for each form what makes a call of it; PyTorch's is the bf16 product, compiled it is the definition."""
        x, weight, q, scale = inputs
        definition = torch.compile(reference.weight_only_linear, dynamic=False)
        return {
            "ours": lambda: lambda: weight_only_linear(x, q, scale, self.bits),
            "PyTorch bf16": lambda: lambda: F.linear(x, weight),
            "PyTorch compiled": lambda: lambda: definition(x, q, scale, self.bits),
            "torchao": lambda: torch.no_grad()(functools.partial(torchao_linear(weight, self.bits), x)),
        }

    def floor(self, inputs: Inputs) -> tuple[float, float]:
        return inputs[2].nbytes + inputs[3].nbytes, 0.0

    def check(self) -> tuple[float | None, bool]:
        """Do what Case.check does, against the definition with the same integers."""
        x, _, q, scale = self.make(72, 256)
        exact = reference.weight_only_linear(x.double(), q, scale.double(), self.bits)
        plain = reference.weight_only_linear(x, q, scale, self.bits)
        error = worst_ratio([exact], [plain], [weight_only_linear(x, q, scale, self.bits)])
        if DEVICE.type == "cuda":
            x, _, q, scale = self.large()
        return error, repeats(lambda: [weight_only_linear(x, q, scale, self.bits)])


def torchao_linear(weight: Tensor, bits: int) -> Function:
    """Give torchao's product: 8 bits with a scale a row, 4 bits with one for 128 columns in PyTorch's own kernel."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    four = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d") if bits == 4 else None
    quantize_(linear, four or Int8WeightOnlyConfig())
    return torch.compile(linear, dynamic=False)


CALLS = {
    "adamw": Step(32),
    "adamw, 8 bits": Step(8),
    **{
        f"int{bits} product, {n} row{'s' * (n > 1)}": Product(bits, n)
        for bits in (8, 4)
        for n in (1, 16)
    },
}  # fmt: skip
