"""How rows are split into tiles for the Triton kernels: one place for block sizes and program counts."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

# Elements per tile: 16 for each of 256 threads.
TILE = 4096


class Tile(NamedTuple):
    """Launch constants of a kernel that works on tiles of whole rows.

    Attributes:
        rows: rows per tile.
        width: columns per tile, a power of two, at least the columns of a row.
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
    """Return the number of programs of a kernel that loops over all tiles and keeps sums: `on_each` per multiprocessor.

    On a CPU, where the interpreter runs them sequentially, it is 3, so that tests cover several sums.
    """
    return on_each * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
