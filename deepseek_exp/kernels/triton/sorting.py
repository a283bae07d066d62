"""Sort rows by expert: a stable counting sort in two passes with a prefix sum over (expert, block) between them.

Blocks of rows count their experts. The prefix sum of these counts, by expert and then by block, gives the end of each
(expert, block) run in the sorted order; counting back from there within the block places its rows. Only integers are
added and no position is used twice, so the result does not depend on the order of programs. Source: Knuth 1998, "The
Art of Computer Programming", volume 3, section 5.2, algorithm D; its definition here is reference.py's.

Bytes moved for R rows (the floor): 8 R in and 16 R out. In addition, 8 R for the second read and three passes over
4 (n_experts + 1) R / BLOCK. Measured only inside a training step, where it is not among the 40 slowest kernels.

Suffixes: T tokens, K experts per token, R = T * K rows, E experts, C rows per chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_exp.kernels.operation import operation

# Rows per block, one per thread of 8 warps, and the number of rows that each is compared with at a time.
BLOCK, CHUNK = 256, 32


def sort_by_expert(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.sort_by_expert`; same arguments and results."""
    return _sort_by_expert(ids_TK, n_experts)


@triton.jit
def _count(ids, counts, n_rows, n_blocks, n_bins, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id_R = tl.load(ids + rows, rows < n_rows, n_bins).to(tl.int32)  # rows past the end go to a bin that is not stored
    bins = tl.arange(0, WIDTH)
    tl.store(counts + bins * n_blocks + tl.program_id(0), tl.histogram(id_R, WIDTH), bins < n_bins)


@triton.jit
def _place(
    ids, ends_of_blocks, order, inverse, offsets, n_rows, n_blocks, n_experts,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    id_R = tl.load(ids + rows, rows < n_rows, -1).to(tl.int32)
    from_here_R = tl.zeros((BLOCK,), tl.int32)  # rows of the same expert from this one on, in this block
    for first in range(0, BLOCK, CHUNK):
        others = block * BLOCK + first + tl.arange(0, CHUNK)
        id_C = tl.load(ids + others, others < n_rows, -1).to(tl.int32)
        same_CR = (id_C[:, None] == id_R[None, :]) & (others[:, None] >= rows[None, :])
        from_here_R += tl.sum(same_CR.to(tl.int32), 0)
    at_R = tl.load(ends_of_blocks + id_R * n_blocks + block, rows < n_rows, 0) - from_here_R
    tl.store(order + at_R, rows.to(tl.int64), rows < n_rows)
    tl.store(inverse + rows, at_R.to(tl.int64), rows < n_rows)
    if block == 0:
        experts = tl.arange(0, WIDTH)
        end_E = tl.load(ends_of_blocks + experts * n_blocks + n_blocks - 1, experts < n_experts, 0)
        tl.store(offsets + experts, end_E, experts < n_experts)


@operation("sort_by_expert")
def _sort_by_expert(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_R = ids_TK.flatten()
    n_rows, n_bins = len(ids_R), n_experts + 1
    n_blocks, width = max(1, triton.cdiv(n_rows, BLOCK)), max(32, triton.next_power_of_2(n_bins + 1))
    counts = torch.empty(n_bins * n_blocks, dtype=torch.int32, device=ids_R.device)
    _count[(n_blocks,)](ids_R, counts, n_rows, n_blocks, n_bins, BLOCK=BLOCK, WIDTH=width, num_warps=8)
    order_R, inverse_R = ids_R.new_empty(n_rows), ids_R.new_empty(n_rows)
    offsets_E = torch.empty(n_experts, dtype=torch.int32, device=ids_R.device)
    _place[(n_blocks,)](
        ids_R, counts.cumsum(0, dtype=torch.int32), order_R, inverse_R, offsets_E, n_rows, n_blocks, n_experts,
        BLOCK=BLOCK, CHUNK=CHUNK, WIDTH=width, num_warps=8,
    )  # fmt: skip
    return order_R, inverse_R, offsets_E


@_sort_by_expert.register_fake
def _(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    n_rows = ids_TK.numel()
    return ids_TK.new_empty(n_rows), ids_TK.new_empty(n_rows), ids_TK.new_empty(n_experts, dtype=torch.int32)
