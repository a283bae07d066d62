"""Early stopping: end a run whose validation loss no longer falls."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from deepseek_exp.config import ExperimentConfig


class Patience(Callback):
    """Ends the training after trainer.patience validations in a row without a new best val/loss.

    A validation is a new best if its loss is lower than the best so far by more than trainer.min_delta. The count is
    saved in the checkpoints. All ranks have the same loss and decide alike.

    Attributes:
        best: lowest val/loss so far, by the rule above; infinite before the first validation.
        best_step: its step.
        improved: whether the latest validation is the best.
    """

    def __init__(self, cfg: ExperimentConfig) -> None:
        self.patience, self.min_delta = cfg.trainer.patience, cfg.trainer.min_delta
        self.best, self.best_step, self.n_waited = math.inf, 0, 0
        self.improved = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count a validation, and ask for the end of the training."""
        if trainer.state.fn != "fit":
            return
        loss = float(pl_module.val_loss)
        self.improved = loss < self.best - self.min_delta
        if self.improved:
            self.best, self.best_step, self.n_waited = loss, trainer.global_step, 0
            return
        self.n_waited += 1
        if self.n_waited >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return the best and the count; nothing before the first validation."""
        if math.isinf(self.best):
            return {}
        return {"best": self.best, "best_step": self.best_step, "n_waited": self.n_waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.n_waited = state_dict["n_waited"]
