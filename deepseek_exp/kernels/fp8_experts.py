"""The routed experts of `experts.py` with products in 8-bit floating numbers; `fp8_grouped.py` says which and how.

Tokens and their gradients are rounded before they are copied to their experts: K times less is read for it, and a copy
is of one byte an element. The rest, and what is kept for the backward pass, is as in `experts.py`.

Suffixes: T tokens, K experts of a token, R = T * K rows sorted by expert, E experts, D d_model, F d_expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_exp.kernels import experts, fp8
from deepseek_exp.kernels.experts import hidden, hidden_backward, rows_of, sum_rows
from deepseek_exp.kernels.fp8_grouped import cast_rows, matrices, product


def routed_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    ends_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    fused: bool,
) -> Tensor:
    """Compute `reference.routed_experts` in 8-bit numbers where a gradient is wanted, else as `experts.py` does.

    Its arguments and result; d_model and d_expert are multiples of 16. `fused`: quantise by `fp8_quantize.py` instead
    of by PyTorch.
    """
    tensors = x_TD, weights_TK, order_R, inverse_R, ends_E, w_gate, w_up, w_down
    return _fp8_experts(*tensors, fused)[0] if torch.is_grad_enabled() else experts.routed_experts(*tensors)


def _rounded_rows(x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor, ends_E: Tensor, fused: bool) -> Any:
    """Round the tokens and copy them, with their scales, to their rows."""
    q_TD, scale_T = cast_rows(x_TD, fused)
    q_RD = rows_of(q_TD.view(torch.uint8), inverse_TK, ends_E).view(q_TD.dtype)
    return q_RD, scale_T[order_R // inverse_TK.shape[1]]


@torch.library.custom_op("deepseek_exp::fp8_experts", mutates_args=())
def _fp8_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    ends_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the sums, gate and up of each row, and the magnitudes that the three scales follow from: (3, parts)."""
    inverse_TK, dtype, stacks = inverse_R.view(weights_TK.shape), x_TD.dtype, (w_gate, w_up, w_down)
    parts = torch.stack([fp8.largest([w], fused) for w in stacks])
    rows = _rounded_rows(x_TD, order_R, inverse_TK, ends_E, fused)
    gate_RF, up_RF = (
        product(rows, *matrices(w, p, fused), ends_E, dtype) for w, p in zip(stacks[:2], parts[:2], strict=True)
    )
    del rows
    hidden_RF = hidden(gate_RF, up_RF, weights_TK, order_R, ends_E)
    w = matrices(w_down, parts[2], fused)
    y_RD = product(cast_rows(hidden_RF, fused), *w, ends_E, dtype)
    return sum_rows(y_RD, None, inverse_TK, ends_E), gate_RF, up_RF, parts


@torch.library.custom_op("deepseek_exp::fp8_experts_backward", mutates_args=())
def _fp8_experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    ends_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    parts: Tensor,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of tokens, weights and the three stacks of matrices."""
    inverse_TK, dtype = inverse_R.view(weights_TK.shape), x_TD.dtype

    def back(rows: tuple[Tensor, Tensor], w: Tensor, p: Tensor) -> Tensor:
        return product(rows, *matrices(w, p, fused, transposed=True), ends_E, dtype)

    hidden_RF = back(_rounded_rows(grad_TD, order_R, inverse_TK, ends_E, fused), w_down, parts[2])  # its gradient yet
    dgate_RF, dup_RF, dweights_TK = hidden_backward(hidden_RF, gate_RF, up_RF, weights_TK, order_R, ends_E)
    grad_RD = rows_of(grad_TD, inverse_TK, ends_E)
    dw_down = F.grouped_mm(grad_RD.T, hidden_RF, offs=ends_E)  # (experts, d_model, d_expert)
    del grad_RD, hidden_RF
    x_RD = rows_of(x_TD, inverse_TK, ends_E)
    dw_gate, dw_up = (F.grouped_mm(d.T, x_RD, offs=ends_E) for d in (dgate_RF, dup_RF))  # (experts, d_expert, d_model)
    del x_RD
    by_gate_RD = back(cast_rows(dgate_RF, fused), w_gate, parts[0])
    by_up_RD = back(cast_rows(dup_RF, fused), w_up, parts[1])
    return sum_rows(by_gate_RD, by_up_RD, inverse_TK, ends_E), dweights_TK, dw_gate, dw_up, dw_down


@_fp8_experts.register_fake
def _(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    ends_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_RF = x_TD.new_empty(len(order_R), w_gate.shape[1])
    parts = x_TD.new_empty(3, fp8.n_parts([w_gate], fused), dtype=torch.float32)
    return x_TD.new_empty(x_TD.shape), gate_RF, torch.empty_like(gate_RF), parts


@_fp8_experts_backward.register_fake
def _(grad_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x_TD, weights_TK, *rest[3:6]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.fused = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx: Any, grad_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dx_TD, dweights_TK, *dw = _fp8_experts_backward(grad_TD, *ctx.saved_tensors, ctx.fused)
    return dx_TD, dweights_TK, None, None, None, *dw, None


_fp8_experts.register_autograd(_differentiate, setup_context=_save)
