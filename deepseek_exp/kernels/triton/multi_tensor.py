"""One launch over many tensors: a table of their addresses on the device, and the norm of all of them in one pass.

Each program gets its tensor and tile from a map, which is cached for tensors of the same sizes; the table is rebuilt if
an address changes, and is copied to the device asynchronously. PyTorch cannot see what a kernel does through addresses:
code that writes through them increments version counters itself and is not an operator for torch.compile.

The norm reads each gradient once (the floor), squares and sums in float64, each program over its own tiles and then
over programs in a fixed order, so that results are bit-reproducible. Squares of bf16 numbers have 16 bits and are first
summed in groups of four, in fp32, which holds those of magnitudes between 1e-18 and 1e18.

Suffixes: D elements of a tile, S sums of neighbours, T neighbours.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_exp.kernels.triton.tiles import TILE, n_programs

WARPS = 8
# Number of bf16 values whose squares, exact in fp32, are summed in fp32: float64 for each took 2.1 times the read time.
NEIGHBOURS = 4
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def pointer(slot, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load an address from a table; ALIGNED asserts that it is divisible by 16."""
    address = tl.load(slot).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _squares(x_D, TOGETHER: tl.constexpr):
    """Return float64 sums of the squares of TOGETHER neighbours, which are summed in fp32."""
    if TOGETHER == 1:
        return x_D.to(tl.float64) * x_D.to(tl.float64)
    x_ST = tl.reshape(x_D.to(tl.float32), (x_D.shape[0] // TOGETHER, TOGETHER))
    return tl.sum(x_ST * x_ST, 1).to(tl.float64)


@triton.jit
def _square_sums(
    table, tiles, out, n_tiles, TYPE: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr, TOGETHER: tl.constexpr
):
    program = tl.program_id(0)
    sum_S = tl.zeros((SIZE // TOGETHER,), tl.float64)
    for tile in range(program, n_tiles, tl.num_programs(0)):
        row, start = table + tl.load(tiles + 2 * tile) * 2, tl.load(tiles + 2 * tile + 1).to(tl.int64) * SIZE
        n, x, at = tl.load(row), pointer(row + 1, TYPE, ALIGNED), start + tl.arange(0, SIZE)
        # Only the last tile of a tensor is masked: a mask of unknown length prevents 16-byte loads.
        if start + SIZE <= n:
            sum_S += _squares(tl.load(x + at), TOGETHER)
        else:
            sum_S += _squares(tl.load(x + at, at < n, 0.0), TOGETHER)
    tl.store(out + program, tl.sum(sum_S, 0))


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute `optim.gradient_norm`, with squares always summed in the same order.

    For bf16 the relative error is about 1e-9 for magnitudes between 1e-18 and 1e18, whose squares fp32 holds: smaller
    ones are partly or fully lost, larger ones make the norm infinite.

    Args:
        gradients: fp32 and bf16 tensors of any shapes on one device.

    Returns:
        The norm of all of them together, a float64 scalar.
    """
    by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_type[gradient.dtype].append(gradient.detach().contiguous())
    sums = [_sums_of(tensors) for tensors in by_type.values()]
    return torch.cat(sums).sum().sqrt()


def _sums_of(tensors: list[Tensor]) -> Tensor:
    """Return the sums of squares of tensors of one type, one per program: (programs,)."""
    device = tensors[0].device
    tiles = tile_map(tuple(t.numel() for t in tensors), TILE, device)
    rows = tuple((t.numel(), t.data_ptr()) for t in tensors)
    dtype = tensors[0].dtype
    out = torch.zeros(max(1, min(len(tiles), n_programs(device))), dtype=torch.float64, device=device)
    _square_sums[(len(out),)](
        table_of(rows, device), tiles, out, len(tiles),
        TYPE=TYPES[dtype], ALIGNED=are_aligned(rows), SIZE=TILE, TOGETHER=1 if dtype is torch.float32 else NEIGHBOURS,
        num_warps=WARPS,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=32)
def tile_map(sizes: tuple[int, ...], tile_size: int, device: torch.device) -> Tensor:
    """Split tensors into tiles: the index of the tensor and of the tile within it, (tiles, 2) int32."""
    counts = torch.tensor([triton.cdiv(size, tile_size) for size in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)  # (tiles,)
    first = counts.cumsum(0) - counts
    tile = torch.arange(len(tensor)) - first[tensor]
    return torch.stack([tensor, tile], 1).int().to(device)  # (tiles, 2)


@functools.lru_cache(maxsize=32)
def table_of(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Copy sizes and addresses to the device, int64, asynchronously."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def are_aligned(rows: tuple[tuple[int, ...], ...]) -> bool:
    """Return whether all addresses, which follow the size in each row, allow 16-byte loads."""
    return all(address % 16 == 0 for row in rows for address in row[1:])
