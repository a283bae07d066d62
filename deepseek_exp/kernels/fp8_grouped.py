"""FP8 products of groups of rows with one matrix per group.

    y_r = w_e x_r,  dx_r = w_e^T g_r  in e4m3,  dw_e = sum over its rows of g_r x_r^T  in bf16,  e the expert of row r

Source: as in `fp8.py`. PyTorch's grouped FP8 product (torch._scaled_grouped_mm; CUTLASS on GPUs with compute capability
9.0) takes e4m3 only, for gradients too, and one scale per row. Per-row scales are finer than one scale per tensor and
never mix an expert's rows with those past the last end, whose memory is undefined. All matrices of a stack share one
scale. Gradients of the matrices stay in bf16: they sum over the rows of a group, and groups of any length do not start
at the multiples of 16 elements that 8-bit products need.

The tensor cores accumulate fast, with fewer bits than fp32, for gradients too, unlike in `fp8.py`: measured on an H100,
98,304 rows in 64 groups, 2048 x 1408, a product takes 0.56 ms with fast accumulation and 1.9 ms without.

Kept for the backward pass: x, unrounded, for dw; the matrices are rounded again, transposed.

A CPU has no grouped FP8 product: there, each group is a separate product.

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

# Whether to accumulate fast, for results and gradients.
FAST = True


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, *, fused: bool) -> Tensor:
    """Compute `reference.grouped_mm` in 8 bits if a gradient is needed, else in the type of x.

    Args:
        x: (rows, d_in), bf16 (fp32 for tests).
        weight: (groups, d_out, d_in), of x's type; widths are multiples of 16.
        offsets: (groups,) int32.
        fused: quantize with `fp8_quantize.py` instead of PyTorch.
    """
    if not torch.is_grad_enabled():
        return grouped.grouped_mm(x, weight, offsets)
    return _fp8_grouped(x, weight, offsets, fused)[0]


def cast_rows(x_RN: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """Round rows to e4m3, with one scale per row."""
    if fused:
        from deepseek_exp.kernels.triton import fp8_quantize

        return fp8_quantize.cast_rows(x_RN, INPUT)
    return reference.quantize_fp8(x_RN, INPUT, by_row=True)


def product(rows: tuple[Tensor, Tensor], q_EMN: Tensor, scale: Tensor, offsets_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply rounded rows (R, N) by the matrix (M, N) of their group: (R, M)."""
    q_RN, scale_R = rows
    if q_RN.is_cuda:
        scale_EM = scale.expand(q_EMN.shape[:2]).contiguous()
        return torch._scaled_grouped_mm(
            q_RN, q_EMN.transpose(1, 2), scale_R, scale_EM, offs=offsets_E, out_dtype=dtype, use_fast_accum=FAST
        )  # (rows, M)
    y_RM = q_RN.new_zeros(len(q_RN), q_EMN.shape[1], dtype=dtype)
    first, one = 0, scale.new_ones(())
    for end, q_MN in zip(offsets_E.tolist(), q_EMN, strict=True):
        y_GM = fp8.product(q_RN[first:end], q_MN, one, scale, torch.float32, fast=FAST)
        y_RM[first:end] = y_GM * scale_R[first:end, None]
        first = end
    return y_RM


def matrices(w_EMN: Tensor, parts: Tensor, fused: bool, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Round a stack of matrices, optionally transposed, and return it with its scale."""
    q, q_T, scale = fp8.cast([w_EMN], parts, INPUT, 0, fused, as_is=not transposed, transposed=transposed)
    return (q if q_T is None else q_T), scale


@operation("fp8_grouped")
def _fp8_grouped(x_RN: Tensor, w_EMN: Tensor, offsets_E: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """Return the products, and the magnitudes that the matrices' scale is computed from."""
    w_EMN = w_EMN.contiguous()
    parts = fp8.largest([w_EMN], fused)
    w = matrices(w_EMN, parts, fused)
    return product(cast_rows(x_RN, fused), *w, offsets_E, x_RN.dtype), parts


@operation("fp8_grouped_backward")
def _fp8_grouped_backward(
    g_RM: Tensor, x_RN: Tensor, w_EMN: Tensor, offsets_E: Tensor, parts: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    g_RM = g_RM.contiguous()
    w = matrices(w_EMN, parts, fused, transposed=True)
    dx_RN = product(cast_rows(g_RM, fused), *w, offsets_E, x_RN.dtype)
    return dx_RN, F.grouped_mm(g_RM.T, x_RN, offs=offsets_E)  # (groups, M, N)


@_fp8_grouped.register_fake
def _(x_RN: Tensor, w_EMN: Tensor, offsets_E: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    return x_RN.new_empty(len(x_RN), w_EMN.shape[1]), _fake_parts(w_EMN, fused)


@_fp8_grouped_backward.register_fake
def _(
    g_RM: Tensor, x_RN: Tensor, w_EMN: Tensor, offsets_E: Tensor, parts: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
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
