"""What the tests of the Triton kernels share: the comparison with the definition.

The interpreter truncates fp32 to bf16, so these tests are in fp32; tests/bench/kernels.py compares bf16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# fp32 against float64, relative to the largest number of the result: some tens of roundings of 6e-8
BOUND = 2e-6


def outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Any], seed: int = 0) -> list[Tensor]:
    """Give a function's results, then the gradient of each floating input under random gradients of the results."""
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
    copies = {id(t): t.detach().clone().requires_grad_() for t in leaves}
    out = function(*(copies.get(id(t), t) for t in inputs))
    outs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outs]
    torch.autograd.backward(outs, grads)
    return [o.detach() for o in outs] + [copies[id(t)].grad for t in leaves]


_repeated: set[str] = set()


def _name(kernel: Callable[..., Any]) -> str:
    function = getattr(kernel, "func", kernel)
    return f"{function.__module__}.{function.__qualname__}"


def assert_equals_definition(
    kernel: Callable[..., Any], definition: Callable[..., Any], inputs: Sequence[Any], bound: float = BOUND
) -> None:
    """Compare results and every gradient with the definition in float64.

    The first case of each kernel in a process is computed twice: the same inputs give the same bits.
    """
    found, name = outputs_and_gradients(kernel, inputs), _name(kernel)
    again = found if name in _repeated else outputs_and_gradients(kernel, inputs)
    _repeated.add(name)
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    wanted = outputs_and_gradients(definition, wide)
    assert len(found) == len(wanted)
    for i, (a, b, c) in enumerate(zip(found, wanted, again, strict=True)):
        assert a.shape == b.shape and torch.equal(a, c)
        difference = (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
        assert difference < bound, f"result {i}: {difference:.1e}"
