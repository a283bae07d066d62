"""Grouped-query attention with rotary positions and the dynamic attention mask.

Shapes: batch, seq (queries), keys (memory or cache, then the sequence), heads, head_dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek_exp.config import ModelConfig
from deepseek_exp.kernels import Ops


@dataclass
class KVCache:
    """Keys and values of one block for the tokens so far.

    Attributes:
        k: (batch, n_kv_heads, max_len, head_dim), turned by their positions.
        v: (batch, n_kv_heads, max_len, head_dim).
        length: tokens stored.
    """

    k: Tensor
    v: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens and give all so far."""
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"cache of {self.k.shape[2]} tokens is too short for {end}")
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]  # (batch, n_kv_heads, keys, head_dim)


class Attention(nn.Module):
    """Multi-head attention with shared key-value heads, RoPE, and a local window with global tokens.

    The gate that balances window and global tokens exists when there are both (`kernels/reference.py` has the formula).
    """

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.head_dim, self.rope_theta = ops, cfg.head_dim, cfg.rope_theta
        self.window, self.n_global_tokens = cfg.window, cfg.n_global_tokens
        self.wq = nn.Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=False)
        self.wk = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.wv = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.wo = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, bias=False)
        self.gate = nn.Parameter(torch.empty(cfg.n_heads)) if cfg.window and cfg.n_global_tokens else None

    def forward(self, x: Tensor, memory: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Attend.

        Args:
            x: (batch, seq, d_model), normalised.
            memory: (batch, n_memory, d_model), normalised hidden states of the tokens just before x.
            cache: keys and values of the tokens before x; extended in place.

        Returns:
            (batch, seq, d_model).
        """
        batch, seq, _ = x.shape
        context = x if memory is None else torch.cat([memory, x], dim=1)  # (batch, n_memory + seq, d_model)
        n_memory, n_cached = context.shape[1] - seq, cache.length if cache is not None else 0
        cos, sin = rope_table(self.head_dim, self.rope_theta, n_cached + n_memory + seq, x.device)
        q = self.wq(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)  # (batch, heads, seq, head_dim)
        k = self.wk(context).view(batch, n_memory + seq, -1, self.head_dim).transpose(1, 2)
        v = self.wv(context).view(batch, n_memory + seq, -1, self.head_dim).transpose(1, 2)
        q = self.ops.rope(q, cos[n_cached + n_memory :], sin[n_cached + n_memory :])
        k = self.ops.rope(k, cos[n_cached:], sin[n_cached:])  # (batch, n_kv_heads, n_memory + seq, head_dim)
        if cache is not None:
            k, v = cache.append(k, v)  # (batch, n_kv_heads, keys, head_dim)
        visible, is_global = attention_mask(seq, k.shape[2], n_memory, self.window, self.n_global_tokens, x.device)
        out = self.ops.local_global_attention(q, k, v, visible, is_global, self.gate)
        return self.wo(out.transpose(1, 2).reshape(batch, seq, -1))  # (batch, seq, d_model)


@functools.lru_cache(maxsize=64)
def rope_table(head_dim: int, theta: float, n_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i / head_dim).

    Kept outside the module in fp32, so that casting a model to bf16 cannot round the angles.

    Returns:
        cos and sin, each (n_positions, head_dim / 2), fp32.
    """
    with torch.inference_mode(False):
        exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
        position = torch.arange(n_positions, device=device, dtype=torch.float64)
        angle = position[:, None] * theta**-exponent
        return angle.cos().float(), angle.sin().float()


@functools.lru_cache(maxsize=64)
def attention_mask(
    n_queries: int, n_keys: int, n_memory: int, window: int, n_global_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Say which keys each query sees: those within the window and the sequence's first tokens, none ahead of it.

    Args:
        n_queries: queries; they are the last positions of the keys.
        n_keys: keys, the memory first.
        n_memory: how many of the keys belong to the segment before; global tokens are counted after them.
        window: keys that a query sees locally, its own included; 0: all before it.
        n_global_tokens: global keys.
        device: where the masks are made.

    Returns:
        visible (n_queries, n_keys) and is_global (n_keys,), both bool.
    """
    with torch.inference_mode(False):
        j = torch.arange(n_keys, device=device)
        i = j[n_keys - n_queries :, None]
        is_global = (j >= n_memory) & (j < n_memory + n_global_tokens)
        local = i - j < window if window else torch.ones_like(i - j, dtype=torch.bool)
        return (j <= i) & (local | is_global), is_global
