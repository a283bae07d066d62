"""Rounds of reinforcement learning: completions are sampled, then trained on for one or more optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.data import Batch
from deepseek_exp.finetune.rollouts import Rollouts
from deepseek_exp.models import Transformer

# The fields of a batch that sampling fills, which a checkpoint inside a round holds.
FILLED = ("tokens", "loss_mask", "advantage", "old_log_probs", "reference_log_probs")


class PolicyRounds:
    """What the Lightning module, `LanguageModel`, does in addition to train on completions that it samples itself."""

    def __init__(self, exp: ExperimentConfig, rollouts: Rollouts, reference: Transformer | None) -> None:
        """Start without completions.

        Args:
            exp: the experiment.
            rollouts: samples and scores.
            reference: model of the KL divergence; None without one.
        """
        self.exp, self.rollouts, self.reference = exp, rollouts, reference
        self.batch: Batch | None = None  # of the current round
        self.validation: list[Batch] = []

    def batch_of_step(self, lit: Any, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """Return the sequences of a step, newly sampled at the first step of a round, and then also the metrics.

        Args:
            lit: the module that trains.
            batch: this rank's prompts.
        """
        if self.batch is not None and self._step_of_round(lit):
            return self.batch, {}
        reference_of = None if self.reference is None else lambda filled: self._reference(lit, filled)
        first = lit.trainer.datamodule.first_row
        found = self.rollouts.sample(lit.model, batch, first, lambda filled: _log_probs(lit, filled), reference_of)
        self.batch = found.batch
        return found.batch, self.rollouts.metrics(lit.ranks.gather(found.statistics))

    def validation_metrics(self, lit: Any) -> dict[str, float]:
        """Sample for the prompts of the validation, and return its metrics over all ranks."""
        found = self.rollouts.validate(lit.model, self.validation)
        self.validation = []
        reward, full, n = map(sum, zip(*lit.ranks.gather(found), strict=True))
        return {"val/loss": -reward / n, "val/reward": reward / n, "val/pass_at_1": full / n}

    def state(self, lit: Any) -> dict[str, Tensor] | None:
        """Return the completions of all ranks if the next step trains on them too, else None."""
        if self.batch is None or not self._step_of_round(lit):
            return None
        filled = {name: getattr(self.batch, name) for name in FILLED}
        mine = {name: value.cpu() for name, value in filled.items() if value is not None}
        every = lit.ranks.gather(mine)
        return {name: torch.cat([each[name] for each in every]) for name in mine}

    def load(self, lit: Any, state: dict[str, Tensor] | None) -> None:
        """Restore the result of `state`."""
        if state is not None:
            tokens = lit.trainer.datamodule.own_rows(state["tokens"])
            self.batch = Batch(tokens.to(lit.device), torch.full((len(tokens),), -1, device=lit.device), len(tokens))
            rest = {name: lit.trainer.datamodule.own_rows(value).to(lit.device) for name, value in state.items()}
            self.batch = self.batch._replace(**rest)

    def _step_of_round(self, lit: Any) -> int:
        n_rows = self.exp.trainer.global_batch_seqs
        return int(lit.trainer.datamodule.position) // n_rows % self.exp.grpo.iterations

    @torch.no_grad()
    def _reference(self, lit: Any, batch: Batch) -> Tensor:
        found: Sequence[Any] = [lit.objective.from_tokens(self.reference, part) for part in lit.micro_batches(batch)]
        return torch.cat([-losses.nll for losses in found])


@torch.no_grad()
def _log_probs(lit: Any, batch: Batch) -> Tensor:
    """Return the log-probability of each counted target by the trainer's forward pass, (sequences, seq)."""
    found = [lit.engine.evaluate(part).nll for part in lit.micro_batches(batch)]
    return torch.cat([-nll for nll in found])
