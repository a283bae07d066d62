"""Losses that are functions of token log-probabilities, without ever holding the logits of all tokens.

Shapes: batch (sequences of a micro-batch), seq (targets of each), d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Head(Protocol):
    """The output head of a model, whole or sharded over the vocabulary."""

    def loss(self, h: Tensor, targets: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean nll, or the sum weighted by `token_weights`, and the nll of each target."""
        ...


def loss_through_head(
    head: Head, h: Tensor, targets: Tensor, loss_of: Callable[[Tensor], tuple[Tensor, T]]
) -> tuple[Tensor, T, Tensor]:
    """Return a loss L(log p) of the targets' log-probabilities that is differentiable down to h and the head.

    The head's operation differentiates a sum of nll with fixed weights only. So it runs twice: once without gradient
    for log p, and once for sum of w nll with w = -dL/dlog p, whose gradient is that of L by the chain rule. Of the
    logits it holds what one pass of pre-training does.

    Args:
        head: the output head.
        h: (batch, seq, d_model), normalised.
        targets: (batch, seq), int64.
        loss_of: maps log p, (batch, seq) in nats, to the loss, a scalar, and anything else, which is returned.

    Returns:
        The loss, what else `loss_of` returned, and log p without gradient.
    """
    with torch.no_grad():
        log_probs = -head.loss(h, targets)[1]
    if not torch.is_grad_enabled():
        return *loss_of(log_probs), log_probs
    leaf = log_probs.detach().requires_grad_()
    loss, found = loss_of(leaf)
    (slope,) = torch.autograd.grad(loss, leaf)  # (batch, seq)
    weighted, _ = head.loss(h, targets, -slope)
    return weighted + (loss - weighted).detach(), found, log_probs


def completion_log_probs(log_probs: Tensor, loss_mask: Tensor) -> Tensor:
    """Return the log-probability of each sequence's completion: the sum over its counted targets, (batch,), float64.

    Args:
        log_probs: (batch, seq), of each target.
        loss_mask: (batch, seq) bool, the targets of the completion.
    """
    return (log_probs.double() * loss_mask).sum(1)
