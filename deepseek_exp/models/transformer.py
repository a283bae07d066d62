"""A decoder-only Transformer as a flat list of layers: embedding, blocks, head.

Shapes: batch, seq, d_model, vocab_size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek_exp.config import ActivationCheckpointing, ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.block import Block
from deepseek_exp.models.cache import KVCache
from deepseek_exp.models.moe import MoE
from deepseek_exp.models.mtp import MTPModule
from deepseek_exp.models.names import OwnNames
from deepseek_exp.models.norm import RMSNorm

# The mean nll in nats, and the nll of each token without gradient.
Loss = tuple[Tensor, Tensor]
# Matrices that write into the residual stream.
RESIDUAL = ("wo.weight", "w_down.weight", "experts.w_down")


class Counted(NamedTuple):
    """The targets that count, and what their sum is divided by.

    Attributes:
        mask: (batch, seq) bool, whether each target counts.
        mean_targets: mean number of targets that count per micro-batch of the optimizer step, a scalar. The mean over
            micro-batches of the losses is then that over all targets that count. None: their number in this one.
    """

    mask: Tensor
    mean_targets: Tensor | None


class Embedding(nn.Module):
    """The first layer: tokens to vectors."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.vocab_size, cfg.d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up (batch, seq) tokens: (batch, seq, d_model)."""
        return nn.functional.embedding(tokens, self.weight)


class Head(nn.Module):
    """The last layer: vectors to logits; with tied embeddings it has no table."""

    def __init__(self, cfg: ModelConfig, ops: Ops, embedding: Embedding) -> None:
        super().__init__()
        self.ops, self.norm = ops, RMSNorm(cfg.d_model, cfg.norm_eps, ops)
        tied = cfg.tie_embeddings
        self.weight = embedding.weight if tied else nn.Parameter(torch.empty(cfg.vocab_size, cfg.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, seq, vocab_size) of (batch, seq, d_model)."""
        return nn.functional.linear(self.norm(x), self.weight)

    def loss(self, h: Tensor, targets: Tensor, token_weights: Tensor | None = None) -> Loss:
        """Return the loss of (batch, seq) targets from (batch, seq, d_model), which is already normalised.

        With (batch, seq) `token_weights`, the first part is the weighted sum of the nll instead of its mean.
        """
        return self.ops.linear_cross_entropy(h, self.weight, targets, token_weights)


class Transformer(OwnNames):
    """Decoder-only language model; `layers()` is the flat list that a pipeline splits into stages."""

    def __init__(
        self, cfg: ModelConfig, ops: Ops, checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    ) -> None:
        """Build with uninitialised weights; see `init_weights`.

        Args:
            cfg: widths, depths and counts.
            ops: the operations to build from.
            checkpointing: what blocks recompute in the backward pass.
        """
        super().__init__()
        self.cfg, self.ops = cfg, ops
        self.embedding = Embedding(cfg)
        self.blocks = nn.ModuleList(Block(cfg, ops, i, checkpointing) for i in range(cfg.n_layers))
        self.head = Head(cfg, ops, self.embedding)
        self.mtp = nn.ModuleList(MTPModule(cfg, ops, checkpointing) for _ in range(cfg.n_mtp_layers))

    def layers(self) -> list[nn.Module]:
        """List the layers in order: embedding, blocks, head; each takes the output of the one before."""
        return [self.embedding, *self.blocks, self.head]

    def forward(self, tokens: Tensor, caches: Sequence[KVCache] | None = None, domain: Tensor | None = None) -> Tensor:
        """Return the logits of every next token.

        Args:
            tokens: (batch, seq), int64.
            caches: one per block, holding the tokens before these; extended in place.
            domain: (batch,) int64, index of each sequence's domain in moe.domains, -1 if unknown; None if all are
                unknown.

        Returns:
            (batch, seq, vocab_size).
        """
        return self.head(self.hidden(tokens, caches, domain))

    def losses(
        self,
        tokens: Tensor,
        domain: Tensor | None = None,
        counted: Counted | None = None,
        document: Tensor | None = None,
    ) -> tuple[Loss, list[Loss]]:
        """Return the loss of every next token and, in training, of those further ahead.

        Args:
            tokens: (batch, seq + 1), int64: the inputs and the last target.
            domain: as in `forward`.
            counted: the targets that count; None means all.
            document: (batch, seq), the document of each input, if several share a row: they do not see each other.

        Returns:
            The differentiable mean nll of the next tokens, and each token's nll, (batch, seq); and for depth
            k = 1 .. n_mtp_layers the same of the token k + 1 ahead, (batch, seq - k). With `counted`, all means are
            divided by its `mean_targets`, as in DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", equation 24.
        """
        return self.losses_of(self.hidden(tokens[:, :-1], None, domain, document), tokens, domain, counted, document)

    def segment_losses(
        self, tokens: Tensor, memory: Tensor, domain: Tensor | None = None
    ) -> tuple[Loss, list[Loss], Tensor]:
        """Return the losses of a segment that continues the previous one, and the memory for the next.

        Each block's keys include its inputs for the last `memory_len` tokens before the segment, without gradient.
        Source: Dai et al. 2019, "Transformer-XL", section 3.2; positions are rotary here, so the paper's relative
        encoding (3.3) is not needed. MTP modules see the segment only.

        Args:
            tokens: (batch, seq + 1), int64: the inputs and the last target.
            memory: (n_layers, batch, n_memory, d_model); n_memory is 0 at the start of a text.
            domain: as in `forward`.

        Returns:
            The result of `losses`, and the memory for the next segment,
            (n_layers, batch, min(n_memory + seq, memory_len), d_model).
        """
        x = self.embedding(tokens[:, :-1])  # (batch, seq, d_model)
        kept = []
        for i, block in enumerate(self.blocks):
            kept.append(torch.cat([memory[i], x.detach()], dim=1)[:, -self.cfg.memory_len :])
            x = block(x, memory[i], None, domain)
        return *self.losses_of(x, tokens, domain), torch.stack(kept)

    def losses_of(
        self,
        x: Tensor,
        tokens: Tensor,
        domain: Tensor | None,
        counted: Counted | None = None,
        document: Tensor | None = None,
    ) -> tuple[Loss, list[Loss]]:
        """Return the result of `losses` from the last block's output, (batch, seq, d_model)."""
        main, ahead = self._loss(self.head.norm(x), tokens[:, 1:], counted), []
        modules = self.mtp if self.training else []
        h = self.head.norm(x) if modules else x  # normed twice: gradients add up before the norm, not behind it
        for k, module in enumerate(modules, start=1):
            # h has seen tokens up to its own position + k - 1; this depth gets the next one.
            n = tokens.shape[1] - 1 - k
            within = None if document is None else document[:, :n]
            h = module(h[:, :n], self.embedding(tokens[:, k:-1]), domain, within)  # (batch, seq - k, ...)
            ahead.append(self._loss(h, tokens[:, k + 1 :], _ahead(counted, document, k)))
        return main, ahead

    def _loss(self, h: Tensor, targets: Tensor, counted: Counted | None) -> Loss:
        if counted is None:
            return self.head.loss(h, targets)
        mask = counted.mask
        n_targets = mask.sum().clamp(min=1) if counted.mean_targets is None else counted.mean_targets
        token_weights = (mask / n_targets).to(h.dtype if h.dtype == torch.float64 else torch.float32)
        mean, nll = self.head.loss(h, targets, token_weights)
        return mean, nll.masked_fill(~mask, 0)

    def routed_layers(self) -> list[MoE]:
        """List the MoE layers of the blocks."""
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoE)]

    def empty_memory(self, batch: int) -> Tensor:
        """Return the memory at the start of a text: (n_layers, batch, 0, d_model)."""
        return self.embedding.weight.new_empty(self.cfg.n_layers, batch, 0, self.cfg.d_model)

    def new_caches(self, batch: int, max_len: int) -> list[KVCache]:
        """Return empty caches for `max_len` tokens, one per block."""
        return [block.attention.new_cache(batch, max_len, self.embedding.weight) for block in self.blocks]

    def hidden(
        self,
        tokens: Tensor,
        caches: Sequence[KVCache] | None = None,
        domain: Tensor | None = None,
        document: Tensor | None = None,
    ) -> Tensor:
        """Return the output of the last block, (batch, seq, d_model); arguments are those of `forward` and `losses`."""
        x = self.embedding(tokens)  # (batch, seq, d_model)
        for i, block in enumerate(self.blocks):
            x = block(x, None, caches[i] if caches is not None else None, domain, document)
        return x


def _ahead(counted: Counted | None, document: Tensor | None, k: int) -> Counted | None:
    """Return which targets k tokens further ahead count: those that do, and are of the document of the state."""
    if counted is None:
        return None
    mask = counted.mask[:, k:]  # (batch, seq - k)
    if document is not None:
        mask = mask & (document[:, k:] == document[:, :-k])
    return Counted(mask, counted.mean_targets)


def init_weights(model: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Set every weight from its name and the seed only, so that every layout of the model starts equal.

    Matrices are normal with standard deviation init_std; those that write into the residual stream (wo, w_down) are
    divided by sqrt(2 n_layers) (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section
    2.3). Norm scales are 1, gates and biases 0. Drawn on the CPU in fp32 for any device, several parameters at a time:
    each has its own random numbers.

    Args:
        model: with parameters on a real device.
        cfg: provides init_std and n_layers.
        seed: the experiment's seed.
    """

    def fill(named: tuple[str, nn.Parameter]) -> None:
        name, p = named
        p.data.copy_(initial_weight(name, p.shape, cfg, seed))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, model.named_parameters()))  # raises the first exception of a thread


def initial_weight(name: str, shape: Sequence[int], cfg: ModelConfig, seed: int) -> Tensor:
    """Draw one whole parameter; see `init_weights`."""
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    std = cfg.init_std / (2 * cfg.n_layers) ** 0.5 if name.endswith(RESIDUAL) else cfg.init_std
    return torch.randn(shape, generator=generator_for(seed, name)).mul_(std)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return the random number generator that the initial values of one parameter are drawn from."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
