"""Products of groups of rows with one matrix each, through PyTorch's grouped GEMM (CUTLASS on a GPU).

Nothing is padded and no group waits for another: the work is that of the rows there are. The group borders stay on the
device, so that the host does not wait for them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute `reference.grouped_mm`; same arguments and result, in fp32, bf16 and fp16.

    Rows and matrices must start at multiples of 16 bytes: widths are multiples of 8 elements.
    """
    return F.grouped_mm(x, weight.transpose(-1, -2), offs=ends)  # (rows, d_out)
