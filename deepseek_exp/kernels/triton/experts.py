"""The routed experts of a layer, from tokens to the weighted sum of their experts, with few saved activations.

    y_t = sum over the rows r of token t of down_e (weight_r silu(gate_e x_t) (up_e x_t)),  e the expert of row r

Sources: Dai et al. 2024, "DeepSeekMoE", section 2; Shazeer 2020, "GLU Variants Improve Transformer", equation 6; the
definition is reference.py's. A weight is applied before `down`, which is linear: the sum over a token's rows is then
unweighted, and the weight's gradient is a sum over the hidden layer of values that the backward pass computes anyway,
so the experts' outputs are not kept. The products are PyTorch's grouped GEMM (see grouped.py), or those of
fp8_experts.py; the rest is Triton, in fp32 between load and store. One program per token copies it to its rows and sums
them again, always in the same order: results are bit-reproducible.

Kept for the backward pass, at e bytes per element: 2 F e per row (gate and up) and the tokens, D e / K per row; rows
are gathered and the hidden layer is computed again. Plain PyTorch keeps (2 D + 4 F) e per row: the gathered row and the
expert's output, gate, silu(gate), up and the hidden layer.

Bytes moved outside the products (the floor), T tokens: forward (2 R + 2 T) D e + 3 R F e, backward
(4 R + 3 T) D e + 6 R F e. Work of the products: 6 R D F operations forward, 12 R D F backward. If experts are on other
ranks, `permute` and `unpermute` run before and after the exchange, (2 R + 2 T) D e in each pass, and the operation gets
each row as a separate token: 11 R D e instead of (6 R + 5 T) D e.
Measured, forward and backward, 16384 tokens, top 6 of 64, 2048 x 1408, bf16 on an H200: 10.6 ms, of which the products
at this machine's 706 TFLOP/s would be 7.2; with PyTorch's operations 14.4 ms, compiled 11.8.

Rows past the last expert's end were dropped by a capacity. No product writes them, so their memory is undefined and may
contain NaN: they are never read.

Suffixes: T tokens, K experts per token, R = T * K rows sorted by expert, E experts, D d_model, F d_expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from deepseek_exp.kernels.triton.tiles import TILE, Tile


def permute(x_TD: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """Compute `reference.permute`; same arguments and result."""
    return _Permute.apply(x_TD, inverse_TK, offsets_E)


def unpermute(y_RD: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """Compute `reference.unpermute`; same arguments and result, summed in fp32 and rounded once."""
    return _Unpermute.apply(y_RD, inverse_TK, offsets_E)


@triton.jit
def _permute(x, inverse, offsets, out, n_cols, n_experts, K: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    end = tl.load(offsets + n_experts - 1)
    x_D = tl.load(x + token * n_cols + cols, cols < n_cols, 0.0)
    for k in tl.static_range(K):
        row = tl.load(inverse + token * K + k).to(tl.int64)
        tl.store(out + row * n_cols + cols, x_D, (row < end) & (cols < n_cols))


@triton.jit
def _unpermute(y, z, inverse, offsets, out, n_cols, n_experts, TWO: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    end = tl.load(offsets + n_experts - 1)
    sum_D = tl.zeros((WIDTH,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse + token * K + k).to(tl.int64)
        at, here = row * n_cols + cols, (row < end) & (cols < n_cols)
        sum_D += tl.load(y + at, here, 0.0).to(tl.float32)
        if TWO:
            sum_D += tl.load(z + at, here, 0.0).to(tl.float32)
    tl.store(out + token * n_cols + cols, sum_D.to(out.dtype.element_ty), cols < n_cols)


@triton.jit
def _swiglu(gate, up, weights, order, offsets, hidden, n_cols, n_experts, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    taken = rows < tl.load(offsets + n_experts - 1)
    w_R = tl.load(weights + tl.load(order + rows, taken, 0), taken, 0.0).to(tl.float32)
    at, here = rows[:, None] * n_cols + cols, taken[:, None] & (cols < n_cols)
    gate_RF = tl.load(gate + at, here, 0.0).to(tl.float32)
    hidden_RF = gate_RF * tl.sigmoid(gate_RF) * tl.load(up + at, here, 0.0).to(tl.float32) * w_R[:, None]
    tl.store(hidden + at, hidden_RF.to(hidden.dtype.element_ty), here)


@triton.jit
def _swiglu_backward(
    hidden, gate, up, weights, order, offsets, dgate, dup, dweights, n_rows, n_cols, n_experts,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Overwrite the hidden gradient in place with the hidden layer. Safe: each thread writes only what it has read."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    taken = rows < tl.load(offsets + n_experts - 1)
    place_R = tl.load(order + rows, rows < n_rows, 0)
    w_R = tl.load(weights + place_R, taken, 0.0).to(tl.float32)
    dw_RF = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, n_cols, WIDTH):
        cols = first + tl.arange(0, WIDTH)[None, :]
        at, here = rows[:, None] * n_cols + cols, taken[:, None] & (cols < n_cols)
        dh_RF = tl.load(hidden + at, here, 0.0).to(tl.float32)
        gate_RF = tl.load(gate + at, here, 0.0).to(tl.float32)
        up_RF = tl.load(up + at, here, 0.0).to(tl.float32)
        s_RF = tl.sigmoid(gate_RF)
        silu_RF = gate_RF * s_RF
        dw_RF += dh_RF * silu_RF * up_RF
        tl.store(hidden + at, (silu_RF * up_RF * w_R[:, None]).to(hidden.dtype.element_ty), here)
        dh_RF *= w_R[:, None]
        tl.store(dup + at, (dh_RF * silu_RF).to(dup.dtype.element_ty), here)
        dgate_RF = dh_RF * up_RF * s_RF * (1 + gate_RF * (1 - s_RF))
        tl.store(dgate + at, dgate_RF.to(dgate.dtype.element_ty), here)
    dw_R = tl.sum(dw_RF, 1).to(dweights.dtype.element_ty)  # (rows of a tile,), 0 for dropped rows
    tl.store(dweights + place_R, dw_R, rows < n_rows)


def _tile(n_columns: int) -> Tile:
    """Choose tiles that split long rows: d_expert is seldom a power of two, and no tile should be half empty."""
    width = min(512, triton.next_power_of_2(n_columns))
    return Tile(TILE // width, width, 8)


def rows_of(x_TD: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """Copy each token, read once, to its rows: (rows, d_model); dropped rows stay undefined."""
    x_TD, (n_tokens, k), n_cols = x_TD.contiguous(), inverse_TK.shape, x_TD.shape[1]
    x_RD, width = x_TD.new_empty(n_tokens * k, n_cols), min(1024, triton.next_power_of_2(n_cols))
    _permute[(n_tokens, triton.cdiv(n_cols, width))](
        x_TD, inverse_TK, offsets_E, x_RD, n_cols, len(offsets_E), K=k, WIDTH=width
    )
    return x_RD


def sum_rows(y_RD: Tensor, z_RD: Tensor | None, inverse_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """Sum each token's rows of y, and of z if given: (tokens, d_model), rounded once."""
    (n_tokens, k), n_cols, two = inverse_TK.shape, y_RD.shape[1], z_RD is not None
    out_TD, width = y_RD.new_empty(n_tokens, n_cols), min(1024, triton.next_power_of_2(n_cols))
    _unpermute[(n_tokens, triton.cdiv(n_cols, width))](
        y_RD, z_RD if two else y_RD, inverse_TK, offsets_E, out_TD, n_cols, len(offsets_E),
        TWO=two, K=k, WIDTH=width,
    )  # fmt: skip
    return out_TD


def hidden(gate_RF: Tensor, up_RF: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor) -> Tensor:
    """Return the hidden layer of each row, times its weight; dropped rows stay undefined."""
    hidden_RF, (n_rows, n_cols) = torch.empty_like(gate_RF), gate_RF.shape
    tile = _tile(n_cols)
    _swiglu[(triton.cdiv(n_rows, tile.rows), triton.cdiv(n_cols, tile.width))](
        gate_RF, up_RF, weights_TK.contiguous(), order_R, offsets_E, hidden_RF, n_cols, len(offsets_E),
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return hidden_RF


def hidden_backward(
    grad_RF: Tensor, gate_RF: Tensor, up_RF: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate, up and weights, and overwrite the hidden gradient with the hidden layer."""
    weights_TK, (n_rows, n_cols) = weights_TK.contiguous(), gate_RF.shape
    dgate_RF, dup_RF, dweights_TK = (torch.empty_like(t) for t in (gate_RF, up_RF, weights_TK))
    tile = _tile(n_cols)
    _swiglu_backward[(triton.cdiv(n_rows, tile.rows),)](
        grad_RF, gate_RF, up_RF, weights_TK, order_R, offsets_E, dgate_RF, dup_RF, dweights_TK,
        n_rows, n_cols, len(offsets_E), ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return dgate_RF, dup_RF, dweights_TK


class _Permute(torch.autograd.Function):
    """Tokens to rows; backward sums each token's rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_TK, offsets_E)
        return rows_of(x_TD, inverse_TK, offsets_E)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> Any:
        return sum_rows(grad_RD.contiguous(), None, *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    """Sum of each token's rows; backward copies its gradient to them."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_TK, offsets_E)
        return sum_rows(y_RD.contiguous(), None, inverse_TK, offsets_E)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        return rows_of(grad_TD, *ctx.saved_tensors), None, None


class Products:
    """The experts' products, in the type of the operands; a subclass may round operands first.

    Operands that are rows are the return values of `tokens` and `rows` of the same class.
    """

    def n_parts(self, w_EMN: Tensor) -> int:
        """Return the number of values in `parts` for a stack of matrices."""
        return 0

    def parts(self, stacks: Sequence[Tensor]) -> Tensor:
        """Return what both passes need to round stacks of matrices identically: (stacks, parts), fp32."""
        return stacks[0].new_empty(len(stacks), 0, dtype=torch.float32)

    def tokens(self, x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> Any:
        """Copy tokens to their rows, as an operand."""
        return rows_of(x_TD, inverse_TK, offsets_E)

    def rows(self, x_RN: Tensor) -> Any:
        """Convert rows to an operand."""
        return x_RN

    def mm(self, rows: Any, w_EMN: Tensor, part: Tensor, offsets_E: Tensor, *, transposed: bool = False) -> Tensor:
        """Multiply each row by its expert's matrix, optionally transposed: (rows, M), or (rows, N)."""
        return F.grouped_mm(rows, w_EMN if transposed else w_EMN.transpose(1, 2), offs=offsets_E)

    def exact(self, rows: Any, x_TD: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> Tensor:
        """Return the unrounded rows that `tokens` converted to an operand."""
        return rows
