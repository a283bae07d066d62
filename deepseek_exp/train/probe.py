"""Measure how long a step takes: one micro-batch is run before the training starts."""

from __future__ import annotations

import time

import torch

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.data import Batch
from deepseek_exp.train.build import Parts


def step_seconds(cfg: ExperimentConfig, parts: Parts) -> float:
    """Return the measured time of one micro-batch's loss and backward pass, times their number in a step.

    The weights are unchanged, the experts' load is reset and no random number is drawn. The optimizer, the loader and
    the logging are excluded, so the estimate is slightly low for very small models.

    Returns:
        Seconds per optimizer step.
    """
    lit, batch = parts.lit, next(iter(parts.datamodule.val_dataloader()))
    moved = (field.to(parts.device) if isinstance(field, torch.Tensor) else field for field in batch)
    micro_batch = lit.micro_batch(Batch(*moved))
    memory, tries = None, []
    for _ in range(3):  # the first one warms up, and provides the others with a memory
        _wait(parts.device)
        started = time.perf_counter()
        losses = lit.objective.from_tokens(lit.model, micro_batch, memory)
        losses.loss.backward()
        _wait(parts.device)
        tries.append(time.perf_counter() - started)
        lit.zero_grad(set_to_none=True)
        memory = losses.memory
    lit.reset_counts()
    rows = len(batch.tokens) / cfg.trainer.micro_batch_seqs
    return min(tries[1:]) / rows * cfg.trainer.global_batch_seqs / cfg.trainer.micro_batch_seqs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
