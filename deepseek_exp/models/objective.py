"""What a model is trained on: from a micro-batch to the loss that is differentiated.

`NextTokenObjective` is pretraining. Another kind of training is another class with the same two methods; nothing else
decides what the loss is.

Shapes: batch (sequences of a micro-batch), seq (targets of each), d_model.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_exp.models.transformer import Loss, Transformer


class MicroBatch(NamedTuple):
    """The sequences that go through the model together.

    Attributes:
        tokens: (batch, seq + 1) int64, the inputs and the last target.
        domain: (batch,) int64, index of each sequence's domain in moe.domains, -1 if it is unknown. None if the model
            has no domains.
    """

    tokens: Tensor
    domain: Tensor | None


class Losses(NamedTuple):
    """The losses of a micro-batch.

    Attributes:
        loss: the training loss, a scalar to differentiate.
        nll: (batch, seq), nats of each next token, without gradient.
        mtp_loss: mean multi-token prediction loss, a scalar without gradient. 0 without such modules and in validation.
        memory: what the next segment of the same texts attends to, (n_layers, batch, n_memory, d_model). None if the
            model has no memory.
    """

    loss: Tensor
    nll: Tensor
    mtp_loss: Tensor
    memory: Tensor | None = None


class Objective(Protocol):
    """Computes the losses of a micro-batch."""

    def from_tokens(self, model: Transformer, batch: MicroBatch, memory: Tensor | None = None) -> Losses:
        """Return the losses of a micro-batch that goes through the whole model.

        Args:
            model: the whole model.
            batch: the micro-batch.
            memory: (n_layers, batch, n_memory, d_model), from the segment before; None at the start of the texts.
        """
        ...

    def from_hidden(self, model: Transformer, h: Tensor, batch: MicroBatch) -> Losses:
        """Return the losses of a micro-batch that has gone through all blocks, on the last stage of a pipeline.

        Args:
            model: the part of the model on the last stage: the head, and all that predicts tokens further ahead.
            h: (batch, seq, d_model), the output of the last block.
            batch: the micro-batch.
        """
        ...


class NextTokenObjective:
    """Predict each next token, and with multi-token prediction the tokens after it.

    loss = mean nll of the next tokens + mtp_loss_weight * mean loss over the depths of multi-token prediction. Source:
    DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.2.
    """

    def __init__(self, mtp_loss_weight: float) -> None:
        """Set the weight of the multi-token prediction loss, model.mtp_loss_weight."""
        self.mtp_loss_weight = mtp_loss_weight

    def from_tokens(self, model: Transformer, batch: MicroBatch, memory: Tensor | None = None) -> Losses:
        """Return the losses of a micro-batch that goes through the whole model; see `Objective`."""
        if not model.cfg.memory_len:
            (mean, nll), ahead = model.losses(batch.tokens, batch.domain)
        else:
            memory = model.empty_memory(len(batch.tokens)) if memory is None else memory
            (mean, nll), ahead, memory = model.segment_losses(batch.tokens, memory, batch.domain)
        return Losses(*self.weigh(mean, nll, ahead), memory)

    def from_hidden(self, model: Transformer, h: Tensor, batch: MicroBatch) -> Losses:
        """Return the losses of a micro-batch that has gone through all blocks; see `Objective`."""
        (mean, nll), ahead = model.losses_of(h, batch.tokens, batch.domain)
        return Losses(*self.weigh(mean, nll, ahead))

    def weigh(self, mean: Tensor, nll: Tensor, ahead: list[Loss]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the training loss, the nll and the multi-token prediction loss.

        Args:
            mean: mean nll of the next tokens, a scalar.
            nll: (batch, seq), of each next token.
            ahead: losses of the depths of multi-token prediction.
        """
        if not ahead:
            return mean, nll, mean.detach().new_zeros(())
        mtp_loss = torch.stack([depth_mean for depth_mean, _ in ahead]).mean()
        return mean + self.mtp_loss_weight * mtp_loss, nll, mtp_loss.detach()
