"""How long a step will take: one micro batch is tried before the training starts."""

from __future__ import annotations

import time

import torch

from deepseek_exp.build import Parts
from deepseek_exp.config import ExperimentConfig


def step_seconds(cfg: ExperimentConfig, parts: Parts) -> float:
    """Time the forward and backward pass of one micro batch, times their number in a step.

    The weights stay as they are and no random number is drawn. The optimizer, the loader and the logging are left out,
    so the estimate is a little low for very small models.

    Returns:
        Seconds of one optimizer step.
    """
    model = parts.lit.model
    tokens = next(iter(parts.datamodule.val_dataloader())).tokens.to(parts.device)  # (micro batch, seq + 1)
    tries = []
    for _ in range(3):  # the first one warms up
        _wait(parts.device)
        started = time.perf_counter()
        model.ops.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
        _wait(parts.device)
        tries.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    rows = len(tokens) / cfg.trainer.micro_batch_seqs
    return min(tries[1:]) / rows * cfg.trainer.global_batch_seqs / cfg.trainer.micro_batch_seqs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
