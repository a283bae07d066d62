"""States of the random number generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def rng_state() -> dict[str, Any]:
    """Give the state of PyTorch's random number generators, that of the CPU and of the GPU in use."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": gpu}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put PyTorch's random number generators where `rng_state` found them."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
