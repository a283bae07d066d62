"""The Lightning module of one rank of several: it has a part of the model, and shares what it counts.

Shapes: sequences, seq (targets), d_model.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.data import Batch
from deepseek_exp.parallel.engines import StepResult
from deepseek_exp.parallel.groups import Groups
from deepseek_exp.parallel.partition import ModelShard
from deepseek_exp.planner import bubble_fraction
from deepseek_exp.train.finite import first_nonfinite
from deepseek_exp.train.lit import LanguageModel, state_tensors
from deepseek_exp.train.optim import build_optimizer


class StageModel(LanguageModel):
    """Training and validation of a model in parts; `DeepSpeed3DStrategy` moves data through them."""

    def __init__(
        self, cfg: ExperimentConfig, shard: ModelShard, groups: Groups, token_bytes: Tensor, unigram_bits: Tensor
    ) -> None:
        """Wrap what this rank holds of a model.

        Args:
            cfg: the experiment.
            shard: what this rank holds.
            groups: its groups.
            token_bytes: as for `LanguageModel`, as is the next.
            unigram_bits: of each token.
        """
        super().__init__(cfg, shard.model, token_bytes, unigram_bits)
        self.shard, self.groups, d = shard, groups, groups.degrees
        self.is_counting = groups.is_last and groups.at.tp == 0  # of the ranks that see the same loss one counts it
        for layer in self.moe_layers:
            # fewer micro batches on each rank; gradients are averaged over dp, summed over tp and ep
            layer.loss_scale *= d.dp / (d.tp * d.ep)
        self.counts: Tensor | None = None
        self._add_to: Callable[[Tensor], None] | None = None

    def do_step(self, optimizer: Any, micro_batches: list[Batch]) -> StepResult:
        """Let the strategy do it."""
        return self.trainer.strategy.train(micro_batches, optimizer)

    def forward_only(self, batch: Batch, add: Callable[[Tensor, Batch], None]) -> None:
        """Send a micro batch through the stages; the last one hands over its nll."""
        self._add_to = lambda nll: add(nll, batch) if self.is_counting else None
        self.trainer.strategy.evaluate(batch)

    def stage_loss(self, h: Tensor, batch: Batch) -> Tensor:
        """Give the loss of what the last block gives, and count it.

        Args:
            h: (sequences, seq, d_model).
            batch: the micro batch.

        Returns:
            A scalar, in training divided by ep (see engines.py).
        """
        tokens = batch.tokens
        (mean, nll), ahead = self.model.losses_of(h, tokens, self.domain(batch.part))
        if not self.model.training:
            self._add_to(nll)
            return mean
        loss, mtp_loss = self.weigh(mean, ahead)
        self.nats += nll.sum()
        self.mtp_loss += mtp_loss.detach() * len(tokens) / self.cfg.trainer.global_batch_seqs
        return loss / self.groups.degrees.ep

    def share_step(self) -> None:
        """Sum over the data-parallel ranks, and hand what the last stage counted to all."""
        sums = torch.stack([self.nats.double(), self.mtp_loss.double(), self.bytes.double()])
        self.nats, self.mtp_loss, self.bytes = self._share(sums).unbind(0)

    def share_validation(self) -> None:
        """Do as `share_step` does."""
        sums = torch.cat([self.val_sums, self.val_unlabelled_nats[None], self.val_part_sums.flatten()])
        sums = self._share(sums.to(self.groups.device)).cpu()
        self.val_sums, self.val_unlabelled_nats = sums[:4], sums[4]
        self.val_part_sums = sums[5:].view_as(self.val_part_sums)

    def routed_counts(self) -> Tensor | None:
        """Give what the mixtures of experts of the blocks of all stages counted."""
        return None if self.counts is None else self.counts[: len(self.counts) - self.cfg.model.n_mtp_layers]

    def agree(self, value: int) -> int:
        """Give the largest of all ranks' values."""
        return self.groups.largest(value)

    def nonfinite_state(self) -> str | None:
        """Return what the first rank finds that has something not finite."""
        mine = first_nonfinite(self.state_tensors())
        return next((name for name in self.groups.gather(mine) if name is not None), None)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """List what this rank has of the weights and the optimizer's state, with what to call it."""
        return state_tensors(self.model, self.trainer.strategy.engine.optimizer)

    def mean(self, values: list[Tensor]) -> float | None:
        """Average the elements of all ranks' tensors."""
        flat = torch.cat([v.detach().double().flatten().cpu() for v in values] or [torch.zeros(0)])
        total, n = map(sum, zip(*self.groups.gather((flat.sum().item(), len(flat))), strict=True))
        return total / n if n else None

    def layout_metrics(self) -> dict[str, float]:
        """Give the peak memory of each stage's fullest rank, and the pipeline's bubble."""
        peaks: dict[int, int] = {}
        for stage, peak in self.groups.gather((self.groups.at.pp, _peak_memory(self.groups.device))):
            peaks[stage] = max(peak, peaks.get(stage, 0))
        d, t = self.groups.degrees, self.cfg.trainer
        n_micro_batches = t.global_batch_seqs // (t.micro_batch_seqs * d.dp)
        values = {f"parallel/peak_memory_bytes/{stage}": float(peak) for stage, peak in sorted(peaks.items())}
        return values | {"parallel/bubble_fraction": bubble_fraction(d.pp, n_micro_batches)}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer; ZeRO gives it fp32 masters to work on where the weights are bf16."""
        alone = self.cfg.parallel.zero_stage == 0
        return build_optimizer(self.cfg.optim, self.model, self.cfg.kernels.adamw, masters=alone, wide_gradients=alone)

    def _share(self, sums: Tensor) -> Tensor:
        """Sum the last stages' values over dp, and with them the counts of all mixtures of experts, in one exchange."""
        if not self.is_counting:
            sums = torch.zeros_like(sums)
        counts = sums.new_zeros(self.shard.n_moe_layers, self.shard.counts_width)
        first = self.shard.first_moe_layer
        if self.moe_layers and self.groups.at.tp == 0:
            counts[first : first + len(self.moe_layers)] = torch.stack([layer.counts for layer in self.moe_layers])
        everything = self.groups.sum(torch.cat([sums, counts.flatten()]))
        if self.shard.n_moe_layers:
            self.counts = everything[len(sums) :].view_as(counts)
            for layer, row in zip(self.moe_layers, self.counts[first:], strict=False):
                layer.counts.copy_(row)
        return everything[: len(sums)]


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
