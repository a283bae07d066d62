"""What a model is trained on: from a micro-batch to the loss that is differentiated.

`NextTokenObjective` is pretraining. Another kind of training is another class with the same two methods; nothing else
decides what the loss is.

Shapes: batch (sequences of a micro-batch), seq (targets of each), d_model.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_exp.models.transformer import Counted, Loss, Transformer


class MicroBatch(NamedTuple):
    """The sequences that go through the model together.

    Attributes:
        tokens: (batch, seq + 1) int64, the inputs and the last target.
        domain: (batch,) int64, index of each sequence's domain in moe.domains, -1 if it is unknown. None if the model
            has no domains.
        loss_mask: (batch, seq) bool, whether each target, tokens[:, 1:], counts. None if all do.
        document: (batch, seq) int32, the document of each input, tokens[:, :-1], if several share a sequence and do not
            see each other; those of a document are adjacent. The first token of a document is no target that counts.
            None if a sequence is one document.
        mean_targets: mean number of targets that count per micro-batch of the step, over all ranks, a scalar. None
            without a mask, and outside training.
        reference: (batch,) float64, log-probability of each completion under the reference of preference training.
        advantage: (batch,), of each sampled completion, in reinforcement learning.
        old_log_probs: (batch, seq), log-probability of each target under the weights that sampled it.
        reference_log_probs: (batch, seq), the same under the reference of the KL divergence.
    """

    tokens: Tensor
    domain: Tensor | None
    loss_mask: Tensor | None = None
    document: Tensor | None = None
    mean_targets: Tensor | None = None
    reference: Tensor | None = None
    advantage: Tensor | None = None
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None

    @property
    def counted(self) -> Counted | None:
        """The targets that count; None if all do."""
        return None if self.loss_mask is None else Counted(self.loss_mask, self.mean_targets)


class Losses(NamedTuple):
    """The losses of a micro-batch.

    Attributes:
        loss: the training loss, a scalar to differentiate. The loss of a step is its mean over all micro-batches.
        nll: (batch, seq), nats of each next token, without gradient; 0 if it does not count.
        mtp_loss: mean multi-token prediction loss, a scalar without gradient. 0 without such modules and in validation.
        memory: what the next segment of the same texts attends to, (n_layers, batch, n_memory, d_model). None if the
            model has no memory.
        sums: (metrics + 1,), the objective's metrics, each summed over what it counts, and the number of these. None if
            it has none.
    """

    loss: Tensor
    nll: Tensor
    mtp_loss: Tensor
    memory: Tensor | None = None
    sums: Tensor | None = None


class Objective(Protocol):
    """Computes the losses of a micro-batch.

    Attributes:
        metric_names: what `Losses.sums` holds, loss first; empty if the loss is the mean nll of the targets.
    """

    metric_names: tuple[str, ...]

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

    With a loss mask the mean is over the targets of the whole step that count, so that it does not depend on how rows
    are split into micro-batches and ranks. That is supervised fine-tuning, if the mask chooses the responses.
    """

    metric_names: tuple[str, ...] = ()

    def __init__(self, mtp_loss_weight: float) -> None:
        """Set the weight of the multi-token prediction loss, model.mtp_loss_weight."""
        self.mtp_loss_weight = mtp_loss_weight

    def from_tokens(self, model: Transformer, batch: MicroBatch, memory: Tensor | None = None) -> Losses:
        """Return the losses of a micro-batch that goes through the whole model; see `Objective`."""
        if not model.cfg.memory_len:
            (mean, nll), ahead = model.losses(batch.tokens, batch.domain, batch.counted, batch.document)
        else:
            memory = model.empty_memory(len(batch.tokens)) if memory is None else memory
            (mean, nll), ahead, memory = model.segment_losses(batch.tokens, memory, batch.domain)
        return Losses(*self.weigh(mean, nll, ahead), memory)

    def from_hidden(self, model: Transformer, h: Tensor, batch: MicroBatch) -> Losses:
        """Return the losses of a micro-batch that has gone through all blocks; see `Objective`."""
        (mean, nll), ahead = model.losses_of(h, batch.tokens, batch.domain, batch.counted, batch.document)
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
