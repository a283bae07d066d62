"""Group-relative policy optimization: raise the probability of completions that are better than others of their prompt.

Shapes: batch (sequences of a micro-batch), seq (targets of each), d_model, groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_exp.config import GRPOConfig
from deepseek_exp.finetune.log_probs import loss_through_head
from deepseek_exp.models import Losses, MicroBatch, Transformer


def advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Return reward - mean reward of the group, (sequences,), without dividing by the standard deviation.

    Dividing would weigh prompts that are nearly always or never solved more. Source: Liu et al. 2025, "Understanding
    R1-Zero-Like Training", section 3.2 (Dr. GRPO).

    Args:
        rewards: (sequences,), groups one after the other.
        group_size: completions of each group.
    """
    groups = rewards.unflatten(0, (-1, group_size))  # (groups, group_size)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def informative(rewards: Tensor, group_size: int) -> Tensor:
    """Return which completions are in a group whose rewards differ, (sequences,) bool; the others have no gradient.

    Source: Yu et al. 2025, "DAPO", section 3.2.
    """
    groups = rewards.unflatten(0, (-1, group_size))  # (groups, group_size)
    return (groups != groups[:, :1]).any(1).repeat_interleave(group_size)


class PolicyObjective:
    """The clipped policy loss, the mean over all counted tokens of the step.

    With the probability ratio r = exp(log p - log p_old) of a token, and the advantage A of its completion:

        loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_beta (q - log q - 1),  q = p_ref / p

    Sources: Shao et al. 2024, "DeepSeekMath", section 4.1 (and equation 4, the estimate of the KL divergence); Yu et
    al. 2025, "DAPO", sections 3.1 (the upper bound is higher) and 3.3 (the mean is over tokens, not over sequences).
    """

    metric_names = ("loss", "clip_fraction", "kl")

    def __init__(self, cfg: GRPOConfig) -> None:
        """Set clip bounds, temperature and the weight of the KL divergence."""
        self.cfg = cfg

    def from_tokens(self, model: Transformer, batch: MicroBatch, memory: Tensor | None = None) -> Losses:
        """Return the losses of a micro-batch that goes through the whole model; see `Objective`."""
        return self.from_hidden(model, model.hidden(batch.tokens[:, :-1], None, batch.domain), batch)

    def from_hidden(self, model: Transformer, h: Tensor, batch: MicroBatch) -> Losses:
        """Return the losses of a micro-batch that has gone through all blocks; see `Objective`.

        Without `old_log_probs` the weights are those that sampled.
        """
        mask = batch.loss_mask
        assert mask is not None, "sampled completions have a mask"

        def loss_of(log_probs: Tensor) -> tuple[Tensor, Tensor]:
            advantage = log_probs.new_zeros(len(mask)) if batch.advantage is None else batch.advantage
            old = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
            loss, clipped = clipped_loss(log_probs, old, advantage[:, None], self.cfg.clip_low, self.cfg.clip_high)
            kl = torch.zeros_like(loss)
            if batch.reference_log_probs is not None:
                ahead = batch.reference_log_probs - log_probs
                kl = ahead.exp() - ahead - 1
                loss = loss + self.cfg.kl_beta * kl
            n = mask.sum().clamp(min=1) if batch.mean_targets is None else batch.mean_targets
            sums = torch.stack([(each.detach().double() * mask).sum() for each in (loss, clipped, kl, mask)])
            return (loss * mask).sum() / n, sums

        h = model.head.norm(h) / self.cfg.temperature
        loss, sums, log_probs = loss_through_head(model.head, h, batch.tokens[:, 1:], loss_of)
        nll = (-log_probs).masked_fill(~mask, 0)
        return Losses(loss.float(), nll, sums.new_zeros(()), None, sums)


def clipped_loss(
    log_probs: Tensor, old: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped policy loss of tokens, and which of them the clip leaves without gradient.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7, with two bounds.

    Args:
        log_probs: (..., seq), differentiable.
        old: the same shape, under the weights that sampled.
        advantage: (..., 1), of each completion.
        clip_low: lower bound of the ratio is 1 - this.
        clip_high: upper bound of the ratio is 1 + this.
    """
    ratio = (log_probs - old).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    return -gain, (bounded * advantage < ratio * advantage).to(log_probs.dtype)
