"""The Lightning module: one training step is one optimizer step over all micro batches.

Shapes: sequences, seq (targets), vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from deepseek_exp.checkpoint.rng import rng_state, set_rng_state
from deepseek_exp.checkpoint.shards import FROZEN
from deepseek_exp.checkpoint.tensors import readable
from deepseek_exp.config import ExperimentConfig, OnNonfinite
from deepseek_exp.config.topology import degrees
from deepseek_exp.data import Batch
from deepseek_exp.errors import CheckpointError, Problem
from deepseek_exp.models import MicroBatch, Objective, Transformer
from deepseek_exp.models.moe import MoE, routing_metrics
from deepseek_exp.parallel.engines import Engine, Evaluation
from deepseek_exp.parallel.ranks import Ranks
from deepseek_exp.train.ema import drop_average, update_average
from deepseek_exp.train.finite import check_skipped, check_state, first_nonfinite
from deepseek_exp.train.isolation import check_isolation
from deepseek_exp.train.optim import build_optimizer
from deepseek_exp.train.policy_rounds import PolicyRounds
from deepseek_exp.train.schedule import schedule_of


class LanguageModel(pl.LightningModule):
    """Training and validation of a Transformer, on one process or on one rank of several.

    Optimization is manual in Lightning's sense: a batch holds every sequence of the step, so each batch border is an
    optimizer step and a checkpoint never falls inside an accumulation.

    Attributes:
        engine: does the steps and forward passes. None until the strategy sets it, if there are several ranks.
        objective: computes the losses.
        ranks: combines the statistics of all ranks.
    """

    def __init__(
        self,
        cfg: ExperimentConfig,
        model: Transformer,
        engine: Engine | None,
        objective: Objective,
        ranks: Ranks,
        token_bytes: Tensor,
        unigram_bits: Tensor,
        rounds: PolicyRounds | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            cfg: the experiment.
            model: what this rank holds of the model, with its weights set.
            engine: of a single process; None if the strategy sets one up.
            objective: what the model is trained on.
            ranks: of the layout.
            token_bytes: (vocab_size,) int64, bytes of text that each token stands for.
            unigram_bits: (vocab_size,) float64, bits of each token under the training text's token frequencies.
            rounds: samples the completions to train on, in reinforcement learning; None if the data has them.
        """
        super().__init__()
        self.automatic_optimization = False
        self.cfg, self.model = cfg, model
        self.engine, self.objective, self.ranks, self.rounds = engine, objective, ranks, rounds
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.register_buffer("unigram_bits", unigram_bits, persistent=False)
        self.val_memories: dict[int, Tensor | None] = {}  # batch of a validation step -> the memory of its texts
        self.moe_layers = [m for m in model.modules() if isinstance(m, MoE)]
        self._set_loss_scale(cfg.trainer.global_batch_seqs)
        domains, parts = cfg.model.moe.domains, list(cfg.data.mixture)
        of_part = [domains.index(name) if name in domains else -1 for name in parts] + [-1]  # the last: no part
        self.register_buffer("domain_of_part", torch.tensor(of_part) if domains else None, persistent=False)
        self.val_sums = torch.zeros(4, dtype=torch.float64)  # nats, unigram bits, tokens, bytes
        self.val_part_sums = torch.zeros(len(cfg.data.mixture), 2, dtype=torch.float64)  # nats, tokens of each part
        self.val_unlabelled_nats = torch.zeros((), dtype=torch.float64)
        self.val_objective_sums = torch.zeros(len(objective.metric_names) + 1, dtype=torch.float64)
        self.val_loss: float | None = None  # of this very step
        self.steps_done = 0  # by the weights that are validated without training
        self.skipped_steps = 0  # of the whole run, by trainer.on_nonfinite=skip
        self._rng: dict[str, Any] | None = None

    def _set_loss_scale(self, n_seqs: int) -> None:
        """Weigh the losses that are attached to MoE layers as the mean over the step's micro-batches does.

        Each rank has 1 / dp of the micro-batches; gradients are averaged over dp and summed over tp and ep.

        Args:
            n_seqs: sequences of the step, over all ranks.
        """
        t, d = self.cfg.trainer, degrees(self.cfg)
        for layer in self.moe_layers:
            layer.loss_scale = t.micro_batch_seqs / n_seqs * (d.dp / (d.tp * d.ep))

    def _n_seqs(self, batch: Batch) -> int:
        """Return the sequences of a step, over all ranks."""
        return len(batch.tokens) * degrees(self.cfg).dp

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Do one optimizer step.

        Args:
            batch: this rank's sequences of the step: tokens (sequences, seq + 1) and their parts of the data.
            batch_idx: not used.

        Returns:
            Statistics of the whole step, over all ranks: scalars on the device, loss (nats per token), nats, bytes,
            grad_norm (before clipping) and extra_metrics (by name); expert_counts, what each MoE layer of the blocks
            counted, (experts + COUNTS,) each; lr, the learning rate of the step; and applied, whether weights and
            optimizer have changed.
        """
        self.val_loss = None
        schedule = self.lr_schedulers()
        lr = self.cfg.optim.lr * schedule.lr_lambdas[0](schedule.last_epoch)  # groups may have factors on it
        extra_metrics: dict[str, Tensor] = {}
        if self.rounds is not None:
            batch, sampled = self.rounds.batch_of_step(self, batch)
            extra_metrics = {name: torch.tensor(value, device=self.device) for name, value in sampled.items()}
        n_bytes = self._counted(self.token_bytes[batch.tokens[:, 1:]], batch).sum()
        self.reset_counts()
        n_targets, n_seqs = self._n_targets(batch), self._n_seqs(batch)
        if self.cfg.trainer.batch_ramp_seqs:
            self._set_loss_scale(n_seqs)
        result = self.engine.train(self.micro_batches(batch, n_targets))
        mine = [result.nats, result.mtp_loss, n_bytes, *self._objective_sums(result.sums)]
        (nats, mtp_loss, n_bytes, *sums), counts = self.ranks.sum(mine, self._counts())
        if result.applied:
            self.update_biases()
            if self.cfg.optim.ema_decay:
                update_average(self.engine.optimizer, self.cfg.optim.ema_decay)
        elif self.cfg.trainer.on_nonfinite is OnNonfinite.skip:
            self.skipped_steps += 1
            check_skipped(self.skipped_steps, self.trainer.global_step, self.cfg)
        schedule.step()
        # here, since callbacks save before the module's own batch end
        self.trainer.datamodule.advance(n_seqs)
        loss = nats / n_targets
        if sums:
            means = self._objective_means(sums[0])
            loss = means.pop("loss")
            extra_metrics |= {f"train/{name}": value for name, value in means.items()}
        elif self.cfg.model.n_mtp_layers:
            extra_metrics = {"train/mtp_loss": mtp_loss}
        values = {"loss": loss, "nats": nats, "bytes": n_bytes.clamp(min=1), "grad_norm": result.grad_norm}
        values |= {"extra_metrics": extra_metrics, "expert_counts": self._of_blocks(counts)}
        return {**values, "lr": lr, "applied": result.applied}

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """Return what the model is given of sequences and their parts of the data."""
        domain = None if self.domain_of_part is None else self.domain_of_part[batch.part]
        given = {name: getattr(batch, name) for name in MicroBatch._fields if name in Batch._fields}
        return MicroBatch(**given, domain=domain)

    def micro_batches(self, batch: Batch, n_targets: Tensor | int | None = None) -> list[MicroBatch]:
        """Split a step's sequences into micro-batches.

        Args:
            batch: this rank's sequences.
            n_targets: from `_n_targets`; None outside training.
        """
        t, whole = self.cfg.trainer, self.micro_batch(batch)
        masked = batch.loss_mask is not None and n_targets is not None
        mean_targets = n_targets * t.micro_batch_seqs / self._n_seqs(batch) if masked else None
        n = len(batch.tokens) // t.micro_batch_seqs
        split = [[None] * n if field is None else field.split(t.micro_batch_seqs) for field in whole]
        return [MicroBatch(*fields)._replace(mean_targets=mean_targets) for fields in zip(*split, strict=True)]

    def _objective_sums(self, sums: Tensor | None) -> list[Tensor]:
        """Return the sums of the objective's metrics as a list; empty if it has none."""
        if not self.objective.metric_names:
            return []
        zeros = torch.zeros(len(self.objective.metric_names) + 1, dtype=torch.float64, device=self.device)
        return [zeros if sums is None else sums]  # None on a rank that computes no loss

    def _objective_means(self, sums: Tensor) -> dict[str, Tensor]:
        """Return the objective's metrics by name from the sums over all ranks."""
        *totals, n = sums.unbind()
        return {name: total / n.clamp(min=1) for name, total in zip(self.objective.metric_names, totals, strict=True)}

    def _n_targets(self, batch: Batch) -> Tensor | int:
        """Return how many targets of the whole step count, over all ranks."""
        if batch.loss_mask is None:
            return self._n_seqs(batch) * (batch.tokens.shape[1] - 1)
        (n_targets,), _ = self.ranks.sum([batch.loss_mask.sum()], [])
        return n_targets.clamp(min=1)

    def _counted(self, values: Tensor, batch: Batch) -> Tensor:
        """Return values of the targets, (sequences, seq), with 0 for those that do not count."""
        return values if batch.loss_mask is None else values.masked_fill(~batch.loss_mask, 0)

    def _counts(self) -> list[Tensor]:
        """Return the counts of each MoE layer of this rank since the last reset, each (experts + COUNTS,)."""
        return [layer.counts for layer in self.moe_layers]

    def _of_blocks(self, counts: Sequence[Tensor]) -> list[Tensor]:
        """Return the counts without those of MTP modules, which come last."""
        return list(counts[: len(counts) - self.cfg.model.n_mtp_layers])

    def reset_counts(self) -> None:
        """Reset the token counts of the experts."""
        for layer in self.moe_layers:
            layer.reset_counts()

    def update_biases(self) -> None:
        """Update the biases of the routers from the tokens counted since the last reset."""
        for layer in self.moe_layers:
            layer.update_bias()

    def on_train_start(self) -> None:
        """Apply the configured learning rate and decay, which may differ from those in a checkpoint.

        Raises:
            CheckpointError: the checkpoint, of a version that did not check it, is not finite.
        """
        self.engine.start(self)
        if self.cfg.data.isolate_documents:
            check_isolation(self)
        wrong = self.nonfinite_state() if self.trainer.ckpt_path is not None else None
        if wrong is not None:
            rule = f"holds infinite or NaN numbers in {wrong}: its training had diverged"
            raise CheckpointError(Problem("resume", str(self.trainer.ckpt_path), rule, "name an older checkpoint"))
        schedule, optim = self.lr_schedulers(), self.cfg.optim
        if not optim.ema_decay:
            drop_average(self.engine.optimizer)
        groups = schedule.optimizer.param_groups
        schedule.base_lrs = [optim.lr * group.get("lr_multiplier", 1.0) for group in groups]
        for group, factor, lr in zip(groups, schedule.lr_lambdas, schedule.base_lrs, strict=True):
            group["initial_lr"] = lr
            group["lr"] = lr * factor(schedule.last_epoch)
            group["weight_decay"] = optim.weight_decay if group["decays"] else 0.0

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Restore the random number generators, once after a resume."""
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of the validation and its segment memories."""
        self.val_sums.zero_()
        self.val_part_sums.zero_()
        self.val_unlabelled_nats.zero_()
        self.val_objective_sums.zero_()
        self.val_memories = {}
        self.reset_counts()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one micro-batch to the validation sums. Routing of padded micro-batches is not counted."""
        if self.rounds is not None:
            self.rounds.validation.append(batch)
            return
        lanes = batch_idx % self.trainer.datamodule.batches_per_eval_step if self.cfg.model.memory_len else 0
        is_full = batch.n_counted == len(batch.tokens)
        found = self._evaluate(self.micro_batch(batch), self.val_memories.get(lanes), count_routing=is_full)
        self.val_memories[lanes] = found.memory
        if found.nll is not None:
            self._add(found.nll, batch)
        if found.sums is not None:
            self.val_objective_sums += found.sums.cpu()
        if self.domain_of_part is not None and self.cfg.data.mixture:
            self.evaluate_unlabelled(batch)

    def _evaluate(self, batch: MicroBatch, memory: Tensor | None, *, count_routing: bool) -> Evaluation:
        """Send a micro-batch forward.

        Args:
            batch: the micro-batch.
            memory: from the segment before.
            count_routing: add what the MoE layers count.
        """
        kept = [] if count_routing else [(layer, layer.counts.clone()) for layer in self.moe_layers]
        found = self.engine.evaluate(batch, memory)
        for layer, counts in kept:
            layer.counts.copy_(counts)
        return found

    def nll_without_training(self, batch: MicroBatch) -> Tensor | None:
        """Return each target's nll, (batch, seq), as in validation; None on a rank that does not count the loss."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            nll = self._evaluate(batch, None, count_routing=False).nll
        self.train(was_training)
        return nll

    def evaluate_unlabelled(self, batch: Batch) -> None:
        """Add the loss of a micro-batch whose domains the routers infer; its routing is not counted.

        There is no memory: it needs data.order=contiguous, and a mixture data.order=shuffled.
        """
        unlabelled = self.micro_batch(batch)._replace(domain=torch.full_like(batch.part, -1))
        nll = self._evaluate(unlabelled, None, count_routing=False).nll
        if nll is not None:
            self.val_unlabelled_nats += nll[: batch.n_counted].sum(dtype=torch.float64).cpu()

    def _add(self, nll: Tensor, batch: Batch) -> None:
        nll, targets = nll[: batch.n_counted], batch.tokens[: batch.n_counted, 1:]
        counts = torch.ones_like(targets) if batch.loss_mask is None else batch.loss_mask[: batch.n_counted].long()
        nats = nll.sum(dtype=torch.float64)
        unigram, n_bytes = (self.unigram_bits[targets] * counts).sum(), (self.token_bytes[targets] * counts).sum()
        self.val_sums += torch.stack([nats, unigram, counts.sum(), n_bytes]).cpu()
        if self.cfg.data.mixture:
            by_sequence = nll.sum(1, dtype=torch.float64)  # (sequences,)
            sums = torch.stack([by_sequence, counts.sum(1)], 1)  # (sequences, 2)
            self.val_part_sums.index_add_(0, batch.part[: batch.n_counted].cpu(), sums.cpu())

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics at the current step.

        Loss (nats per token), bits per byte, and the bits per byte of a unigram model on the same tokens; of a mixture
        also the loss of each part, of which the overall loss is the mean by the tokens that each was served with.
        """
        if self.rounds is not None:
            self._log_validation(self.rounds.validation_metrics(self))
            return
        mine = [self.val_sums, self.val_unlabelled_nats, self.val_part_sums]
        values, counts = self.ranks.sum([*mine, *self._objective_sums(self.val_objective_sums)], self._counts())
        sums, unlabelled_nats, part_sums, *objective_sums = (value.cpu() for value in values)
        nats, unigram, tokens, n_bytes = sums.tolist()
        metrics = {
            "val/loss": nats / tokens,
            "val/bits_per_byte": nats / math.log(2) / n_bytes,
            "val/unigram_bits_per_byte": unigram / n_bytes,
        }
        if objective_sums:
            metrics |= {f"val/{name}": float(v) for name, v in self._objective_means(objective_sums[0]).items()}
        for name, (part_nats, part_tokens) in zip(self.cfg.data.mixture, part_sums.tolist(), strict=True):
            if part_tokens:
                metrics[f"val/loss/{name}"] = part_nats / part_tokens
        if unlabelled_nats:
            metrics["val/loss_without_labels"] = float(unlabelled_nats) / tokens
        if expert_counts := self._of_blocks(counts):
            routing = routing_metrics(self.cfg.model.moe, torch.stack(expert_counts))
            metrics |= {f"val/{name}": float(routing[name]) for name in ("max_violation", "utilisation")}
        self._log_validation(metrics)

    def _log_validation(self, metrics: dict[str, float]) -> None:
        self.val_loss = metrics["val/loss"]
        self.log_dict(metrics, logger=False)  # for callbacks; Lightning's own logging counts steps from 0
        self.trainer.logger.log_metrics(metrics, self.trainer.global_step or self.steps_done)

    def nonfinite_state(self) -> str | None:
        """Return the name of a tensor of the weights or the optimizer that is not finite on some rank, None if all are.

        All ranks call it together.
        """
        return self.ranks.first(first_nonfinite(self.state_tensors()))

    def state_bytes(self) -> int:
        """Return about how many bytes this process writes to a checkpoint."""
        return sum(tensor.nbytes for _, tensor in self.state_tensors())

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights and the optimizer state of this process, with their names."""
        return state_tensors(self.model, self.engine.optimizer)

    def configure_optimizers(self) -> Any:
        """Make the optimizer and the per-step schedule."""
        # ZeRO keeps fp32 masters of bf16 weights itself; without it the ranks sum the gradients of the masters.
        several, zero = degrees(self.cfg).world_size > 1, self.cfg.parallel.zero_stage > 0
        kinds = {"masters": not (several and zero), "wide_gradients": several and not zero}
        optimizer = build_optimizer(self.cfg.optim, self.model, self.cfg.kernels.adamw, **kinds)
        factor = schedule_of(self.cfg.optim, self.cfg.trainer.max_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know: random numbers, segment memories, this step's validation loss.

        Raises:
            UserError: something of the state is infinite or NaN.
        """
        check_state(self.nonfinite_state(), self.trainer.global_step, self.cfg)
        memories = {i: m for i, m in self.engine.memories.items() if m is not None}
        checkpoint |= {"rng": rng_state(), "memories": memories, "val_loss": self.val_loss}
        checkpoint |= {"skipped_steps": self.skipped_steps, "finite": True}
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        if frozen and degrees(self.cfg).world_size == 1:  # several ranks save every weight as a parameter
            checkpoint[FROZEN] = frozen
        if self.rounds is not None:
            checkpoint["round"] = self.rounds.state(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added."""
        with readable(Path(self.trainer.ckpt_path)):
            self._rng = checkpoint["rng"]
            self.skipped_steps = int(checkpoint.get("skipped_steps", 0))  # format 2 did not count them
            if self.rounds is not None:
                self.rounds.load(self, checkpoint["round"])
            self.engine.memories = {i: m.to(self.device) for i, m in checkpoint["memories"].items()}


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
