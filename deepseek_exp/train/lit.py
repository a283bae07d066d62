"""The Lightning module: one training step is one optimizer step over all micro batches.

Shapes: sequences, seq (targets), vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from deepseek_exp.checkpoint.rng import rng_state, set_rng_state
from deepseek_exp.checkpoint.tensors import readable
from deepseek_exp.config import ExperimentConfig, OnNonfinite
from deepseek_exp.data import Batch
from deepseek_exp.errors import CheckpointError, Problem
from deepseek_exp.models import Loss, Transformer
from deepseek_exp.models.moe import MoE, routing_metrics
from deepseek_exp.parallel.engines import StepResult, may_apply
from deepseek_exp.train.finite import check_skipped, check_state, first_nonfinite
from deepseek_exp.train.optim import build_optimizer, clip_gradients, lr_factor


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
        self.memories: dict[int, Tensor | None] = {}  # micro batch -> the memory that its next segment goes on from
        self.val_memory: Tensor | None = None
        self.val_memories: dict[int, Tensor | None] = {}  # of validation: batch of a step -> its lanes' memory
        self.moe_layers = [m for m in model.modules() if isinstance(m, MoE)]
        for layer in self.moe_layers:
            layer.loss_scale = cfg.trainer.micro_batch_seqs / cfg.trainer.global_batch_seqs
        domains, parts = cfg.model.moe.domains, list(cfg.data.mixture)
        of_part = [domains.index(name) if name in domains else -1 for name in parts] + [-1]  # the last: no part
        self.register_buffer("domain_of_part", torch.tensor(of_part) if domains else None, persistent=False)
        self.val_sums = torch.zeros(4, dtype=torch.float64)  # nats, unigram bits, tokens, bytes
        self.val_part_sums = torch.zeros(len(cfg.data.mixture), 2, dtype=torch.float64)  # nats, tokens of each part
        self.val_unlabelled_nats = torch.zeros((), dtype=torch.float64)
        self.val_loss: float | None = None  # of this very step
        self.steps_done = 0  # by the weights that are validated without training
        self.skipped_steps = 0  # of the whole run, by trainer.on_nonfinite=skip
        self._rng: dict[str, Any] | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Do one optimizer step.

        Args:
            batch: tokens (sequences, seq + 1) and parts of the whole step.
            batch_idx: not used.

        Returns:
            Scalars on the device: loss (nats per token), nats and bytes of the step, grad_norm (before clipping),
            further (metrics by name); lr, the learning rate that the step was done with; and applied, whether weights
            and optimizer have changed. All are those of the whole step, also where other ranks do a part of it.
        """
        self.val_loss = None
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        rows = self.cfg.trainer.micro_batch_seqs
        micro_batches = [
            Batch(tokens, part, rows)
            for tokens, part in zip(batch.tokens.split(rows), batch.part.split(rows), strict=True)
        ]
        self.nats, self.mtp_loss = (torch.zeros((), device=batch.tokens.device) for _ in range(2))
        self.bytes = self.token_bytes[batch.tokens[:, 1:]].sum()
        self.reset_counts()
        lr = float(optimizer.param_groups[0]["lr"])
        result = self.do_step(optimizer, micro_batches)
        self.share_step()
        if result.applied:
            self.update_biases()
        elif self.cfg.trainer.on_nonfinite is OnNonfinite.skip:
            self.skip_step()
        schedule.step()
        n_seqs, seq_len = self.cfg.trainer.global_batch_seqs, batch.tokens.shape[1] - 1
        # here, since callbacks save before the module's own batch end
        self.trainer.datamodule.advance(n_seqs)
        ahead = {"train/mtp_loss": self.mtp_loss} if self.cfg.model.n_mtp_layers else {}
        loss = self.nats / (n_seqs * seq_len)
        values = {"loss": loss, "nats": self.nats, "bytes": self.bytes, "grad_norm": result.grad_norm}
        return {**values, "lr": lr, "applied": result.applied, "further": ahead}

    def do_step(self, optimizer: Any, micro_batches: list[Batch]) -> StepResult:
        """Go forward and backward with each micro batch, clip, and step the optimizer."""
        for i, batch in enumerate(micro_batches):
            loss, nll, further, self.memories[i] = self.training_loss(batch.tokens, batch.part, self.memories.get(i))
            self.manual_backward(loss / len(micro_batches))
            self.nats += nll.sum()
            self.mtp_loss += further.detach() / len(micro_batches)
        grad_norm = clip_gradients(optimizer.optimizer, self.cfg.optim.clip_norm)
        result = StepResult(grad_norm, may_apply(grad_norm, self.cfg))
        if not result.applied:
            optimizer.zero_grad()  # the step, which Lightning counts, then finds nothing to do
        optimizer.step()
        optimizer.zero_grad()
        return result

    def skip_step(self) -> None:
        """Count a step that was not applied, and forget segment memories that its forward pass has spoilt.

        Raises:
            UserError: more steps were skipped than trainer.max_skipped_steps.
        """
        self.skipped_steps += 1
        check_skipped(self.skipped_steps, self.trainer.global_step, self.cfg)
        for i, memory in self.memories.items():
            if memory is not None and first_nonfinite([("memory", memory)]) is not None:
                self.memories[i] = None

    def share_step(self) -> None:
        """Make what was counted in a step that of all ranks; one alone has it."""

    def training_loss(
        self, tokens: Tensor, part: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Give what a micro batch is trained on: the loss of the next tokens plus the weighted one of those further on.

        Args:
            tokens: (sequences, seq + 1).
            part: (sequences,), the part of the data that each comes from.
            memory: of the segment before, where the model has one.

        Returns:
            The loss to differentiate, the nll of each next token (sequences, seq), the mean loss of the tokens further
            ahead (0 without multi-token prediction), and the memory to go on from.
        """
        (mean, nll), ahead, memory = self._losses(tokens, part, memory)
        loss, further = self.weigh(mean, ahead)
        return loss, nll, further, memory

    def weigh(self, mean: Tensor, ahead: list[Loss]) -> tuple[Tensor, Tensor]:
        """Give the loss of the next tokens plus the weighted one of those further ahead, and the latter alone."""
        further = torch.stack([x for x, _ in ahead]).mean() if ahead else mean.new_zeros(())
        return mean + self.cfg.model.mtp_loss_weight * further, further

    def reset_counts(self) -> None:
        """Start to count the experts' load anew."""
        for layer in self.moe_layers:
            layer.reset_counts()

    def update_biases(self) -> None:
        """Balance the experts by the load counted since the last reset."""
        for layer in self.moe_layers:
            layer.update_bias()

    def on_train_start(self) -> None:
        """Let the configuration's learning rate and decay hold, also where a checkpoint brought back other ones.

        Raises:
            CheckpointError: the checkpoint, of a version that did not check it, is not finite.
        """
        wrong = self.nonfinite_state() if self.trainer.ckpt_path is not None else None
        if wrong is not None:
            rule = f"holds infinite or NaN numbers in {wrong}: its training had diverged"
            raise CheckpointError(Problem("resume", str(self.trainer.ckpt_path), rule, "name an older checkpoint"))
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
        self.val_unlabelled_nats.zero_()
        self.val_memories = {}
        self.reset_counts()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one micro batch to the validation sums; the routing of one that is filled up is not counted."""
        lanes = batch_idx % self.trainer.datamodule.batches_per_eval_step if self.cfg.model.memory_len else 0
        self.val_memory = self.val_memories.get(lanes)
        self.evaluate(batch, self._add, count_routing=batch.n_counted == len(batch.tokens))
        self.val_memories[lanes] = self.val_memory
        if self.domain_of_part is not None and self.cfg.data.mixture:
            self.evaluate_unlabelled(batch)

    def evaluate(self, batch: Batch, add: Callable[[Tensor, Batch], None], *, count_routing: bool) -> None:
        """Go forward with a micro batch and hand over the nll of its next tokens.

        Args:
            batch: the micro batch.
            add: takes the nll, (sequences, seq), and the batch.
            count_routing: add what the mixtures of experts count.
        """
        kept = [] if count_routing else [(layer, layer.counts.clone()) for layer in self.moe_layers]
        self.forward_only(batch, add)
        for layer, counts in kept:
            layer.counts.copy_(counts)

    def evaluate_unlabelled(self, batch: Batch) -> None:
        """Add the loss of a micro batch whose domains the routers infer; its routing is not counted."""
        self.evaluate(batch._replace(part=torch.full_like(batch.part, -1)), self._add_unlabelled, count_routing=False)

    def forward_only(self, batch: Batch, add: Callable[[Tensor, Batch], None]) -> None:
        """Give the nll of a micro batch to `add`."""
        (_, nll), _, self.val_memory = self._losses(batch.tokens, batch.part, self.val_memory)
        add(nll, batch)

    def _add(self, nll: Tensor, batch: Batch) -> None:
        nll, targets = nll[: batch.n_counted], batch.tokens[: batch.n_counted, 1:]
        nats = nll.sum(dtype=torch.float64)
        unigram, n_bytes = self.unigram_bits[targets].sum(), self.token_bytes[targets].sum()
        self.val_sums += torch.stack([nats, unigram, torch.ones_like(targets).sum(), n_bytes]).cpu()
        if self.cfg.data.mixture:
            by_sequence = nll.sum(1, dtype=torch.float64)  # (sequences,)
            sums = torch.stack([by_sequence, torch.full_like(by_sequence, targets.shape[1])], 1)  # (sequences, 2)
            self.val_part_sums.index_add_(0, batch.part[: batch.n_counted].cpu(), sums.cpu())

    def _add_unlabelled(self, nll: Tensor, batch: Batch) -> None:
        self.val_unlabelled_nats += nll[: batch.n_counted].sum(dtype=torch.float64).cpu()

    def on_validation_epoch_end(self) -> None:
        """Log what the validation measured under the number of steps done.

        Loss (nats per token), bits per byte, and the bits per byte of a unigram model on the same tokens; of a mixture
        also the loss of each part, of which the overall loss is the mean by the tokens that each was served with.
        """
        self.share_validation()
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
        if self.val_unlabelled_nats:
            values["val/loss_without_labels"] = float(self.val_unlabelled_nats) / tokens
        counts = self.routed_counts()
        if counts is not None:
            routing = routing_metrics(self.cfg.model.moe, counts)
            values |= {f"val/{name}": float(routing[name]) for name in ("max_violation", "utilisation")}
        self.log_dict(values, logger=False)  # for callbacks; Lightning's own logging counts steps from 0
        self.trainer.logger.log_metrics(values, self.trainer.global_step or self.steps_done)

    def share_validation(self) -> None:
        """Make what was counted in a validation that of all ranks; one alone has it."""

    def routed_counts(self) -> Tensor | None:
        """Give what the mixtures of experts of the blocks counted, (layers, experts + COUNTS); None without any."""
        layers = self.model.routed_layers()
        return torch.stack([layer.counts for layer in layers]) if layers else None

    def agree(self, value: int) -> int:
        """Give the largest of all ranks' values."""
        return value

    def mean(self, values: list[Tensor]) -> float | None:
        """Average the elements of tensors, those of all ranks; None: there is none."""
        return torch.cat([v.detach().float().flatten() for v in values]).mean().item() if values else None

    def layout_metrics(self) -> dict[str, float]:
        """Measure the stages of a pipeline."""
        return {}

    def nonfinite_state(self) -> str | None:
        """Return what of the weights and the optimizer's state is not finite; None: all of it is."""
        return first_nonfinite(self.state_tensors())

    def state_bytes(self) -> int:
        """Return about how many bytes this process writes to a checkpoint."""
        return sum(tensor.nbytes for _, tensor in self.state_tensors())

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """List the weights and the optimizer's state of this process, with what to call them."""
        return state_tensors(self.model, self.trainer.optimizers[0])

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer, over fp32 masters of bf16 weights."""
        return build_optimizer(self.cfg.optim, self.model, self.cfg.kernels.adamw)

    def configure_optimizers(self) -> Any:
        """Make the optimizer and the per-step schedule."""
        optimizer = self.make_optimizer()
        warmup, ratio, steps = self.cfg.optim.warmup_steps, self.cfg.optim.min_lr_ratio, self.cfg.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, warmup, steps, ratio))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know: random numbers, segment memories, this step's validation loss.

        Raises:
            UserError: something of the state is infinite or NaN.
        """
        check_state(self.nonfinite_state(), self.trainer.global_step, self.cfg)
        memories = {i: m for i, m in self.memories.items() if m is not None}
        checkpoint |= {"rng": rng_state(), "memories": memories, "val_loss": self.val_loss}
        checkpoint |= {"skipped_steps": self.skipped_steps, "finite": True}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what `on_save_checkpoint` added."""
        with readable(Path(self.trainer.ckpt_path)):
            self._rng = checkpoint["rng"]
            self.skipped_steps = int(checkpoint.get("skipped_steps", 0))  # format 2 did not count them
            self.memories = {i: m.to(self.device) for i, m in checkpoint["memories"].items()}

    def _losses(self, tokens: Tensor, part: Tensor, memory: Tensor | None) -> tuple[Loss, list[Loss], Tensor | None]:
        """Give the losses of a micro batch.

        Args:
            tokens: (sequences, seq + 1).
            part: (sequences,), the part of the data that each comes from.
            memory: of the segment before, where the model has one.

        Returns:
            What `Transformer.losses` gives, and the memory to go on from.
        """
        domain = self.domain(part)
        if not self.cfg.model.memory_len:
            return *self.model.losses(tokens, domain), memory
        memory = self.model.empty_memory(len(tokens)) if memory is None else memory
        return self.model.segment_losses(tokens, memory, domain)

    def domain(self, part: Tensor) -> Tensor | None:
        """Give the domain of each sequence, (sequences,), -1 where it is not known; None: the model has none."""
        return None if self.domain_of_part is None else self.domain_of_part[part]


def state_tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """List every tensor that a checkpoint holds of this rank's weights and optimizer, with what to call it.

    Args:
        model: its parameters and persistent buffers are listed.
        optimizer: torch's, one with masters, or DeepSpeed's around one of these.
    """
    yield from model.state_dict().items()
    # ZeRO 3 keeps a part of each weight and, between steps, takes the fp32 weights out of the optimizer's groups
    yield from ((name, p.ds_tensor) for name, p in model.named_parameters() if hasattr(p, "ds_tensor"))
    yield from (("the optimizer's fp32 weights", p) for p in getattr(optimizer, "fp32_partitioned_groups_flat", []))
    base = getattr(optimizer, "optimizer", optimizer)
    for group in base.param_groups:
        yield from (("the optimizer's fp32 weights", p.data) for p in group["params"])
    for state in base.state.values():
        yield from ((f"the optimizer's {kind}", v) for kind, v in state.items() if isinstance(v, Tensor))
