"""Several linear layers of one input, whose gradient is added up inside of the products, and over ranks behind them.

    y_i = x w_i^T,  dx = sum over i of g_i w_i,  dw_i = g_i^T x

Autograd makes one product for each part of dx, rounds it, and adds the parts afterwards. Here every product but the
first adds to what is there already, before it rounds (cuBLAS, beta = 1): for n layers and T tokens of width D that
saves 2 (n - 1) of the 3 (n - 1) T D e bytes that the sums move, and their launches. Everything else is PyTorch's.

Measured on an H200 in compiled steps of 16384 tokens, 22 layers of width 2048: the sums that autograd makes took 2.3 ms
of 210. What a step gains by this alone was not measured.

Where tensor parallelism shares the layers' outputs out, dx is a part on each rank and the parts are summed. No dw_i
needs it, so that the sum is on its way while they are computed. Of a layer whose inputs are shared out each rank has a
part of y instead, summed in place. Neither makes a copy: what is written over was made here and nobody else has it.
What the first hides was not measured.

Suffixes: T tokens, D d_in, N d_out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group

from deepseek_exp.kernels import reference


def linears(x: Tensor, layers: Sequence[nn.Module], group: str = "") -> list[Tensor]:
    """Compute `reference.linears`; same arguments and results. A bias is added after the product has been rounded.

    Args:
        x: (..., d_in).
        layers: linear ones.
        group: name of the process group over whose ranks the gradient of x is summed; empty: it is whole.
    """
    if not torch.is_grad_enabled() or (len(layers) == 1 and not group):
        return reference.linears(x, layers)
    products = _linears(x.flatten(0, -2), [layer.weight for layer in layers], group)
    results = [y.unflatten(0, x.shape[:-1]) for y in products]  # (..., d_out)
    return [y if layer.bias is None else y + layer.bias for y, layer in zip(results, layers, strict=True)]


def summed_linear(x: Tensor, weight: Tensor, group: str) -> Tensor:
    """Compute x w^T where each rank has some of the columns of both: the sum of the ranks' products.

    Args:
        x: (..., d_in), these columns.
        weight: (d_out, d_in), these columns.
        group: name of the process group.

    Returns:
        (..., d_out), the same on all ranks.
    """
    return _summed_linear(x.flatten(0, -2), weight, group).unflatten(0, x.shape[:-1])


@torch.library.custom_op("deepseek_exp::linears", mutates_args=())
def _linears(x_TD: Tensor, weights: list[Tensor], group: str) -> list[Tensor]:
    return [x_TD @ w_ND.T for w_ND in weights]


@torch.library.custom_op("deepseek_exp::linears_backward", mutates_args=())
def _linears_backward(
    grads: list[Tensor], x_TD: Tensor, weights: list[Tensor], group: str
) -> tuple[Tensor, list[Tensor]]:
    """Give the gradients of x and of the weights."""
    dx_TD = grads[0] @ weights[0]
    for g_TN, w_ND in zip(grads[1:], weights[1:], strict=True):
        torch.addmm(dx_TD, g_TN, w_ND, out=dx_TD)
    summed = dist.all_reduce(dx_TD, group=_resolve_process_group(group), async_op=True) if group else None
    dweights = [g_TN.T @ x_TD for g_TN in grads]
    if summed is not None:
        summed.wait()
    return dx_TD, dweights


@torch.library.custom_op("deepseek_exp::summed_linear", mutates_args=())
def _summed_linear(x_TD: Tensor, w_ND: Tensor, group: str) -> Tensor:
    y_TN = x_TD @ w_ND.T
    dist.all_reduce(y_TN, group=_resolve_process_group(group))
    return y_TN


@_linears.register_fake
def _(x_TD: Tensor, weights: list[Tensor], group: str) -> list[Tensor]:
    return [x_TD.new_empty(len(x_TD), len(w)) for w in weights]


@_linears_backward.register_fake
def _(grads: list[Tensor], x_TD: Tensor, weights: list[Tensor], group: str) -> tuple[Tensor, list[Tensor]]:
    return x_TD.new_empty(x_TD.shape), [torch.empty_like(w) for w in weights]


@_summed_linear.register_fake
def _(x_TD: Tensor, w_ND: Tensor, group: str) -> Tensor:
    return x_TD.new_empty(len(x_TD), len(w_ND))


def _save(ctx: Any, inputs: tuple[Tensor, list[Tensor], str], output: list[Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *inputs[1])
    ctx.group = inputs[2]


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Tensor, list[Tensor], None]:
    x_TD, *weights = ctx.saved_tensors
    return *_linears_backward(grads, x_TD, weights, ctx.group), None


def _save_part(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate_part(ctx: Any, g_TN: Tensor) -> tuple[Tensor, Tensor, None]:
    x_TD, w_ND = ctx.saved_tensors
    return g_TN @ w_ND, g_TN.T @ x_TD, None


_linears.register_autograd(_differentiate, setup_context=_save)
_summed_linear.register_autograd(_differentiate_part, setup_context=_save_part)
