"""FP8 linear layers: the products of one input with several matrices, forward and backward.

    y_i = x w_i^T,  dx = sum over i of g_i w_i,  dw_i = g_i^T x,  all three of operands rounded by `quantize_fp8`

x and w are e4m3, the incoming gradients g e5m2: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3.
There is one scale for x, one for all w_i and one for all g_i, so that each of the two gradients is one product, over
the w_i concatenated by rows and the g_i concatenated by columns. The products are PyTorch's (torch._scaled_mm; cuBLAS
on a GPU with compute capability 8.9 or higher), which take the left operand row-major and the right one column-major:
each operand is needed both as it is and transposed, with the summed dimension contiguous. Results have the type of x,
bf16 in bf16 training. Tokens are padded with zeros to a multiple of 16 if they are the summed dimension.

Kept for the backward pass: x, transposed, at one byte per element, and the magnitudes that the scale of the weights is
computed from. The weights' transposed 8-bit copy is made in the backward pass: keeping it would cost one byte per
parameter for every micro-batch in flight, recomputing it costs 3 bytes read and written.

Outside training (no gradient needed) the layers are applied in the type of their weights.

Suffixes: T tokens, D d_in, N all d_out together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_exp.config.limits import FP8_MULTIPLE
from deepseek_exp.kernels import reference

INPUT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
# Whether the tensor cores may accumulate with fewer bits than fp32; gradients are more sensitive to it than results.
FAST_FORWARD, FAST_GRADIENTS = True, False


def linears(x: Tensor, layers: Sequence[nn.Module], *, fused: bool) -> list[Tensor]:
    """Compute `reference.linears` in 8 bits if a gradient is needed, else in the type of the weights.

    Args:
        x: (..., d_in), bf16 (fp32 for tests).
        layers: `nn.Linear`s, with weights of x's type; widths are multiples of 16.
        fused: quantize with `fp8_quantize.py` instead of PyTorch.
    """
    if not torch.is_grad_enabled():
        return reference.linears(x, layers)
    products = _fp8_linears(x.flatten(0, -2), [layer.weight for layer in layers], fused)[0]
    results = [y.unflatten(0, x.shape[:-1]) for y in products]  # (..., d_out)
    return [y if layer.bias is None else y + layer.bias for y, layer in zip(results, layers, strict=True)]


def padded(n: int) -> int:
    """Round up to a size that a product can sum over."""
    return -(-n // FP8_MULTIPLE) * FP8_MULTIPLE


def largest(tensors: Sequence[Tensor], fused: bool) -> Tensor:
    """Return fp32 magnitudes whose maximum is that of the tensors; NaN if one of them contains a NaN."""
    if fused:
        from deepseek_exp.kernels.triton import fp8_quantize

        return fp8_quantize.largest(tensors)
    return torch.stack([x.abs().amax().float() for x in tensors])


def cast(
    tensors: Sequence[Tensor],
    parts: Tensor,
    dtype: torch.dtype,
    dim: int,
    fused: bool,
    *,
    as_is: bool = False,
    transposed: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Round tensors, concatenated along a dimension, to 8 bits.

    Args:
        tensors: matrices (R, C), or one stack of them (S, R, C).
        parts: from `largest`.
        dtype: float8_e4m3fn or float8_e5m2.
        dim: 0 or 1, the dimension to concatenate matrices along.
        fused: use `fp8_quantize.py`.
        as_is: return (..., R, C).
        transposed: return (..., C, R), with R padded to a multiple of 16.

    Returns:
        Both, None if not requested, and the scale, (), fp32.
    """
    first, n = tensors[0], sum(x.shape[dim - 2] for x in tensors)
    n_rows, n_cols = (n, first.shape[-1]) if dim == 0 else (first.shape[-2], n)
    if fused:
        from deepseek_exp.kernels.triton import fp8_quantize

        stack = first.shape[:-2]
        q = first.new_empty(*stack, n_rows, n_cols, dtype=dtype) if as_is else None
        q_T = first.new_empty(*stack, n_cols, padded(n_rows), dtype=dtype) if transposed else None
        return q, q_T, fp8_quantize.cast(tensors, parts, dtype, dim, q, q_T)
    q, scale = reference.quantize_fp8(torch.cat(list(tensors), dim - 2), dtype)
    if not transposed:
        return q, None, scale
    q_T = q.new_zeros(*q.shape[:-2], n_cols, padded(n_rows))
    q_T[..., :n_rows] = q.transpose(-1, -2)
    return q if as_is else None, q_T, scale


def product(a_MK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """Return a b^T of two 8-bit matrices with one scale each."""
    return torch._scaled_mm(a_MK, b_NK.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


@torch.library.custom_op("deepseek_exp::fp8_linears", mutates_args=())
def _fp8_linears(x_TD: Tensor, weights: list[Tensor], fused: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return the products and, for backward, x transposed (as uint8), its scale and the weights' magnitudes."""
    x_TD = x_TD.contiguous()
    q_TD, q_DT, scale = cast([x_TD], largest([x_TD], fused), INPUT, 0, fused, as_is=True, transposed=True)
    parts = largest(weights, fused)
    w_ND, _, w_scale = cast(weights, parts, INPUT, 0, fused, as_is=True)
    each = w_ND.split([len(w) for w in weights])
    products = [product(q_TD, w, scale, w_scale, x_TD.dtype, fast=FAST_FORWARD) for w in each]
    return products, q_DT.view(torch.uint8), scale, parts


@torch.library.custom_op("deepseek_exp::fp8_linears_backward", mutates_args=())
def _fp8_linears_backward(
    grads: list[Tensor], q_DT: Tensor, scale: Tensor, weights: list[Tensor], parts: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, (T, D), and those of all weights concatenated by rows, (N, D)."""
    grads, dtype = [g.contiguous() for g in grads], grads[0].dtype
    g_TN, g_NT, g_scale = cast(grads, largest(grads, fused), GRADIENT, 1, fused, as_is=True, transposed=True)
    dw_ND = product(g_NT, q_DT.view(INPUT), g_scale, scale, dtype, fast=FAST_GRADIENTS)
    _, w_DN, w_scale = cast(weights, parts, INPUT, 0, fused, transposed=True)
    return product(g_TN, w_DN, g_scale, w_scale, dtype, fast=FAST_GRADIENTS), dw_ND


@_fp8_linears.register_fake
def _(x_TD: Tensor, weights: list[Tensor], fused: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    n_tokens, n_cols = x_TD.shape
    products = [x_TD.new_empty(n_tokens, len(w)) for w in weights]
    q_DT = x_TD.new_empty(n_cols, padded(n_tokens), dtype=torch.uint8)
    return products, q_DT, *(x_TD.new_empty(shape, dtype=torch.float32) for shape in ((), n_parts(weights, fused)))


@_fp8_linears_backward.register_fake
def _(
    grads: list[Tensor], q_DT: Tensor, scale: Tensor, weights: list[Tensor], parts: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    g = grads[0]
    return g.new_empty(len(g), len(q_DT)), g.new_empty(sum(len(w) for w in weights), len(q_DT))


def n_parts(tensors: Sequence[Tensor], fused: bool) -> int:
    """Return the number of magnitudes that `largest` returns."""
    if not fused:
        return len(tensors)
    from deepseek_exp.kernels.triton.tiles import n_programs

    return len(tensors) * n_programs(tensors[0].device)


def _save(
    ctx: Any, inputs: tuple[Tensor, list[Tensor], bool], output: tuple[list[Tensor], Tensor, Tensor, Tensor]
) -> None:
    _, weights, ctx.fused = inputs
    ctx.save_for_backward(*output[1:], *weights)


def _differentiate(ctx: Any, grads: list[Tensor], *_: Tensor) -> tuple[Tensor, list[Tensor], None]:
    q_DT, scale, parts, *weights = ctx.saved_tensors
    dx_TD, dw_ND = _fp8_linears_backward(grads, q_DT, scale, weights, parts, ctx.fused)
    return dx_TD, list(dw_ND.split([len(w) for w in weights])), None


_fp8_linears.register_autograd(_differentiate, setup_context=_save)
