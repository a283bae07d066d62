"""Guards against infinities and NaN in a training: the checks of every step and of all that is saved."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from deepseek_exp.config import ExperimentConfig, OnNonfinite
from deepseek_exp.data import Batch
from deepseek_exp.errors import Problem, UserError

# Steps that a GPU may be behind the host before the host waits for the oldest. While it waits, the GPU has a whole step
# left to do. The number is fixed so that all ranks find a non-finite step at the same point of their program.
LAG = 2


class FiniteSteps(Callback):
    """Checks the loss and the gradient norm of every step that was not skipped, and ends the run if one is not finite.

    On a GPU both are copied to the host asynchronously, after the step's work, and checked `LAG` steps later.
    """

    def __init__(self, cfg: ExperimentConfig) -> None:
        self.cfg = cfg
        self._pending: deque[tuple[int, Tensor, Any]] = deque()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Start to copy this step's numbers, and check those of the step `LAG` steps earlier."""
        if outputs["applied"] or self.cfg.trainer.on_nonfinite is OnNonfinite.stop:
            pair = torch.stack([outputs["loss"].double(), outputs["grad_norm"].double()])
            self._pending.append((trainer.global_step, *to_host(pair)))
        self._check(LAG if pl_module.device.type == "cuda" else 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the remaining steps."""
        self.check_all()

    def check_all(self) -> None:
        """Wait for the numbers of all steps so far, and check them.

        Raises:
            UserError: the first step that is not finite.
        """
        self._check(0)

    def _check(self, lag: int) -> None:
        while len(self._pending) > lag:
            step, pair, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            for what, value in zip(("train/loss", "optim/grad_norm"), pair.tolist(), strict=True):
                check_finite(what, value, step, self.cfg)


def check_finite(what: str, value: float, step: int, cfg: ExperimentConfig) -> None:
    """Raise if a number of a step is infinite or NaN.

    Raises:
        UserError: it is.
    """
    if not math.isfinite(value):
        fix = "lower optim.lr or lengthen optim.warmup_steps"
        if cfg.trainer.on_nonfinite is OnNonfinite.stop:
            fix += ", or skip such steps with trainer.on_nonfinite=skip"
        raise UserError(Problem(what, value, f"is not finite at step {step} (optim.lr={cfg.optim.lr})", fix))


def check_state(wrong: str | None, step: int, cfg: ExperimentConfig) -> None:
    """Raise if something in a state to be saved is not finite.

    Args:
        wrong: what is not finite, such as the name of a weight; None if everything is finite.
        step: optimizer steps done.
        cfg: the experiment.

    Raises:
        UserError: something is not finite.
    """
    if wrong is not None:
        rule = f"made {wrong} infinite or NaN by step {step}, which is not saved"
        fix = "resume from an older checkpoint with a lower optim.lr"
        raise UserError(Problem("optim.lr", cfg.optim.lr, rule, fix))


def check_skipped(n_skipped: int, step: int, cfg: ExperimentConfig) -> None:
    """Raise if more steps were skipped than are allowed.

    Raises:
        UserError: there are more.
    """
    most = cfg.trainer.max_skipped_steps
    if n_skipped > most:
        rule = f"is exceeded: with step {step}, {n_skipped} steps of the run had an infinite or NaN gradient"
        fix = "lower optim.lr, look at the data, or raise trainer.max_skipped_steps"
        raise UserError(Problem("trainer.max_skipped_steps", most, rule, fix))


@torch.no_grad()
def first_nonfinite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds an infinity or NaN; None if there is none.

    The device checks all of them before the host waits for it, once.
    """
    names, largest = [], []
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.numel():
            names.append(name)
            largest.append(torch.linalg.vector_norm(tensor, torch.inf).float())
    if not names:
        return None
    where = max((x.device for x in largest), key=lambda device: device.type == "cuda")
    is_finite = torch.stack([x.to(where) for x in largest]).isfinite().tolist()
    return next((name for name, ok in zip(names, is_finite, strict=True) if not ok), None)


def to_host(values: Tensor) -> tuple[Tensor, Any]:
    """Start copying values to the host; return the copy and an event that marks its end (None if it has ended)."""
    if values.device.type != "cuda":
        return values, None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
