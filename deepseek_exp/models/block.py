"""One transformer block: attention, then a feed-forward network or a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek_exp.config import AttentionKind, ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.attention import Attention, KVCache, RMSNorm
from deepseek_exp.models.mla import LatentAttention
from deepseek_exp.moe import FeedForward, MoE


class Block(nn.Module):
    """One transformer block with normalisation before attention and before the feed-forward half."""

    def __init__(self, cfg: ModelConfig, ops: Ops, index: int, *, recompute: bool = False) -> None:
        """Build with uninitialised weights.

        Args:
            cfg: the model.
            ops: the operations to build from.
            index: which block of the model this is; the first ones may be dense.
            recompute: keep only the block's input for the backward pass and compute the rest again.
        """
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)
        self.attention = (LatentAttention if cfg.attention is AttentionKind.mla else Attention)(cfg, ops)
        self.feed_forward_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)
        is_moe = cfg.moe.n_routed_experts and index >= cfg.moe.n_dense_layers
        self.feed_forward = MoE(cfg, ops) if is_moe else FeedForward(cfg.d_model, cfg.d_ff, ops, cfg.d_ff_active)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, cache: KVCache | None = None, domain: Tensor | None = None
    ) -> Tensor:
        """Transform the residual stream.

        Args:
            x: (batch, seq, d_model).
            memory: (batch, n_memory, d_model), this block's inputs for the tokens just before x, without gradient.
            cache: this block's keys and values for the tokens before x.
            domain: (batch,) int64, the domain of each sequence, -1 where it is not known; None: nowhere.

        Returns:
            (batch, seq, d_model).
        """
        if self.recompute and torch.is_grad_enabled():
            args = (x, memory, cache, domain)
            x, counts = checkpoint(self._compute, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            x, counts = self._compute(x, memory, cache, domain)
        if counts is not None:
            self.feed_forward.record(counts)  # out here, since a recomputed pass must not count again
        return x

    def _compute(
        self, x: Tensor, memory: Tensor | None, cache: KVCache | None, domain: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        normed_memory = None if memory is None else self.attention_norm(memory)
        x, normed = self.feed_forward_norm.after_adding(x, self.attention(self.attention_norm(x), normed_memory, cache))
        if isinstance(self.feed_forward, MoE):
            y, counts = self.feed_forward(normed, domain)
            return x + y, counts
        return x + self.feed_forward(normed), None
