"""Products of groups of rows with one matrix each, in 8-bit floating numbers.

    y_r = w_e x_r,  dx_r = w_e^T g_r  in e4m3,  dw_e = sum over its rows of g_r x_r^T  in bf16,  e the expert of row r

Source: that of `fp8.py`. PyTorch's grouped product of 8-bit numbers (torch._scaled_grouped_mm; CUTLASS on GPUs of
compute capability 9.0) takes e4m3 alone, for gradients too, and a scale for each row: so each row has its own, which is
finer than one of the tensor and never mixes rows that an expert has with those past the last end, whose memory holds
anything. All matrices of a stack share one scale. Gradients of the matrices stay in bf16: there the rows of a group are
summed over, and groups of any length do not start at the multiples of 16 elements that 8-bit products want.

The tensor cores add up fast, with fewer bits than fp32, for gradients too, unlike in `fp8.py`: measured on an H100,
98,304 rows in 64 groups, 2048 x 1408, a product takes 0.56 ms with fast sums and 1.9 ms without.

Kept for the backward pass: x as it is, for those; the matrices are rounded again, transposed.

A CPU has no grouped product of 8-bit numbers: there each group has a product of its own.

Suffixes: R rows sorted by group, E groups, M d_out, N d_in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_exp.kernels import fp8, grouped, reference
from deepseek_exp.kernels.fp8 import INPUT
from deepseek_exp.kernels.operation import operation

# whether sums may be fast, of results and of gradients alike
FAST = True


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, *, fused: bool) -> Tensor:
    """Compute `reference.grouped_mm` in 8-bit numbers where a gradient is wanted, else as it is.

    Args:
        x: (rows, d_in), bf16 (fp32 for tests).
        weight: (groups, d_out, d_in), of x's type; widths are multiples of 16.
        ends: (groups,) int32.
        fused: quantise by `fp8_quantize.py` instead of by PyTorch.
    """
    if not torch.is_grad_enabled():
        return grouped.grouped_mm(x, weight, ends)
    return _fp8_grouped(x, weight, ends, fused)[0]


def cast_rows(x_RN: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """Round rows to e4m3, each with a scale of its own."""
    if fused:
        from deepseek_exp.kernels.triton import fp8_quantize

        return fp8_quantize.cast_rows(x_RN, INPUT)
    return reference.quantize_fp8(x_RN, INPUT, by_row=True)


def product(rows: tuple[Tensor, Tensor], q_EMN: Tensor, scale: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply rounded rows (R, N) with the matrix of their group, given as (M, N): (R, M)."""
    q_RN, scale_R = rows
    if q_RN.is_cuda:
        scale_EM = scale.expand(q_EMN.shape[:2]).contiguous()
        return torch._scaled_grouped_mm(
            q_RN, q_EMN.transpose(1, 2), scale_R, scale_EM, offs=ends_E, out_dtype=dtype, use_fast_accum=FAST
        )  # (rows, M)
    y_RM = q_RN.new_zeros(len(q_RN), q_EMN.shape[1], dtype=dtype)
    first, one = 0, scale.new_ones(())
    for end, q_MN in zip(ends_E.tolist(), q_EMN, strict=True):
        y_GM = fp8.product(q_RN[first:end], q_MN, one, scale, torch.float32, fast=FAST)
        y_RM[first:end] = y_GM * scale_R[first:end, None]
        first = end
    return y_RM


def matrices(w_EMN: Tensor, parts: Tensor, fused: bool, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Round a stack of matrices as they are, or transposed; with the scale."""
    q, q_T, scale = fp8.cast([w_EMN], parts, INPUT, 0, fused, as_is=not transposed, transposed=transposed)
    return (q if q_T is None else q_T), scale


@operation("fp8_grouped")
def _fp8_grouped(x_RN: Tensor, w_EMN: Tensor, ends_E: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """Give the products, and the magnitudes that the matrices' scale follows from."""
    w_EMN = w_EMN.contiguous()
    parts = fp8.largest([w_EMN], fused)
    w = matrices(w_EMN, parts, fused)
    return product(cast_rows(x_RN, fused), *w, ends_E, x_RN.dtype), parts


@operation("fp8_grouped_backward")
def _fp8_grouped_backward(
    g_RM: Tensor, x_RN: Tensor, w_EMN: Tensor, ends_E: Tensor, parts: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    g_RM = g_RM.contiguous()
    w = matrices(w_EMN, parts, fused, transposed=True)
    dx_RN = product(cast_rows(g_RM, fused), *w, ends_E, x_RN.dtype)
    return dx_RN, F.grouped_mm(g_RM.T, x_RN, offs=ends_E)  # (groups, M, N)


@_fp8_grouped.register_fake
def _(x_RN: Tensor, w_EMN: Tensor, ends_E: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    return x_RN.new_empty(len(x_RN), w_EMN.shape[1]), _fake_parts(w_EMN, fused)


@_fp8_grouped_backward.register_fake
def _(g_RM: Tensor, x_RN: Tensor, w_EMN: Tensor, ends_E: Tensor, parts: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    return x_RN.new_empty(x_RN.shape), w_EMN.new_empty(w_EMN.shape)


def _fake_parts(w: Tensor, fused: bool) -> Tensor:
    return w.new_empty(fp8.n_parts([w], fused), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.fused = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, None, None]:
    return *_fp8_grouped_backward(grad, *ctx.saved_tensors, ctx.fused), None, None


_fp8_grouped.register_autograd(_differentiate, setup_context=_save)
