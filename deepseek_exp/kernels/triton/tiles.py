"""How rows are cut into tiles for the Triton kernels: one place for block sizes and program counts."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

# elements of a tile: 16 for each of 256 threads
TILE = 4096


class Tile(NamedTuple):
    """Launch constants of a kernel that works on tiles of whole rows.

    Attributes:
        rows: of a tile.
        width: columns of a tile, a power of two, no less than the row has.
        warps: groups of 32 threads that share a tile.
    """

    rows: int
    width: int
    warps: int


def row_tile(n_columns: int, elements: int = TILE) -> Tile:
    """Choose the tile of a kernel that holds whole rows in registers."""
    width = triton.next_power_of_2(n_columns)
    rows = max(1, elements // width)
    return Tile(rows, width, min(16, max(4, rows * width // 512)))


@functools.cache
def n_programs(device: torch.device, on_each: int = 4) -> int:
    """Give how many programs a kernel starts that walks over all tiles and keeps sums: some on each multiprocessor.

    On a CPU, where the interpreter runs them one after the other, 3: so that tests see sums of several.
    """
    return on_each * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
