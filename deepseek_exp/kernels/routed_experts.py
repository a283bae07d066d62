"""The operation of the routed experts: `triton/experts.py` with its products in the operands' type or in 8 bits.

What it computes, keeps and moves is described in `triton/experts.py`; its 8-bit products in `fp8_experts.py`.

Suffixes: T tokens, K experts per token, R = T * K rows sorted by expert, E experts, D d_model, F d_expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_exp.kernels.fp8_experts import NarrowProducts
from deepseek_exp.kernels.operation import operation
from deepseek_exp.kernels.triton.experts import Products, hidden, hidden_backward, rows_of, sum_rows

# The products by name, since an operator takes no Python objects.
PRODUCTS = {"wide": Products(), "fp8": NarrowProducts(fused=False), "fp8_fused": NarrowProducts(fused=True)}


def routed_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    offsets_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    products: str = "wide",
) -> Tensor:
    """Compute `reference.routed_experts`; same arguments and result, in fp32 and bf16.

    Tokens and matrices have the same type, the weights of a token's experts may be fp32. D and F are multiples of 8.
    `products`: a key of `PRODUCTS`.
    """
    return _routed_experts(x_TD, weights_TK, order_R, inverse_R, offsets_E, w_gate, w_up, w_down, products)[0]


def routed_experts_in_fp8(*tensors: Tensor, fused: bool) -> Tensor:
    """Compute `reference.routed_experts` in 8 bits if a gradient is needed, else as `routed_experts` does.

    Same arguments and result; d_model and d_expert are multiples of 16. `fused`: quantize with `fp8_quantize.py`
    instead of PyTorch.
    """
    narrow = "fp8_fused" if fused else "fp8"
    return routed_experts(*tensors, products=narrow if torch.is_grad_enabled() else "wide")


@operation("routed_experts")
def _routed_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    offsets_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    products: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sums and, for backward, gate and up of each row and the parts of the three stacks."""
    form, inverse_TK = PRODUCTS[products], inverse_R.view(weights_TK.shape)
    parts = form.parts((w_gate, w_up, w_down))
    rows = form.tokens(x_TD, order_R, inverse_TK, offsets_E)
    gate_RF, up_RF = (form.mm(rows, w, part, offsets_E) for w, part in ((w_gate, parts[0]), (w_up, parts[1])))
    del rows
    hidden_RF = hidden(gate_RF, up_RF, weights_TK, order_R, offsets_E)
    y_RD = form.mm(form.rows(hidden_RF), w_down, parts[2], offsets_E)
    return sum_rows(y_RD, None, inverse_TK, offsets_E), gate_RF, up_RF, parts


@operation("routed_experts_backward")
def _routed_experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    offsets_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    parts: Tensor,
    products: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of tokens, weights and the three stacks of matrices."""
    form, inverse_TK = PRODUCTS[products], inverse_R.view(weights_TK.shape)
    rows = form.tokens(grad_TD, order_R, inverse_TK, offsets_E)
    hidden_RF = form.mm(rows, w_down, parts[2], offsets_E, transposed=True)  # holds its gradient until hidden_backward
    grad_RD = form.exact(rows, grad_TD, inverse_TK, offsets_E)
    del rows
    dgate_RF, dup_RF, dweights_TK = hidden_backward(hidden_RF, gate_RF, up_RF, weights_TK, order_R, offsets_E)
    dw_down = F.grouped_mm(grad_RD.T, hidden_RF, offs=offsets_E)  # (experts, d_model, d_expert)
    del grad_RD, hidden_RF
    x_RD = rows_of(x_TD, inverse_TK, offsets_E)
    dw_gate, dw_up = (
        F.grouped_mm(d.T, x_RD, offs=offsets_E) for d in (dgate_RF, dup_RF)
    )  # (experts, d_expert, d_model)
    del x_RD
    by_gate_RD, by_up_RD = (
        form.mm(form.rows(d), w, part, offsets_E, transposed=True)
        for d, w, part in ((dgate_RF, w_gate, parts[0]), (dup_RF, w_up, parts[1]))
    )
    dx_TD = sum_rows(by_gate_RD, by_up_RD, inverse_TK, offsets_E)
    return dx_TD, dweights_TK, dw_gate, dw_up, dw_down


@_routed_experts.register_fake
def _(x_TD: Tensor, weights_TK: Tensor, order_R: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, w_gate, *_, products = rest
    gate_RF = x_TD.new_empty(len(order_R), w_gate.shape[1])
    parts = x_TD.new_empty(3, PRODUCTS[products].n_parts(w_gate), dtype=torch.float32)
    return x_TD.new_empty(x_TD.shape), gate_RF, torch.empty_like(gate_RF), parts


@_routed_experts_backward.register_fake
def _(grad_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x_TD, weights_TK, *rest[3:6]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.products = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx: Any, grad_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dx_TD, dweights_TK, *dw = _routed_experts_backward(grad_TD, *ctx.saved_tensors, ctx.products)
    return dx_TD, dweights_TK, None, None, None, *dw, None


_routed_experts.register_autograd(_differentiate, setup_context=_save)
