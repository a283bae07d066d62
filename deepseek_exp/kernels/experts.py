"""The routed experts of a layer, from tokens to the weighted sum of their experts, with little kept for the backward.

    y_t = sum over the rows r of token t of down_e (weight_r silu(gate_e x_t) (up_e x_t)),  e the expert of row r

Sources: Dai et al. 2024, "DeepSeekMoE", section 2; Shazeer 2020, "GLU Variants Improve Transformer", equation 6; the
definition is reference.py's. A weight is applied before `down`, which is linear: the sum over a token's rows is then
a plain one, and the weight's gradient is a sum over the hidden layer of what the backward pass has at hand anyway, so
the experts' outputs are not kept. The products are PyTorch's grouped GEMM (see grouped.py); the rest is Triton, in
fp32 between load and store. Rows are gathered both ways, never scattered and added, so results repeat bit for bit.

Kept for the backward pass, of e bytes an element: 2 F e a row (gate and up) and the tokens, D e / K a row; rows are
gathered and the hidden layer is computed again. Plain PyTorch keeps (2 D + 4 F) e a row: the gathered row and the
expert's output, gate, silu(gate), up and the hidden layer.

Bytes moved outside of the products (the floor), T tokens: forward (2 R + 2 T) D e + 3 R F e, backward
(4 R + 3 T) D e + 6 R F e. Work of the products: 6 R D F operations forward, 12 R D F backward. Not measured yet.

Rows past the last expert's end were dropped by a capacity. No product writes them, so their memory holds anything, NaN
too: they are never read.

Suffixes: T tokens, K experts of a token, R = T * K rows sorted by expert, E experts, D d_model, F d_expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from deepseek_exp.kernels.tiles import TILE, Tile


def routed_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    ends_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> Tensor:
    """Compute `reference.routed_experts`; same arguments and result, in fp32 and bf16.

    Tokens and matrices are of one type, the weights of a token's experts may be fp32. D and F are multiples of 8.
    """
    return _routed_experts(x_TD, weights_TK, order_R, inverse_R, ends_E, w_gate, w_up, w_down)[0]


@triton.jit
def _gather(x, order, ends, out, n_cols, n_experts, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    taken = rows < tl.load(ends + n_experts - 1)
    tokens = tl.load(order + rows, taken, 0).to(tl.int64) // K
    here = taken & (cols < n_cols)
    tl.store(out + rows * n_cols + cols, tl.load(x + tokens * n_cols + cols, here, 0.0), here)


@triton.jit
def _sum_of_rows(
    y, z, inverse, ends, out, n_tokens, n_cols, n_experts,
    TWO: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    end = tl.load(ends + n_experts - 1)
    here = (tokens < n_tokens) & (cols < n_cols)
    sum_TD = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in tl.static_range(K):
        rows = tl.load(inverse + tokens * K + k, tokens < n_tokens, 0).to(tl.int64)
        at, taken = rows * n_cols + cols, here & (rows < end)
        sum_TD += tl.load(y + at, taken, 0.0).to(tl.float32)
        if TWO:
            sum_TD += tl.load(z + at, taken, 0.0).to(tl.float32)
    tl.store(out + tokens * n_cols + cols, sum_TD.to(out.dtype.element_ty), here)


@triton.jit
def _swiglu(gate, up, weights, order, ends, hidden, n_cols, n_experts, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    taken = rows < tl.load(ends + n_experts - 1)
    w_R = tl.load(weights + tl.load(order + rows, taken, 0), taken, 0.0).to(tl.float32)
    at, here = rows * n_cols + cols, taken & (cols < n_cols)
    gate_RF = tl.load(gate + at, here, 0.0).to(tl.float32)
    hidden_RF = gate_RF * tl.sigmoid(gate_RF) * tl.load(up + at, here, 0.0).to(tl.float32) * w_R
    tl.store(hidden + at, hidden_RF.to(hidden.dtype.element_ty), here)


@triton.jit
def _swiglu_backward(
    hidden, gate, up, weights, order, ends, dgate, dup, dweights, n_rows, n_cols, n_experts,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Put the hidden layer where its gradient was: every element is written by the thread that has just read it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    taken = rows < tl.load(ends + n_experts - 1)
    place_R = tl.load(order + rows, rows < n_rows, 0)
    w_R = tl.load(weights + place_R, taken, 0.0).to(tl.float32)
    dw_RF = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, n_cols, WIDTH):
        cols = first + tl.arange(0, WIDTH)[None, :]
        at, here = rows * n_cols + cols, taken & (cols < n_cols)
        dh_RF = tl.load(hidden + at, here, 0.0).to(tl.float32)
        gate_RF = tl.load(gate + at, here, 0.0).to(tl.float32)
        up_RF = tl.load(up + at, here, 0.0).to(tl.float32)
        s_RF = tl.sigmoid(gate_RF)
        silu_RF = gate_RF * s_RF
        dw_RF += dh_RF * silu_RF * up_RF
        tl.store(hidden + at, (silu_RF * up_RF * w_R).to(hidden.dtype.element_ty), here)
        dh_RF *= w_R
        tl.store(dup + at, (dh_RF * silu_RF).to(dup.dtype.element_ty), here)
        dgate_RF = dh_RF * up_RF * s_RF * (1 + gate_RF * (1 - s_RF))
        tl.store(dgate + at, dgate_RF.to(dgate.dtype.element_ty), here)
    dw_R = tl.sum(dw_RF, 1, keep_dims=True)  # 0 for dropped rows
    tl.store(dweights + place_R, dw_R.to(dweights.dtype.element_ty), rows < n_rows)


def _tile(n_columns: int) -> Tile:
    """Choose tiles that cut long rows: d_model and d_expert are seldom powers of two, and half a tile may be wasted."""
    width = min(512, triton.next_power_of_2(n_columns))
    return Tile(TILE // width, width, 8)


def _gather_rows(x_TD: Tensor, order_R: Tensor, ends_E: Tensor, k: int) -> Tensor:
    """Copy each token to its k rows; dropped rows stay undefined."""
    x_TD, n_rows, n_cols = x_TD.contiguous(), len(order_R), x_TD.shape[1]
    x_RD, tile = x_TD.new_empty(n_rows, n_cols), _tile(n_cols)
    _gather[(triton.cdiv(n_rows, tile.rows), triton.cdiv(n_cols, tile.width))](
        x_TD, order_R, ends_E, x_RD, n_cols, len(ends_E),
        K=k, ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return x_RD


def _sum_rows(y_RD: Tensor, z_RD: Tensor | None, inverse_R: Tensor, ends_E: Tensor, k: int) -> Tensor:
    """Add up each token's k rows of y, and of z where there is one: (tokens, d_model), rounded once."""
    n_tokens, n_cols = len(y_RD) // k, y_RD.shape[1]
    out_TD, tile = y_RD.new_empty(n_tokens, n_cols), _tile(n_cols)
    _sum_of_rows[(triton.cdiv(n_tokens, tile.rows), triton.cdiv(n_cols, tile.width))](
        y_RD, y_RD if z_RD is None else z_RD, inverse_R, ends_E, out_TD, n_tokens, n_cols, len(ends_E),
        TWO=z_RD is not None, K=k, ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return out_TD


def _hidden(gate_RF: Tensor, up_RF: Tensor, weights_TK: Tensor, order_R: Tensor, ends_E: Tensor) -> Tensor:
    hidden_RF, (n_rows, n_cols) = torch.empty_like(gate_RF), gate_RF.shape
    tile = _tile(n_cols)
    _swiglu[(triton.cdiv(n_rows, tile.rows), triton.cdiv(n_cols, tile.width))](
        gate_RF, up_RF, weights_TK.contiguous(), order_R, ends_E, hidden_RF, n_cols, len(ends_E),
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return hidden_RF


def _hidden_backward(
    grad_RF: Tensor, gate_RF: Tensor, up_RF: Tensor, weights_TK: Tensor, order_R: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of gate, up and weights, and write the hidden layer over its own gradient."""
    weights_TK, (n_rows, n_cols) = weights_TK.contiguous(), gate_RF.shape
    dgate_RF, dup_RF, dweights_TK = (torch.empty_like(t) for t in (gate_RF, up_RF, weights_TK))
    tile = _tile(n_cols)
    _swiglu_backward[(triton.cdiv(n_rows, tile.rows),)](
        grad_RF, gate_RF, up_RF, weights_TK, order_R, ends_E, dgate_RF, dup_RF, dweights_TK,
        n_rows, n_cols, len(ends_E), ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return dgate_RF, dup_RF, dweights_TK


@torch.library.custom_op("deepseek_exp::routed_experts", mutates_args=())
def _routed_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    ends_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the sums, and gate and up of each row for the backward pass."""
    k = weights_TK.shape[1]
    x_RD = _gather_rows(x_TD, order_R, ends_E, k)
    gate_RF, up_RF = (F.grouped_mm(x_RD, w.transpose(1, 2), offs=ends_E) for w in (w_gate, w_up))
    del x_RD
    hidden_RF = _hidden(gate_RF, up_RF, weights_TK, order_R, ends_E)
    y_RD = F.grouped_mm(hidden_RF, w_down.transpose(1, 2), offs=ends_E)
    return _sum_rows(y_RD, None, inverse_R, ends_E, k), gate_RF, up_RF


@torch.library.custom_op("deepseek_exp::routed_experts_backward", mutates_args=())
def _routed_experts_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of tokens, weights and the three stacks of matrices."""
    k = weights_TK.shape[1]
    grad_RD = _gather_rows(grad_TD, order_R, ends_E, k)
    hidden_RF = F.grouped_mm(grad_RD, w_down, offs=ends_E)  # its gradient as yet
    dgate_RF, dup_RF, dweights_TK = _hidden_backward(hidden_RF, gate_RF, up_RF, weights_TK, order_R, ends_E)
    dw_down = F.grouped_mm(grad_RD.T, hidden_RF, offs=ends_E)  # (experts, d_model, d_expert)
    del grad_RD, hidden_RF
    x_RD = _gather_rows(x_TD, order_R, ends_E, k)
    dw_gate, dw_up = (F.grouped_mm(d.T, x_RD, offs=ends_E) for d in (dgate_RF, dup_RF))  # (experts, d_expert, d_model)
    del x_RD
    by_gate_RD, by_up_RD = (F.grouped_mm(d, w, offs=ends_E) for d, w in ((dgate_RF, w_gate), (dup_RF, w_up)))
    dx_TD = _sum_rows(by_gate_RD, by_up_RD, inverse_R, ends_E, k)
    return dx_TD, dweights_TK, dw_gate, dw_up, dw_down


@_routed_experts.register_fake
def _(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    ends_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    gate_RF = x_TD.new_empty(len(order_R), w_gate.shape[1])
    return x_TD.new_empty(x_TD.shape), gate_RF, torch.empty_like(gate_RF)


@_routed_experts_backward.register_fake
def _(grad_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x_TD, weights_TK, *rest[3:6]))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx: Any, grad_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dx_TD, dweights_TK, *dw = _routed_experts_backward(grad_TD, *ctx.saved_tensors)
    return dx_TD, dweights_TK, None, None, None, *dw


_routed_experts.register_autograd(_differentiate, setup_context=_save)
