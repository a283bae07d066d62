"""The engine of a single process; those of several ranks are in parallel/engines.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.models import Losses, MicroBatch, Objective, Transformer
from deepseek_exp.parallel.engines import Evaluation, LossSums, StepResult, may_apply
from deepseek_exp.train.cuda_graphs import CudaGraphs
from deepseek_exp.train.finite import first_nonfinite
from deepseek_exp.train.optim import clip_gradients


class LocalEngine:
    """The whole model in one process.

    Attributes:
        optimizer: torch's; None before training starts.
        memories: index of a micro-batch in the step -> what its next segment attends to; None without such a memory.
    """

    def __init__(self, exp: ExperimentConfig, model: Transformer, objective: Objective) -> None:
        """Remember the parts.

        Args:
            exp: the experiment.
            model: the whole model.
            objective: computes the losses.
        """
        self.exp, self.model, self.objective = exp, model, objective
        self.optimizer: Any = None
        self.memories: dict[int, Tensor | None] = {}
        self.graphs: CudaGraphs | None = None

    def start(self, module: pl.LightningModule) -> None:
        """Have Lightning run each backward pass and step, so that it counts steps and calls its hooks."""
        lightning_optimizer = module.optimizers()
        self.optimizer = lightning_optimizer.optimizer
        self._step, self._backward = lightning_optimizer.step, module.manual_backward
        if self.exp.trainer.cuda_graphs:
            self.graphs = CudaGraphs(self.model, lambda batch: self.objective.from_tokens(self.model, batch))

    def train(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Do one optimizer step: accumulate the gradients of all micro-batches, clip them, and apply them."""
        sums = LossSums(len(micro_batches), micro_batches[0].tokens.device)
        for i, batch in enumerate(micro_batches):
            losses = self._forward_and_back(batch, i, len(micro_batches))
            sums.add(losses)
            self.memories[i] = losses.memory
        grad_norm = clip_gradients(self.optimizer, self.exp.optim.clip_norm)
        applied = may_apply(grad_norm, self.exp)
        if not applied:
            self.optimizer.zero_grad()  # The step is still counted, and changes nothing.
            self._forget_nonfinite_memories()
        self._step()
        self.optimizer.zero_grad()
        return StepResult(sums.nats, sums.mtp_loss, grad_norm, applied, sums.sums)

    def _forward_and_back(self, batch: MicroBatch, index: int, n_micro_batches: int) -> Losses:
        """Accumulate the gradients of a micro-batch of the step; returns its losses."""
        if self.graphs is not None:
            return self.graphs(batch, n_micro_batches, self._backward)
        losses = self.objective.from_tokens(self.model, batch, self.memories.get(index))
        self._backward(losses.loss / n_micro_batches)
        return losses

    def evaluate(self, batch: MicroBatch, memory: Tensor | None = None) -> Evaluation:
        """Send one micro-batch forward; see `Engine`."""
        losses = self.objective.from_tokens(self.model, batch, memory)
        return Evaluation(losses.nll, losses.memory, losses.sums)

    def _forget_nonfinite_memories(self) -> None:
        """Start the texts over whose memory the forward pass of a skipped step has made infinite or NaN."""
        for i, memory in self.memories.items():
            if memory is not None and first_nonfinite([("memory", memory)]) is not None:
                self.memories[i] = None
