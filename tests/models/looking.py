"""What a loss is made from, for tests that look at logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deepseek_exp.models import Transformer


def logits_ahead(model: Transformer, tokens: Tensor, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """Give the logits that `Transformer.losses` compares with the next tokens, and with those further ahead."""
    return _looking(model, model.losses, tokens, *args)


def segment_logits(model: Transformer, tokens: Tensor, memory: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Give the same of `Transformer.segment_losses`, and the memory."""
    return _looking(model, model.segment_losses, tokens, memory)


def _looking(model: Transformer, losses: Any, *args: Any) -> Any:
    ops, training = model.head.ops, model.training
    model.head.ops = dataclasses.replace(ops, linear_cross_entropy=lambda h, weight, *_: F.linear(h, weight))
    model.train()  # only then something is looked at ahead
    try:
        return losses(*args)
    finally:
        model.head.ops = ops
        model.train(training)
