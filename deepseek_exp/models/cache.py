"""The cache of past tokens in attention during generation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class KVCache:
    """The cache of one block.

    Attributes:
        k: keys, rotated by their positions: (batch, n_kv_heads, max_len, head_dim) for GQA; for MLA the part shared by
            all heads, (batch, 1, max_len, qk_rope_head_dim).
        v: values: (batch, n_kv_heads, max_len, head_dim) for GQA; for MLA the latent that keys and values are computed
            from, (batch, 1, max_len, kv_lora_rank).
        length: number of tokens stored.
    """

    k: Tensor
    v: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens and return all so far."""
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"cache of {self.k.shape[2]} tokens is too short for {end}")
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]  # (batch, n_kv_heads, keys, ...)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes per token of one sequence."""
        return sum(t[0, :, 0].numel() * t.element_size() for t in (self.k, self.v))
