"""Matrix products with weights kept in 8 or 4 bits, for inference.

    y = x W^T,  W = scale_g q,  scale_g = max |w| / 127 or / 7 over a group g of columns of one row

Source: Dettmers et al. 2022, "LLM.int8()", section 2 (absmax quantization), here of the weights only and with one scale
per group of columns, which confines the effect of a large weight to its group; rounding is to nearest. The definition
is reference.py's. Integers are converted to x's type in registers, exactly; products are summed in fp32 and each
group's sum is scaled in fp32, so that the scaled weight itself is never rounded. There is no backward pass.

Bytes moved for d_out x d_in weights (the floor): d_out d_in (bits / 8 + 4 / group_size); x and y are small in
comparison for few rows. One row is a sum over its own tile of weights; more use tensor cores, where few rows are spread
over more programs by splitting the columns, with the parts summed in a fixed order.
Measured, 4096 x 14336 on an H200, 1 and 16 rows: 8 bits 0.033 and 0.038 ms, 4 bits 0.035 and 0.040 ms; the bf16 product
0.043 and 0.043 ms. The floors are 0.014 and 0.007 ms.

Suffixes: R rows of x, N rows of the weight, G groups of columns, K bytes per group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_exp.kernels.triton.tiles import n_programs

# Bytes of weights that a program of the one-row kernel loads at once from each of its ROWS rows.
SPAN, ROWS = 2048, 4
# Elements per program in the sum over parts.
PART = 512


def quantize_weight(weight: Tensor, bits: int, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """Round a matrix to integers, symmetrically around 0, so that no weight is off by more than half its scale.

    Args:
        weight: (d_out, d_in), any floating type.
        bits: 8 or 4.
        group_size: number of adjacent columns of a row that share a scale; 0 means all.

    Returns:
        The integers, int8, and the scales (d_out, d_in / group_size), fp32; see `reference.dequantize_weight`.

    Raises:
        ValueError: the bits or the group size do not fit.
    """
    d_in = weight.shape[1]
    group = _group(d_in, bits, group_size)
    groups = weight.detach().float().unflatten(1, (d_in // group, group))  # (d_out, groups, columns)
    scale = groups.abs().amax(2) / (127 if bits == 8 else 7)  # (d_out, groups)
    q = (groups / torch.where(scale > 0, scale, 1)[:, :, None]).round().to(torch.int8)
    if bits == 4:
        low, high = q.chunk(2, dim=2)  # (d_out, groups, columns / 2)
        q = high << 4 | low & 15
    return q.flatten(1), scale  # (d_out, d_in bits / 8)


def weight_only_linear(x: Tensor, q: Tensor, scale: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """Compute `reference.weight_only_linear`; same arguments and result, in fp32 and bf16. No gradient.

    Raises:
        ValueError: the bits, the group size or the shapes do not fit.
    """
    d_in = q.shape[1] * 8 // bits
    shape = (q.shape[0], d_in // _group(d_in, bits, group_size))
    if x.shape[-1] != d_in or scale.shape != shape:
        got = f"x {tuple(x.shape)} and scale {tuple(scale.shape)}"
        raise ValueError(f"{got} must be (..., {d_in}) and {shape} for q {tuple(q.shape)} at bits={bits}")
    return _weight_only_linear(x, q, scale, bits)


def _group(d_in: int, bits: int, group_size: int) -> int:
    """Return the number of columns of a group; raise if they cannot be split this way."""
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} must be 4 or 8")
    group = group_size or d_in
    if group < 0 or d_in % group:
        raise ValueError(f"group_size={group_size} must divide the weight's {d_in} columns, or be 0 for all of them")
    if bits == 4 and group % 2:
        raise ValueError(f"group_size={group_size} must give an even number of columns at bits=4, not {group}")
    return group


@triton.jit
def _one_row(
    x, q, scale, out, n_out, n_groups, BITS: tl.constexpr, WIDTH: tl.constexpr,
    N: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * N + tl.arange(0, N).to(tl.int64)
    y_NG = tl.zeros((N, G), tl.float32)
    columns = WIDTH * (8 // BITS)
    for first in range(0, n_groups, G):
        groups = first + tl.arange(0, G)
        here_NG = (rows < n_out)[:, None] & (groups < n_groups)[None, :]
        s_NG = tl.load(scale + rows[:, None] * n_groups + groups[None, :], here_NG, 0.0)
        sum_NG = tl.zeros((N, G), tl.float32)
        for start in range(0, WIDTH, K):
            k = start + tl.arange(0, K)[None, None, :]
            group, here = groups[None, :, None], (groups < n_groups)[None, :, None] & (k < WIDTH)
            # x before q: the layout of q's load is then the one used in the product, and only x moves between threads.
            low_GK = tl.load(x + group * columns + k, here, 0.0).to(tl.float32)
            if BITS == 4:
                high_GK = tl.load(x + group * columns + WIDTH + k, here, 0.0).to(tl.float32)
            at = rows[:, None, None] * n_groups * WIDTH + group * WIDTH + k
            q_NGK = tl.load(q + at, here & (rows < n_out)[:, None, None], 0)
            if BITS == 8:
                sum_NG += tl.sum(q_NGK.to(tl.float32) * low_GK, 2)
            else:
                low_NGK = ((q_NGK << 4) >> 4).to(tl.float32)
                sum_NG += tl.sum(low_NGK * low_GK + (q_NGK >> 4).to(tl.float32) * high_GK, 2)
        y_NG += sum_NG * s_NG
    tl.store(out + rows, tl.sum(y_NG, 1).to(out.dtype.element_ty), rows < n_out)


@triton.jit
def _many_rows(
    x, q, scale, out, n_rows, n_out, n_groups, steps_of_part, BITS: tl.constexpr, WIDTH: tl.constexpr,
    ONE_GROUP: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R).to(tl.int64)
    outs = tl.program_id(1) * N + tl.arange(0, N).to(tl.int64)
    part = tl.program_id(2)
    columns = WIDTH * (8 // BITS)
    steps = (WIDTH + K - 1) // K  # per group
    y_NR = tl.zeros((N, R), tl.float32)
    for step in range(part * steps_of_part, tl.minimum((part + 1) * steps_of_part, n_groups * steps)):
        group, k = step // steps, step % steps * K + tl.arange(0, K)
        at_q = q + (outs[:, None] * n_groups + group) * WIDTH + k[None, :]
        q_NK = tl.load(at_q, (outs < n_out)[:, None] & (k < WIDTH)[None, :], 0)
        at_x, here = x + (rows[None, :] * n_groups + group) * columns + k[:, None], (rows < n_rows)[None, :]
        x_KR = tl.load(at_x, here & (k < WIDTH)[:, None], 0.0)
        if ONE_GROUP:
            sum_NR = y_NR
        else:
            s_N = tl.load(scale + outs * n_groups + group, outs < n_out, 0.0)
            sum_NR = tl.zeros((N, R), tl.float32)
        if BITS == 8:
            sum_NR = tl.dot(q_NK.to(x_KR.dtype), x_KR, sum_NR, input_precision="ieee")
        else:
            sum_NR = tl.dot(((q_NK << 4) >> 4).to(x_KR.dtype), x_KR, sum_NR, input_precision="ieee")
            x_KR = tl.load(at_x + WIDTH, here & (k < WIDTH)[:, None], 0.0)
            sum_NR = tl.dot((q_NK >> 4).to(x_KR.dtype), x_KR, sum_NR, input_precision="ieee")
        if ONE_GROUP:
            y_NR = sum_NR
        else:
            y_NR += sum_NR * s_N[:, None]
    if ONE_GROUP:
        y_NR *= tl.load(scale + outs, outs < n_out, 0.0)[:, None]
    at = (part.to(tl.int64) * n_rows + rows[None, :]) * n_out + outs[:, None]
    tl.store(out + at, y_NR.to(out.dtype.element_ty), (outs < n_out)[:, None] & (rows < n_rows)[None, :])


@triton.jit
def _add_parts(parts, out, n, n_parts, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    sum_ = tl.zeros((SIZE,), tl.float32)
    for part in range(n_parts):
        sum_ += tl.load(parts + part * n + at, at < n, 0.0)
    tl.store(out + at, sum_.to(out.dtype.element_ty), at < n)


@torch.library.custom_op("deepseek_exp::weight_only_linear", mutates_args=())
def _weight_only_linear(x: Tensor, q: Tensor, scale: Tensor, bits: int) -> Tensor:
    if not x.numel():
        return x.new_empty(*x.shape[:-1], len(q))
    rows, q, scale = x.reshape(-1, x.shape[-1]).contiguous(), q.contiguous(), scale.contiguous()  # (rows, d_in)
    launch = _launch_one_row if len(rows) == 1 else _launch_many_rows
    return launch(rows, q, scale, bits).view(*x.shape[:-1], len(q))


@_weight_only_linear.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], q.shape[0])


def _launch_one_row(x: Tensor, q: Tensor, scale: Tensor, bits: int) -> Tensor:
    (n_out, n_groups), width = scale.shape, q.shape[1] // scale.shape[1]
    out = x.new_empty(1, n_out)
    k = min(SPAN, triton.next_power_of_2(width))
    g = min(SPAN // k, triton.next_power_of_2(n_groups))
    _one_row[(triton.cdiv(n_out, ROWS),)](
        x, q, scale, out, n_out, n_groups, BITS=bits, WIDTH=width, N=ROWS, G=g, K=k, num_warps=4
    )
    return out


def _launch_many_rows(x: Tensor, q: Tensor, scale: Tensor, bits: int) -> Tensor:
    (n_out, n_groups), width, n_rows = scale.shape, q.shape[1] // scale.shape[1], len(x)
    r = min(128, max(16, triton.next_power_of_2(n_rows)))
    n = 128 if r == 128 else 64
    k = min(256 // x.element_size(), max(16, triton.next_power_of_2(width)))
    tiles, steps = triton.cdiv(n_rows, r) * triton.cdiv(n_out, n), n_groups * triton.cdiv(width, k)
    # A part has at least 4 steps, so that loads run ahead of products.
    n_parts = max(1, min(n_programs(x.device) // tiles, steps // 4))
    steps_of_part = triton.cdiv(steps, n_parts)
    n_parts = triton.cdiv(steps, steps_of_part)
    out = x.new_empty(n_rows, n_out)
    parts = out if n_parts == 1 else torch.empty(n_parts, n_rows, n_out, dtype=torch.float32, device=x.device)
    _many_rows[(triton.cdiv(n_rows, r), triton.cdiv(n_out, n), n_parts)](
        x, q, scale, parts, n_rows, n_out, n_groups, steps_of_part, BITS=bits, WIDTH=width,
        ONE_GROUP=n_groups == 1, R=r, N=n, K=k, num_warps=8 if r == 128 else 4,
    )  # fmt: skip
    if n_parts > 1:
        _add_parts[(triton.cdiv(out.numel(), PART),)](parts, out, out.numel(), n_parts, SIZE=PART, num_warps=4)
    return out
