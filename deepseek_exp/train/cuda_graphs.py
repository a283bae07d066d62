"""The forward and backward pass of a micro-batch as a CUDA graph, which the host launches as one.

A pass of a small model is thousands of kernels of a few microseconds each, and the host needs longer to launch them
than the GPU to run them. A graph holds the same kernels with the same arguments, so the results are the same bit for
bit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_exp.errors import Problem, UserError
from deepseek_exp.models import Losses, MicroBatch

# Passes before the recorded one: they compile kernels and fill the tables that later passes share.
WARM_UP = 2

Results = tuple[Losses, dict[nn.Parameter, Tensor]]


@dataclass(frozen=True)
class Recorded:
    """A recorded pass.

    Attributes:
        inputs: what it reads; overwritten before each replay.
        losses: what it writes, with `Losses.loss` divided by the number of micro-batches, as is the next.
        gradients: of each parameter that the loss depends on.
        replay: runs it.
    """

    inputs: MicroBatch
    losses: Losses
    gradients: dict[nn.Parameter, Tensor]
    replay: Callable[[], None]


class CudaGraphs:
    """Does forward passes with their gradients, the first ones as usual and later ones by replaying a graph.

    A graph keeps the memory of its results, so the gradients of a micro-batch are copied if the next one overwrites
    them before the optimizer's step.
    """

    def __init__(self, model: nn.Module, losses_of: Callable[[MicroBatch], Losses]) -> None:
        """Record nothing yet.

        Args:
            model: its parameters that require a gradient are trained, and never move in memory.
            losses_of: the forward pass of a micro-batch.
        """
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.losses_of = losses_of
        self.n_done = 0
        self.recorded: dict[Any, Recorded] = {}

    def __call__(self, batch: MicroBatch, n_micro_batches: int, backward: Callable[[Tensor], None]) -> Losses:
        """Send a micro-batch forward and back; returns its losses, with `Losses.loss` divided by `n_micro_batches`.

        No derivative outlives the call: those of another stream would become part of what is recorded.

        Args:
            batch: the micro-batch.
            n_micro_batches: of the step.
            backward: differentiates the loss; the gradient of the loss itself is 1.

        Raises:
            UserError: the pass waits for the GPU, so it cannot be recorded.
        """
        if self.n_done < WARM_UP:
            self.n_done += 1
            losses = self.losses_of(batch)
            loss, losses = losses.loss / n_micro_batches, losses._replace(loss=losses.loss.detach() / n_micro_batches)
            backward(loss)
            return losses
        key = n_micro_batches, tuple(None if field is None else field.shape for field in batch)
        if key not in self.recorded:
            self.recorded[key] = self._record(batch, n_micro_batches)
        recorded = self.recorded[key]
        for mine, given in zip(recorded.inputs, batch, strict=True):
            if mine is not None:
                mine.copy_(given)
        recorded.replay()
        gradients = list(recorded.gradients.values())
        if n_micro_batches > 1:
            gradients = [g.clone() for g in gradients]
        losses = Losses(*(None if value is None else value.clone() for value in recorded.losses))
        backward(_WithGradients.apply(losses.loss, gradients, *recorded.gradients))
        return losses

    def _record(self, batch: MicroBatch, n_micro_batches: int) -> Recorded:
        inputs = MicroBatch(*(None if field is None else field.clone() for field in batch))

        def run() -> Results:
            losses = self.losses_of(inputs)
            loss = losses.loss / n_micro_batches
            found = zip(self.params, torch.autograd.grad(loss, self.params, allow_unused=True), strict=True)
            return losses._replace(loss=loss.detach()), {p: g for p, g in found if g is not None}

        (losses, gradients), replay = capture(run)
        return Recorded(inputs, losses, gradients, replay)


def capture(run: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
    """Record the kernels of a function without running them; return its results and what runs them.

    Raises:
        UserError: the function waits for the GPU.
    """
    gc.collect()  # an older graph must not be freed while kernels are recorded
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = run()
    except RuntimeError as error:
        first = error.__context__ or error  # leaving the context after an error is another one
        if isinstance(first, torch.OutOfMemoryError):
            raise first from None
        if "captur" not in f"{error} {first}":
            raise
        rule = f"cannot record this model's passes: {str(first).splitlines()[0]}"
        raise UserError(Problem("trainer.cuda_graphs", True, rule, "set trainer.cuda_graphs=false")) from error
    return results, graph.replay


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients have been computed, so that autograd accumulates them and calls the parameters' hooks."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None, *ctx.gradients
