"""Root mean square normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_exp.kernels.ops import Ops


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.ops, self.eps = ops, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + y, and its normalisation."""
        return self.ops.add_rms_norm(x, y, self.weight, self.eps)
