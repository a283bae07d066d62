"""Multi-head latent attention: keys and values computed from one narrow latent, which is all that a cache stores.

Shapes: batch, seq (queries), keys (memory or cache, then the sequence), heads, nope and rope (the parts of a head
without and with positions), latent (kv_lora_rank).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_exp.config import ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.attention import new_gate
from deepseek_exp.models.cache import KVCache
from deepseek_exp.models.norm import RMSNorm
from deepseek_exp.models.rope import rope_table, rotate_documents, softmax_scale


class LatentAttention(nn.Module):
    """Multi-head latent attention.

    latent = norm(W_kv_a x); a head's key is [W_k latent, rope(k)], with k shared by all heads, its value W_v latent;
    its query is [q, rope(q')] from W_q_b norm(W_q_a x). Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.

    With a cache, W_k is applied to the query and W_v to the result instead (section 2.1.2: they are absorbed), so that
    a new token reads the cached latents directly and no key or value of an old token is recomputed.
    """

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.cfg, self.ops = cfg, ops
        self.nope, self.rope, self.v_dim = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        q_width = cfg.n_heads * (self.nope + self.rope)
        if cfg.q_lora_rank:
            self.wq_a = nn.Linear(cfg.d_model, cfg.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(cfg.q_lora_rank, cfg.norm_eps, ops)
            self.wq_b = nn.Linear(cfg.q_lora_rank, q_width, bias=False)
        else:
            self.wq = nn.Linear(cfg.d_model, q_width, bias=False)
        self.wkv_a = nn.Linear(cfg.d_model, cfg.kv_lora_rank + self.rope, bias=False)
        self.kv_norm = RMSNorm(cfg.kv_lora_rank, cfg.norm_eps, ops)
        self.wkv_b = nn.Linear(cfg.kv_lora_rank, cfg.n_heads * (self.nope + self.v_dim), bias=False)
        self.wo = nn.Linear(cfg.n_heads * self.v_dim, cfg.d_model, bias=False)
        self.gate = new_gate(cfg)
        self.scale = softmax_scale(cfg, self.nope + self.rope)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        cache: KVCache | None = None,
        document: Tensor | None = None,
    ) -> Tensor:
        """Compute attention; arguments and result are those of `Attention.forward`."""
        batch, seq, _ = x.shape
        context = x if memory is None else torch.cat([memory, x], dim=1)  # (batch, n_memory + seq, d_model)
        n_memory, n_cached = context.shape[1] - seq, cache.length if cache is not None else 0
        cos, sin = rope_table(self.cfg, self.rope, n_cached + n_memory + seq, x.device)
        q, down = self._down(x, context)
        q = q.view(batch, seq, -1, self.nope + self.rope).transpose(1, 2)  # (batch, heads, seq, nope + rope)
        if document is None:
            q = self.ops.rope(q, cos[n_cached + n_memory :], sin[n_cached + n_memory :], None, 0.0)
        else:
            q = rotate_documents(self.ops, q, cos, sin, document, None, 0.0)
        latent, k_rope = down[:, None].split([self.cfg.kv_lora_rank, self.rope], dim=-1)
        latent = self.kv_norm(latent)  # (batch, 1, n_memory + seq, latent)
        if document is None:
            k_rope = self.ops.rope(k_rope, cos[n_cached:], sin[n_cached:], None, 0.0)  # (batch, 1, keys, rope)
        else:
            k_rope = rotate_documents(self.ops, k_rope, cos, sin, document, None, 0.0)
        if cache is not None:
            k_rope, latent = cache.append(k_rope, latent)  # (batch, 1, keys, ...)
        attend = self._absorbed if n_cached else self._expanded
        out = attend(q, latent, k_rope, n_memory, document)  # (batch, heads, seq, v_head_dim)
        return self.ops.linears(out.transpose(1, 2).reshape(batch, seq, -1), (self.wo,))[0]  # (batch, seq, d_model)

    def new_cache(self, batch: int, max_len: int, like: Tensor) -> KVCache:
        """Return an empty cache for `max_len` tokens: kv_lora_rank + qk_rope_head_dim numbers per token, as `like`."""
        widths = self.rope, self.cfg.kv_lora_rank
        return KVCache(*(like.new_zeros(batch, 1, max_len, width) for width in widths))

    def _down(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (batch, seq, heads * (nope + rope)), latent and rotary keys (batch, keys, latent + rope)."""
        first, linears = self.wq_a if self.cfg.q_lora_rank else self.wq, self.ops.linears
        if context is x:
            q, down = linears(x, (first, self.wkv_a))
        else:
            q, down = *linears(x, (first,)), *linears(context, (self.wkv_a,))
        return linears(self.q_norm(q), (self.wq_b,))[0] if self.cfg.q_lora_rank else q, down

    def _expanded(self, q: Tensor, latent: Tensor, k_rope: Tensor, n_memory: int, document: Tensor | None) -> Tensor:
        kv = self.wkv_b(latent.squeeze(1)).unflatten(-1, (-1, self.nope + self.v_dim)).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.v_dim], dim=-1)  # (batch, heads, keys, ...)
        k = torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)], dim=-1)
        return self._attend(q, k, v, n_memory, document)  # (batch, heads, seq, v_head_dim)

    def _absorbed(self, q: Tensor, latent: Tensor, k_rope: Tensor, n_memory: int, document: Tensor | None) -> Tensor:
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        w = self.wkv_b.weight.view(-1, self.nope + self.v_dim, self.cfg.kv_lora_rank)  # (heads, nope + v, latent)
        w_k, w_v = w.split([self.nope, self.v_dim], dim=1)
        q = torch.cat([q_nope @ w_k, q_rope], dim=-1)  # (batch, heads, seq, latent + rope)
        k = torch.cat([latent, k_rope], dim=-1)  # (batch, 1, keys, latent + rope)
        attended = self._attend(q, k, latent, n_memory, document)
        return attended @ w_v.transpose(1, 2)  # (batch, heads, seq, v_head_dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, n_memory: int, document: Tensor | None) -> Tensor:
        window, n_global = self.cfg.window, self.cfg.n_global_tokens
        return self.ops.local_global_attention(q, k, v, self.gate, self.scale, n_memory, window, n_global, document)
