"""A training with a bad step: its gradients, its loss, or its weights are made infinite or NaN in any layout."""

from __future__ import annotations

import os
from typing import Any

import torch

from tests.parallel.layouts import Watch


class Poison(Watch):
    """Makes the gradients of one block NaN in some steps, on the first rank alone.

    Reports, of each step, whether it was applied, and whether the weights changed.
    """

    def __init__(self, steps: list[int], of: str = "blocks.0.attention.wo", loss: bool = False) -> None:
        self.steps, self.of, self.loss, self.n = steps, of, loss, 0
        self.applied: list[bool] = []

    def before_fit(self, parts: Any, trainer: Any) -> None:
        lit = parts.lit
        step, weigh = lit.training_step, lit.objective.weigh
        module = dict(lit.model.named_modules()).get(self.of)
        if module is not None and not self.loss and os.environ.get("RANK", "0") == "0":
            module.register_full_backward_hook(self._spoil)

        def counted(batch: Any, batch_idx: int) -> Any:
            self.n += 1
            out = step(batch, batch_idx)
            self.applied.append(out["applied"])
            return out

        def weighed(mean: torch.Tensor, nll: torch.Tensor, ahead: Any) -> Any:
            return weigh(mean * float("nan") if self.loss and self._is_bad() else mean, nll, ahead)

        lit.training_step, lit.objective.weigh = counted, weighed

    def _is_bad(self) -> bool:
        return self.n in self.steps

    def _spoil(self, module: Any, grad_input: Any, grad_output: Any) -> Any:
        if not self._is_bad():
            return None
        return tuple(g * float("nan") if g is not None else None for g in grad_input)

    def result(self) -> Any:
        return self.applied
