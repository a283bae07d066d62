"""The dense feed-forward network, which is also the form of the shared experts."""

from __future__ import annotations

from torch import Tensor, nn

from deepseek_exp.kernels import Ops


class FeedForward(nn.Module):
    """SwiGLU network: w_down(silu(w_gate x) * w_up x), over all hidden units or those with the largest gates."""

    def __init__(self, d_model: int, d_ff: int, ops: Ops, d_ff_active: int = 0) -> None:
        """Build with uninitialised weights.

        Args:
            d_model: width of the residual stream.
            d_ff: number of hidden units.
            ops: the operations to build from.
            d_ff_active: number of hidden units that a token keeps; 0 means all.
        """
        super().__init__()
        self.ops, self.d_ff_active = ops, d_ff_active
        self.active_fraction: Tensor | None = None  # of hidden units that were not 0 in the last pass outside training
        self.w_gate = nn.Linear(d_model, d_ff, bias=False)
        self.w_up = nn.Linear(d_model, d_ff, bias=False)
        self.w_down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to the same shape."""
        return self.ops.linears(self.hidden(x), (self.w_down,))[0]

    def hidden(self, x: Tensor) -> Tensor:
        """Return the hidden units (..., d_ff)."""
        gate, up = self.ops.linears(x, (self.w_gate, self.w_up))  # (..., d_ff)
        if not self.d_ff_active:
            return self.ops.swiglu(gate, up)
        hidden = self.ops.top_k_swiglu(gate, up, self.d_ff_active)
        if not self.training:
            self.active_fraction = (hidden != 0).float().mean()
        return hidden
