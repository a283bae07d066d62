"""Weight-only quantization for generation: matrices as 8-bit or 4-bit integers."""

from __future__ import annotations

import math

from torch import Tensor, nn

from deepseek_exp.models import Transformer

# Maximum number of adjacent columns that share a scale.
GROUP_SIZE = 128


class WeightOnlyLinear(nn.Module):
    """A linear layer with integer weights, which are dequantized inside the matrix product."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        """Quantize the weight of a linear layer; see `kernels/triton/weight_only.py`."""
        from deepseek_exp.kernels.triton.weight_only import quantize_weight, weight_only_linear

        super().__init__()
        self.bits, self.group_size, self.product = bits, math.gcd(GROUP_SIZE, linear.in_features), weight_only_linear
        q, scale = quantize_weight(linear.weight, bits, self.group_size)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        y = self.product(x, self.q, self.scale, self.bits, self.group_size)
        return y if self.bias is None else y + self.bias


def quantize_matrices(model: Transformer, bits: int) -> int:
    """Replace the blocks' linear layers with quantized ones. For inference only.

    Not quantized: embedding and output tables, routed experts, routers, and MLA's up-projection from the latent, which
    the cached path absorbs into the queries.

    Args:
        model: the model; changed in place.
        bits: 8 or 4.

    Returns:
        The number of bytes saved.
    """
    saved = 0
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "wkv_b":
                linear = WeightOnlyLinear(child, bits)
                saved += child.weight.nbytes - linear.q.nbytes - linear.scale.nbytes
                setattr(parent, name, linear)
    return saved
