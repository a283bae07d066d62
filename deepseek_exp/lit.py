"""The Lightning module: one training step is one optimizer step over all micro batches.

Shapes: sequences, seq (targets), vocab_size.
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.data import Batch
from deepseek_exp.models import Transformer
from deepseek_exp.optim import build_optimizer, clip_gradients, lr_factor
from deepseek_exp.parallel.checkpoint import rng_state, set_rng_state


class LanguageModel(pl.LightningModule):
    """Next-token training and validation of a Transformer.

    Optimization is manual in Lightning's sense: a batch holds every sequence of the step, so each batch border is an
    optimizer step and a checkpoint never falls inside an accumulation.
    """

    def __init__(self, cfg: ExperimentConfig, model: Transformer, token_bytes: Tensor, unigram_bits: Tensor) -> None:
        """Wrap a model.

        Args:
            cfg: the experiment.
            model: with its weights set.
            token_bytes: (vocabulary,) int64, bytes of text that each token stands for.
            unigram_bits: (vocabulary,) float64, bits of each token under the training text's token frequencies.
        """
        super().__init__()
        self.automatic_optimization = False
        self.cfg, self.model = cfg, model
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.register_buffer("unigram_bits", unigram_bits, persistent=False)
        self.memories: dict[int, Tensor] = {}  # micro batch -> the memory that its next segment goes on from
        self.val_memory: Tensor | None = None
        self.val_sums = torch.zeros(4, dtype=torch.float64)  # nats, unigram bits, tokens, bytes
        self.val_part_sums = torch.zeros(len(cfg.data.mixture), 2, dtype=torch.float64)  # nats, tokens of each part
        self.val_loss: float | None = None  # of this very step
        self.steps_done = 0  # by the weights that are validated without training
        self._rng: dict[str, Any] | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Do one optimizer step.

        Args:
            batch: tokens (sequences, seq + 1) and parts of the whole step.
            batch_idx: not used.

        Returns:
            Scalars on the device: loss (nats per token), nats and bytes of the step, grad_norm (before clipping); and
            lr, the learning rate that the step was done with.
        """
        self.val_loss = None
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        micro_batches = batch.tokens.split(self.cfg.trainer.micro_batch_seqs)
        nats = torch.zeros((), device=batch.tokens.device)
        for i, tokens in enumerate(micro_batches):
            nll, memory = self._nll(tokens, self.memories.get(i))  # (sequences, seq)
            if memory is not None:
                self.memories[i] = memory
            self.manual_backward(nll.mean() / len(micro_batches))
            nats += nll.detach().sum()
        grad_norm = clip_gradients(optimizer.optimizer, self.cfg.optim.clip_norm)
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        # here, since callbacks save before the module's own batch end
        self.trainer.datamodule.advance(len(batch.tokens))
        targets = batch.tokens[:, 1:]
        n_bytes = self.token_bytes[targets].sum()
        return {"loss": nats / targets.numel(), "nats": nats, "bytes": n_bytes, "grad_norm": grad_norm, "lr": lr}

    def on_train_start(self) -> None:
        """Let the configuration's learning rate and decay hold, also where a checkpoint brought back other ones."""
        schedule, optim = self.lr_schedulers(), self.cfg.optim
        schedule.base_lrs = [optim.lr] * len(schedule.base_lrs)
        for group, factor in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = optim.lr
            group["lr"] = optim.lr * factor(schedule.last_epoch)
            group["weight_decay"] = optim.weight_decay if group["decays"] else 0.0

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Put the random number generators where the checkpoint had them, once after a resume."""
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None

    def on_validation_epoch_start(self) -> None:
        """Start the sums, and a text of its own for the memory."""
        self.val_sums.zero_()
        self.val_part_sums.zero_()
        self.val_memory = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one micro batch to the validation sums."""
        nll, self.val_memory = self._nll(batch.tokens, self.val_memory)
        targets = batch.tokens[:, 1:]
        nats = nll.sum(dtype=torch.float64)
        unigram, n_bytes = self.unigram_bits[targets].sum(), self.token_bytes[targets].sum()
        self.val_sums += torch.stack([nats, unigram, torch.ones_like(targets).sum(), n_bytes]).cpu()
        if self.cfg.data.mixture:
            by_sequence = nll.sum(1, dtype=torch.float64)  # (sequences,)
            sums = torch.stack([by_sequence, torch.full_like(by_sequence, targets.shape[1])], 1)  # (sequences, 2)
            self.val_part_sums.index_add_(0, batch.part.cpu(), sums.cpu())

    def on_validation_epoch_end(self) -> None:
        """Log what the validation measured under the number of steps done.

        Loss (nats per token), bits per byte, and the bits per byte of a unigram model on the same tokens; of a mixture
        also the loss of each part, of which the overall loss is the mean by the tokens that each was served with.
        """
        nats, unigram, tokens, n_bytes = self.val_sums.tolist()
        self.val_loss = nats / tokens
        values = {
            "val/loss": self.val_loss,
            "val/bits_per_byte": nats / math.log(2) / n_bytes,
            "val/unigram_bits_per_byte": unigram / n_bytes,
        }
        for name, (part_nats, part_tokens) in zip(self.cfg.data.mixture, self.val_part_sums.tolist(), strict=True):
            if part_tokens:
                values[f"val/loss/{name}"] = part_nats / part_tokens
        self.log_dict(values, logger=False)  # for callbacks; Lightning's own logging counts steps from 0
        self.trainer.logger.log_metrics(values, self.trainer.global_step or self.steps_done)

    def configure_optimizers(self) -> Any:
        """Make the optimizer and the per-step schedule."""
        optimizer = build_optimizer(self.cfg.optim, self.model)
        warmup, ratio, steps = self.cfg.optim.warmup_steps, self.cfg.optim.min_lr_ratio, self.cfg.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, warmup, steps, ratio))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know: random numbers, segment memories, this step's validation loss."""
        checkpoint |= {"rng": rng_state(), "memories": self.memories, "val_loss": self.val_loss}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what `on_save_checkpoint` added."""
        self._rng = checkpoint["rng"]
        self.memories = {i: m.to(self.device) for i, m in checkpoint["memories"].items()}

    def _nll(self, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Give the negative log likelihood of each next token, (sequences, seq), and the memory to go on from."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.cfg.model.memory_len:
            memory = self.model.empty_memory(len(tokens)) if memory is None else memory
            logits, memory = self.model.forward_segment(inputs, memory)
        else:
            logits = self.model(inputs)
        return self.model.ops.cross_entropy(logits, targets), memory
