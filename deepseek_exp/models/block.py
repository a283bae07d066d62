"""One transformer block: attention, then a feed-forward network or a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from deepseek_exp.config import ActivationCheckpointing, AttentionKind, ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.attention import Attention
from deepseek_exp.models.cache import KVCache
from deepseek_exp.models.mla import LatentAttention
from deepseek_exp.models.moe import FeedForward, MoE
from deepseek_exp.models.norm import RMSNorm

# Operations whose results selective checkpointing keeps, by name without the overload: the most expensive ones by far.
KEPT = {
    *(f"aten::{name}" for name in ("mm", "addmm", "bmm", "_grouped_mm")),
    "deepseek_exp::grouped_product",
    "deepseek_exp::linears",
    "deepseek_exp::low_rank_linears",
    "deepseek_exp::fp8_linears",
    "deepseek_exp::fp8_grouped",
    "deepseek_exp::local_global_attention",
    "deepseek_exp::routed_experts",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
}


class Block(nn.Module):
    """One transformer block with normalisation before attention and feed-forward network, or also after each."""

    def __init__(
        self,
        cfg: ModelConfig,
        ops: Ops,
        index: int,
        checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
    ) -> None:
        """Build with uninitialised weights.

        Args:
            cfg: the model.
            ops: the operations to build from.
            index: which block of the model this is; the first ones may be dense.
            checkpointing: what is kept for the backward pass in addition to the block's input; the rest is recomputed.
        """
        super().__init__()
        self.checkpointing = checkpointing
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)
        self.attention = (LatentAttention if cfg.attention is AttentionKind.mla else Attention)(cfg, ops)
        self.feed_forward_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)
        sandwich = cfg.sandwich_norm
        self.attention_post_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops) if sandwich else None
        self.feed_forward_post_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops) if sandwich else None
        is_moe = cfg.moe.n_routed_experts and index >= cfg.moe.n_dense_layers
        self.feed_forward = MoE(cfg, ops) if is_moe else FeedForward(cfg.d_model, cfg.d_ff, ops, cfg.d_ff_active)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        cache: KVCache | None = None,
        domain: Tensor | None = None,
        document: Tensor | None = None,
    ) -> Tensor:
        """Transform the residual stream.

        Args:
            x: (batch, seq, d_model).
            memory: (batch, n_memory, d_model), this block's inputs for the tokens just before x, without gradient.
            cache: this block's keys and values for the tokens before x.
            domain: (batch,) int64, the domain of each sequence, -1 if unknown; None if all are unknown.
            document: (batch, seq), as for attention.

        Returns:
            (batch, seq, d_model).
        """
        if self.checkpointing is not ActivationCheckpointing.none and torch.is_grad_enabled():
            args = (x, memory, cache, domain, document)
            selective = self.checkpointing is ActivationCheckpointing.selective
            kept = {"context_fn": _keeping_products} if selective else {}  # the compiler accepts no other function here
            x, counts = checkpoint(self._compute, *args, use_reentrant=False, preserve_rng_state=False, **kept)
        else:
            x, counts = self._compute(x, memory, cache, domain, document)
        if counts is not None:
            self.feed_forward.record(counts)  # outside the checkpoint, since a recomputed pass must not count again
        return x

    def _compute(
        self,
        x: Tensor,
        memory: Tensor | None,
        cache: KVCache | None,
        domain: Tensor | None,
        document: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        normed_memory = None if memory is None else self.attention_norm(memory)
        y, counts = self.attention(self.attention_norm(x), normed_memory, cache, document), None
        if self.attention_post_norm is not None:
            y = self.attention_post_norm(y)
        x, normed = self.feed_forward_norm.after_adding(x, y)
        if isinstance(self.feed_forward, MoE):
            y, counts = self.feed_forward(normed, domain)
        else:
            y = self.feed_forward(normed)
        if self.feed_forward_post_norm is not None:
            y = self.feed_forward_post_norm(y)
        return x + y, counts


def _keeping_products() -> tuple[Any, Any]:
    """Return the contexts of the first and of the recomputed pass that keep the results of `KEPT`."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op.name().partition(".")[0] in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
