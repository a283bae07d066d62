"""States of the random number generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def rng_state() -> dict[str, Any]:
    """Return the state of PyTorch's random number generators, of the CPU and the current GPU."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": gpu}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore PyTorch's random number generators from the result of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
