"""A decoder-only Transformer as a flat list of layers: embedding, blocks, head.

Shapes: batch, seq, d_model, vocab_size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek_exp.config import ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.attention import Attention, KVCache


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.eps = ops, cfg.norm_eps
        self.weight = nn.Parameter(torch.empty(cfg.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        return self.ops.rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """The SwiGLU feed-forward network: w_down(silu(w_gate x) * w_up x)."""

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.w_gate = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.w_up = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.w_down = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, seq, d_model) to the same shape."""
        return self.w_down(self.ops.swiglu(self.w_gate(x), self.w_up(x)))


class Embedding(nn.Module):
    """The first layer: tokens to vectors."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.vocab_size, cfg.d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up (batch, seq) tokens: (batch, seq, d_model)."""
        return nn.functional.embedding(tokens, self.weight)


class Block(nn.Module):
    """One transformer block with normalisation before attention and before the feed-forward network."""

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg, ops)
        self.attention = Attention(cfg, ops)
        self.feed_forward_norm = RMSNorm(cfg, ops)
        self.feed_forward = FeedForward(cfg, ops)

    def forward(self, x: Tensor, memory: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Transform the residual stream.

        Args:
            x: (batch, seq, d_model).
            memory: (batch, n_memory, d_model), this block's inputs for the tokens just before x, without gradient.
            cache: this block's keys and values for the tokens before x.

        Returns:
            (batch, seq, d_model).
        """
        normed_memory = None if memory is None else self.attention_norm(memory)
        x = x + self.attention(self.attention_norm(x), normed_memory, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Head(nn.Module):
    """The last layer: vectors to logits; with tied embeddings it has no table of its own."""

    def __init__(self, cfg: ModelConfig, ops: Ops, embedding: Embedding) -> None:
        super().__init__()
        self.norm = RMSNorm(cfg, ops)
        tied = cfg.tie_embeddings
        self.weight = embedding.weight if tied else nn.Parameter(torch.empty(cfg.vocab_size, cfg.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (batch, seq, vocab_size) of (batch, seq, d_model)."""
        return nn.functional.linear(self.norm(x), self.weight)


class Transformer(nn.Module):
    """Decoder-only language model; `layers()` is the flat list that a pipeline cuts into stages."""

    def __init__(self, cfg: ModelConfig, ops: Ops, *, recompute_blocks: bool = False) -> None:
        """Build with uninitialised weights; see `init_weights`.

        Args:
            cfg: widths, depths and counts.
            ops: the operations to build from.
            recompute_blocks: keep only each block's input for the backward pass and compute the rest again.
        """
        super().__init__()
        self.cfg, self.ops, self.recompute_blocks = cfg, ops, recompute_blocks
        self.embedding = Embedding(cfg)
        self.blocks = nn.ModuleList(Block(cfg, ops) for _ in range(cfg.n_layers))
        self.head = Head(cfg, ops, self.embedding)

    def layers(self) -> list[nn.Module]:
        """List the layers in order: embedding, blocks, head; each takes what the one before gives."""
        return [self.embedding, *self.blocks, self.head]

    def forward(self, tokens: Tensor, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Give the logits of every next token.

        Args:
            tokens: (batch, seq), int64.
            caches: one a block, holding the tokens before these; extended in place.

        Returns:
            (batch, seq, vocab_size).
        """
        x = self.embedding(tokens)  # (batch, seq, d_model)
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, None, caches[i] if caches is not None else None)
        return self.head(x)

    def forward_segment(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Give the logits of a segment that goes on where the one before ended.

        Each block's keys include its inputs for the last `memory_len` tokens before the segment, through which no
        gradient flows. Source: Dai et al. 2019, "Transformer-XL", section 3.2; positions are rotary here, so the
        paper's relative encoding (3.3) is not needed.

        Args:
            tokens: (batch, seq), int64.
            memory: (n_layers, batch, n_memory, d_model); n_memory is 0 at the start of a text.

        Returns:
            Logits (batch, seq, vocab_size) and the memory for the next segment,
            (n_layers, batch, min(n_memory + seq, memory_len), d_model).
        """
        x = self.embedding(tokens)  # (batch, seq, d_model)
        kept = []
        for i, block in enumerate(self.blocks):
            kept.append(torch.cat([memory[i], x.detach()], dim=1)[:, -self.cfg.memory_len :])
            x = self._run(block, x, memory[i], None)
        return self.head(x), torch.stack(kept)

    def empty_memory(self, batch: int) -> Tensor:
        """Give the memory at the start of a text: (n_layers, batch, 0, d_model)."""
        return self.embedding.weight.new_empty(self.cfg.n_layers, batch, 0, self.cfg.d_model)

    def new_caches(self, batch: int, max_len: int) -> list[KVCache]:
        """Make empty caches for `max_len` tokens, one a block."""
        shape = (batch, self.cfg.n_kv_heads, max_len, self.cfg.head_dim)
        weight = self.embedding.weight
        return [KVCache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.blocks]

    def _run(self, block: nn.Module, x: Tensor, memory: Tensor | None, cache: KVCache | None) -> Tensor:
        if self.recompute_blocks and torch.is_grad_enabled():
            return checkpoint(block, x, memory, cache, use_reentrant=False, preserve_rng_state=False)
        return block(x, memory, cache)


def init_weights(model: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Set every weight from its name and the seed alone, so that any layout of the model starts equal.

    Matrices are normal with deviation init_std; those that write into the residual stream (wo, w_down) are divided by
    sqrt(2 n_layers) (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3). Norm
    scales are 1, gates 0. Drawn on the CPU in fp32 whatever the device.

    Args:
        model: with parameters on a real device.
        cfg: gives init_std and n_layers.
        seed: the experiment's seed.
    """
    residual_std = cfg.init_std / (2 * cfg.n_layers) ** 0.5
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("gate") and p.ndim == 1:
                p.zero_()
            else:
                std = residual_std if name.endswith(("wo.weight", "w_down.weight")) else cfg.init_std
                p.copy_(torch.randn(p.shape, generator=_generator(seed, name)) * std)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
