"""A decoder as one would write it in plain PyTorch, the peer that has nothing of this project in it.

Sizes are ModelConfig's, so that it has as many parameters as ours: grouped-query attention without window, bias or
norm of the heads; SwiGLU, or experts chosen by a softmax's top k, dropless, without groups or a balance loss, and
shared experts. Everything is PyTorch's own: F.rms_norm, F.scaled_dot_product_attention, F.grouped_mm, F.cross_entropy.

Suffixes of tensors: B sequences, S tokens of one, D d_model, T = B * S, E experts, K experts of a token, R = T * K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_exp.config import AttentionKind, ModelConfig, Score


class Result(NamedTuple):
    """What a step takes from a model; transformers' models give it under the same name."""

    loss: Tensor


class Attention(nn.Module):
    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        self.width = m.head_dim
        self.wq = nn.Linear(m.d_model, m.n_heads * m.head_dim, bias=False)
        self.wk = nn.Linear(m.d_model, m.n_kv_heads * m.head_dim, bias=False)
        self.wv = nn.Linear(m.d_model, m.n_kv_heads * m.head_dim, bias=False)
        self.wo = nn.Linear(m.n_heads * m.head_dim, m.d_model, bias=False)
        self.grouped = m.n_kv_heads != m.n_heads

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = x_BSD.shape
        q, k, v = (
            w(x_BSD).view(batch, seq, -1, self.width).transpose(1, 2)  # (batch, heads, seq, head_dim)
            for w in (self.wq, self.wk, self.wv)
        )
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.wo(out.transpose(1, 2).reshape(batch, seq, -1))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Give (batch, heads, seq, head_dim) turned by the angles of the positions."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(d_model, d_hidden, bias=False)
        self.w_up = nn.Linear(d_model, d_hidden, bias=False)
        self.w_down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Experts(nn.Module):
    """Routed experts through PyTorch's grouped GEMM, and shared ones beside them."""

    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        n, d, f = m.moe.n_routed_experts, m.d_model, m.moe.d_expert
        self.top_k, self.normed, self.scale = m.moe.top_k, m.moe.norm_top_k, m.moe.route_scale
        self.router = nn.Parameter(torch.empty(n, d))
        self.w_gate = nn.Parameter(torch.empty(n, f, d))
        self.w_up = nn.Parameter(torch.empty(n, f, d))
        self.w_down = nn.Parameter(torch.empty(n, d, f))
        self.shared = SwiGLU(d, m.moe.n_shared_experts * f) if m.moe.n_shared_experts else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        scores_TE = F.linear(x_TD.float(), self.router.float()).softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        if self.normed:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        expert_R, order_R = ids_TK.flatten().sort()
        offsets_E = torch.searchsorted(expert_R, torch.arange(len(self.router), device=x_TD.device), right=True).int()
        x_RD = x_TD.index_select(0, order_R // self.top_k)
        gate_RF = F.grouped_mm(x_RD, self.w_gate.transpose(1, 2), offs=offsets_E)
        up_RF = F.grouped_mm(x_RD, self.w_up.transpose(1, 2), offs=offsets_E)
        y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, self.w_down.transpose(1, 2), offs=offsets_E)
        y_TKD = y_RD.index_select(0, order_R.argsort()).unflatten(0, ids_TK.shape)
        y_TD = ((weights_TK * self.scale)[:, None].to(y_TKD.dtype) @ y_TKD).squeeze(1)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)).view_as(x_BSD)


class Block(nn.Module):
    def __init__(self, m: ModelConfig, index: int) -> None:
        super().__init__()
        self.eps = m.norm_eps
        self.attention_norm, self.feed_forward_norm = (nn.Parameter(torch.ones(m.d_model)) for _ in range(2))
        self.attention = Attention(m)
        is_moe = m.moe.n_routed_experts and index >= m.moe.n_dense_layers
        self.feed_forward = Experts(m) if is_moe else SwiGLU(m.d_model, m.d_ff)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = x_BSD.shape[-1:]
        x_BSD = x_BSD + self.attention(F.rms_norm(x_BSD, width, self.attention_norm, self.eps), cos, sin)
        return x_BSD + self.feed_forward(F.rms_norm(x_BSD, width, self.feed_forward_norm, self.eps))


class Decoder(nn.Module):
    """The whole model, bf16, with normal weights of deviation init_std."""

    def __init__(self, m: ModelConfig) -> None:
        """Build it.

        Raises:
            ValueError: the configuration asks for what this model does not have.
        """
        super().__init__()
        others = m.window, m.qkv_bias, m.qk_norm, m.d_ff_active, m.n_mtp_layers, m.memory_len, len(m.moe.domains)
        if m.attention is not AttentionKind.gqa or m.moe.score is not Score.softmax or any(others):
            raise ValueError(
                f"{m.version}: the plain decoder has causal grouped-query attention and softmax routing only"
            )
        self.eps = m.norm_eps
        self.embedding = nn.Embedding(m.vocab_size, m.d_model)
        self.blocks = nn.ModuleList(Block(m, i) for i in range(m.n_layers))
        self.norm = nn.Parameter(torch.ones(m.d_model))
        self.head = nn.Linear(m.d_model, m.vocab_size, bias=False)
        if m.tie_embeddings:
            self.head.weight = self.embedding.weight
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=m.init_std)
        frequency = m.rope_theta ** -(torch.arange(0, m.head_dim, 2) / m.head_dim)
        angle = torch.arange(m.max_seq_len)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.to(torch.bfloat16)

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> Result:
        """Give the mean loss of every token but the first; takes what transformers' models take."""
        x_BSD, seq = self.embedding(input_ids), input_ids.shape[1]
        for block in self.blocks:
            x_BSD = block(x_BSD, self.cos[:seq], self.sin[:seq])
        logits = self.head(F.rms_norm(x_BSD, x_BSD.shape[-1:], self.norm, self.eps))
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # the last token has none; all logits keep the shapes round
        return Result(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()))
