"""Preference training: raise the probability of chosen over rejected completions, without a reward model.

A micro-batch holds whole pairs: the chosen completion of a pair in an even row, the rejected one in the row after it.

Shapes: batch (sequences of a micro-batch), seq (targets of each), d_model, pairs (batch / 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_exp.config import DPOConfig
from deepseek_exp.finetune.log_probs import completion_log_probs, loss_through_head
from deepseek_exp.finetune.preference_loss import accuracy, preference_loss
from deepseek_exp.models import Losses, MicroBatch, Transformer


class PreferenceObjective:
    """The mean loss of pairs; see `preference_loss`.

    Attributes:
        metric_names: what `Losses.sums` holds, summed over the pairs that count, whose number comes last.
    """

    metric_names = ("loss", "preference_accuracy", "reward_margin", "chosen_reward", "rejected_reward")

    def __init__(self, cfg: DPOConfig) -> None:
        """Set the loss and its parameters."""
        self.cfg = cfg

    def from_tokens(self, model: Transformer, batch: MicroBatch, memory: Tensor | None = None) -> Losses:
        """Return the losses of a micro-batch that goes through the whole model; see `Objective`."""
        return self.from_hidden(model, model.hidden(batch.tokens[:, :-1], None, batch.domain), batch)

    def from_hidden(self, model: Transformer, h: Tensor, batch: MicroBatch) -> Losses:
        """Return the losses of a micro-batch that has gone through all blocks; see `Objective`.

        A pair with an empty completion, which only pads a validation, does not count.
        """
        mask, reference = batch.loss_mask, batch.reference
        assert mask is not None, "preference data has masks"
        pairs = None if reference is None else reference.unflatten(0, (-1, 2))  # (pairs, 2)
        n_tokens = mask.sum(1).unflatten(0, (-1, 2))  # (pairs, 2)
        counts = (n_tokens > 0).all(1)  # (pairs,)

        def loss_of(log_probs: Tensor) -> tuple[Tensor, Tensor]:
            policy = completion_log_probs(log_probs, mask).unflatten(0, (-1, 2))  # (pairs, 2)
            found = preference_loss(self.cfg, policy, pairs, n_tokens.clamp(min=1))
            chosen, rejected = found.rewards.unbind(1)
            each = [found.loss.detach(), accuracy(found.rewards), chosen - rejected, chosen, rejected]
            sums = torch.stack([*each, torch.ones_like(chosen)]) * counts  # (metrics + 1, pairs)
            return (found.loss * counts).sum() / counts.sum().clamp(min=1), sums.sum(1)

        h = model.head.norm(h)
        loss, sums, log_probs = loss_through_head(model.head, h, batch.tokens[:, 1:], loss_of)
        return Losses(loss.float(), (-log_probs).masked_fill(~mask, 0), sums.new_zeros(()), None, sums)
