"""Products of groups of rows with one matrix per group, by PyTorch's grouped GEMM (CUTLASS on a GPU, for bf16).

Nothing is padded and groups do not wait for each other: the work is proportional to the number of rows. In bf16 the
group offsets stay on the device, so that the host does not synchronise.

PyTorch 2.13 infers the result shapes of its grouped GEMM for bf16 only, although it also computes fp32 and fp16: these
would fail on the meta device and under torch.compile. They go through our own operators, which declare their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_exp.kernels.operation import operation


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Compute `reference.grouped_mm`; same arguments and result, in fp32, bf16 and fp16.

    Rows and matrices must start at multiples of 16 bytes: widths are multiples of 8 elements.
    """
    matrices = weight.transpose(-1, -2)  # (groups, d_in, d_out)
    return F.grouped_mm(x, matrices, offs=offsets) if x.dtype is torch.bfloat16 else _product(x, matrices, offsets)


@torch.no_grad()
def empty_groups_are_zero(device: torch.device) -> bool:
    """Return whether PyTorch sets the outer product of a group without rows to 0 on this device.

    On GPUs of compute capability 10 it has left the memory uninitialised (pytorch/pytorch#172439); the result would be
    the weight gradient of an expert without tokens. The memory for the result is filled with NaN beforehand.
    """
    offsets = torch.tensor([0, 16, 16, 32, 32], dtype=torch.int32, device=device)
    rows = torch.ones(32, 64, dtype=torch.bfloat16, device=device)
    used = torch.full((len(offsets), 64, 64), torch.nan, dtype=torch.bfloat16, device=device)
    del used
    products = F.grouped_mm(rows.T, rows, offs=offsets)  # (groups, 64, 64)
    empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0
    return not products[empty].any().item()  # NaN counts as true


@operation("grouped_product")
def _product(x: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """Multiply each group of the rows x by its matrix (d_in, d_out): (rows, d_out)."""
    return F.grouped_mm(x, matrices, offs=offs)


@operation("grouped_outer_product")
def _outer_product(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    """Sum the outer products of each group's rows (rows, d_in) and (rows, d_out): (groups, d_in, d_out)."""
    return F.grouped_mm(x.T, y, offs=offs)


@_product.register_fake
def _(x: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[2])


@_outer_product.register_fake
def _(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(offs.shape[0], x.shape[1], y.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, matrices, offs = ctx.saved_tensors
    grad = grad.contiguous()
    return _product(grad, matrices.transpose(-1, -2), offs), _outer_product(x, grad, offs), None


_product.register_autograd(_backward, setup_context=_save)
