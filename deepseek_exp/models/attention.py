"""Grouped-query attention with rotary positions and the dynamic attention mask.

Shapes: batch, seq (queries), keys (memory or cache, then the sequence), heads, head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_exp.config import ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.cache import KVCache
from deepseek_exp.models.norm import RMSNorm
from deepseek_exp.models.rope import rope_table, rotate_documents


class Attention(nn.Module):
    """Multi-head attention with shared key-value heads, RoPE, and a local window with global tokens.

    The gate that balances window and global tokens exists only if both do (formula in `kernels/reference.py`).
    Optional, by configuration: biases of queries, keys and values; RMSNorm over each head of queries and keys before
    RoPE.
    """

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.cfg, self.ops, self.head_dim = cfg, ops, cfg.head_dim
        self.wq = nn.Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.wk = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.wv = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.wo = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, ops) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps, ops) if cfg.qk_norm else None
        self.gate = new_gate(cfg)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        cache: KVCache | None = None,
        document: Tensor | None = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            x: (batch, seq, d_model), normalised.
            memory: (batch, n_memory, d_model), normalised hidden states of the tokens just before x.
            cache: keys and values of the tokens before x; extended in place.
            document: (batch, seq), the document of each token, if several share a row, without memory and cache:
                attention and positions are then within documents. None if a row is one document.

        Returns:
            (batch, seq, d_model).
        """
        batch, seq, _ = x.shape
        context = x if memory is None else torch.cat([memory, x], dim=1)  # (batch, n_memory + seq, d_model)
        n_memory, n_cached = context.shape[1] - seq, cache.length if cache is not None else 0
        cos, sin = rope_table(self.cfg, self.head_dim, n_cached + n_memory + seq, x.device)
        if memory is None:
            q, k, v = self.ops.linears(x, (self.wq, self.wk, self.wv))
        else:
            q, k, v = *self.ops.linears(x, (self.wq,)), *self.ops.linears(context, (self.wk, self.wv))
        q = q.view(batch, seq, -1, self.head_dim).transpose(1, 2)  # (batch, heads, seq, head_dim)
        k = k.view(batch, n_memory + seq, -1, self.head_dim).transpose(1, 2)
        v = v.view(batch, n_memory + seq, -1, self.head_dim).transpose(1, 2)
        q_norm, k_norm = (norm.weight if norm is not None else None for norm in (self.q_norm, self.k_norm))
        if document is None:
            q = self.ops.rope(q, cos[n_cached + n_memory :], sin[n_cached + n_memory :], q_norm, self.cfg.norm_eps)
            k = self.ops.rope(k, cos[n_cached:], sin[n_cached:], k_norm, self.cfg.norm_eps)
        else:
            q = rotate_documents(self.ops, q, cos, sin, document, q_norm, self.cfg.norm_eps)
            k = rotate_documents(self.ops, k, cos, sin, document, k_norm, self.cfg.norm_eps)
        if cache is not None:
            k, v = cache.append(k, v)  # (batch, n_kv_heads, keys, head_dim)
        numbers = self.head_dim**-0.5, n_memory, self.cfg.window, self.cfg.n_global_tokens
        out = self.ops.local_global_attention(q, k, v, self.gate, *numbers, document)  # (batch, heads, seq, head_dim)
        return self.ops.linears(out.transpose(1, 2).reshape(batch, seq, -1), (self.wo,))[0]  # (batch, seq, d_model)

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> KVCache:
        """Return an empty cache for `max_len` tokens, of the type of `like`."""
        shape = (batch, self.cfg.n_kv_heads, max_len, self.head_dim)
        return KVCache(like.new_zeros(shape), like.new_zeros(shape))


def new_gate(cfg: ModelConfig) -> nn.Parameter | None:
    """Return one gate per head if there are both a window and global tokens to balance, else None."""
    return nn.Parameter(torch.empty(cfg.n_heads)) if cfg.window and cfg.n_global_tokens else None
