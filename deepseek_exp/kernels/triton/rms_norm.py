"""RMSNorm in one pass each way, optionally fused with the residual addition before it.

    s = x + y,  r = 1 / sqrt(mean(s^2) + eps),  z = s r w
    ds = r (g w - s r mean(g w s r)) + g_s,  dw = sum over rows of g s r

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4; the definition is reference.py's.
Everything between load and store is fp32. One number per row, r, is kept for the backward pass; dw is summed by each
program over its own tiles and then over programs in a fixed order, so results are bit-reproducible.

Bytes moved for R rows of D elements of e bytes (the floor): forward 2 R D e, with the addition 4 R D e; backward
3 R D e, with the addition 4 R D e. Measured, forward and backward, 16384 rows of 4096 in bf16 on an H200: 0.180 ms, 88%
of the floor; with the addition 0.276 ms, 92%.

Suffixes: R rows, D columns, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_exp.kernels.operation import operation
from deepseek_exp.kernels.triton.tiles import n_programs, row_tile

# Elements per tile and programs per multiprocessor of the backward pass. Tiles are larger and programs fewer than in
# other kernels, since each program writes its own sum: 0.108 ms for 16384 rows of 4096 on an H200, against 0.137.
BACKWARD_TILE, BACKWARD_PROGRAMS = 8192, 2


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `reference.rms_norm`; same arguments and result, in fp32 and bf16."""
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `reference.add_rms_norm`; same arguments and results, in fp32 and bf16."""
    added, normed, _ = _add_rms_norm(x, y, weight, eps)
    return added, normed


@triton.jit
def _forward(
    x, y, w, added, out, rstd, n_rows, n_cols, eps, ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    cols = tl.arange(0, WIDTH)[None, :]
    at, here = rows * n_cols + cols, (rows < n_rows) & (cols < n_cols)
    s_RD = tl.load(x + at, here, 0.0)
    if ADD:
        s_RD = (s_RD.to(tl.float32) + tl.load(y + at, here, 0.0).to(tl.float32)).to(added.dtype.element_ty)
        tl.store(added + at, s_RD, here)
    s_RD = s_RD.to(tl.float32)
    r_R = tl.rsqrt(tl.sum(s_RD * s_RD, 1, keep_dims=True) / n_cols + eps)
    w_D = tl.load(w + cols, cols < n_cols, 0.0).to(tl.float32)
    tl.store(out + at, (s_RD * r_R * w_D).to(out.dtype.element_ty), here)
    tl.store(rstd + rows, r_R, rows < n_rows)


@triton.jit
def _backward(
    grad, grad_added, s, w, rstd, ds, dw, n_rows, n_cols, n_tiles,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, WIDTH)[None, :]
    w_D = tl.load(w + cols, cols < n_cols, 0.0).to(tl.float32)
    dw_D = tl.zeros((1, WIDTH), tl.float32)
    for tile in range(program, n_tiles, tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        at, here = rows * n_cols + cols, (rows < n_rows) & (cols < n_cols)
        g_RD = tl.load(grad + at, here, 0.0).to(tl.float32)
        r_R = tl.load(rstd + rows, rows < n_rows, 0.0)
        normed_RD = tl.load(s + at, here, 0.0).to(tl.float32) * r_R
        dw_D += tl.sum(g_RD * normed_RD, 0, keep_dims=True)
        g_RD *= w_D
        ds_RD = r_R * (g_RD - normed_RD * (tl.sum(g_RD * normed_RD, 1, keep_dims=True) / n_cols))
        if ADD:
            ds_RD += tl.load(grad_added + at, here, 0.0).to(tl.float32)
        tl.store(ds + at, ds_RD.to(ds.dtype.element_ty), here)
    tl.store(dw + program * n_cols + cols, dw_D, cols < n_cols)


def _launch_forward(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    n_cols, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    added = torch.empty_like(x) if y is not None else x
    out, rstd_R = torch.empty_like(x), torch.empty(n_rows, dtype=torch.float32, device=x.device)
    tile = row_tile(n_cols)
    _forward[(triton.cdiv(n_rows, tile.rows),)](
        x, y.contiguous() if y is not None else x, weight, added, out, rstd_R, n_rows, n_cols, eps,
        ADD=y is not None, ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return added, out, rstd_R


def _launch_backward(
    grad: Tensor, grad_added: Tensor | None, s: Tensor, weight: Tensor, rstd_R: Tensor
) -> tuple[Tensor, Tensor]:
    grad, n_cols, n_rows = grad.contiguous(), s.shape[-1], len(rstd_R)
    tile = row_tile(n_cols, BACKWARD_TILE)
    n_tiles = triton.cdiv(n_rows, tile.rows)
    programs = min(n_tiles, n_programs(s.device, BACKWARD_PROGRAMS))
    ds, dw_PD = torch.empty_like(s), torch.empty(programs, n_cols, dtype=torch.float32, device=s.device)
    _backward[(programs,)](
        grad, grad_added.contiguous() if grad_added is not None else grad, s, weight, rstd_R, ds, dw_PD,
        n_rows, n_cols, n_tiles, ADD=grad_added is not None, ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return ds, dw_PD.sum(0).to(weight.dtype)


@operation("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed rows and 1 / their root mean square."""
    return _launch_forward(x, None, weight, eps)[1:]


@operation("rms_norm_backward")
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd_R: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_backward(grad, None, x.contiguous(), weight, rstd_R)


@operation("add_rms_norm")
def _add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums, their normed rows and 1 / their root mean square."""
    return _launch_forward(x, y, weight, eps)


@operation("add_rms_norm_backward")
def _add_rms_norm_backward(
    grad: Tensor, grad_added: Tensor, added: Tensor, weight: Tensor, rstd_R: Tensor
) -> tuple[Tensor, Tensor]:
    return _launch_backward(grad, grad_added, added, weight, rstd_R)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@_add_rms_norm.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd_R: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


@_add_rms_norm_backward.register_fake
def _(grad: Tensor, grad_added: Tensor, added: Tensor, weight: Tensor, rstd_R: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(added), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(grad, *ctx.saved_tensors), None


def _save_added(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], inputs[2], output[2])


def _differentiate_added(ctx: Any, grad_added: Tensor, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    ds, dw = _add_rms_norm_backward(grad, grad_added, *ctx.saved_tensors)
    return ds, ds, dw, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)
_add_rms_norm.register_autograd(_differentiate_added, setup_context=_save_added)
