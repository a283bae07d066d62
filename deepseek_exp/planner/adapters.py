"""What adapters cover of a model, in parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.config.matrices import Shape, adapted, adapter_size, matrix_shapes
from deepseek_exp.planner.cost import parameters


@dataclass(frozen=True)
class Coverage:
    """The matrices of a model with and without adapters.

    Attributes:
        with_adapter: shape of each adapted matrix, by its parameter name.
        without: shape of each other matrix.
        n_trained: parameters of the adapters.
        n_covered: parameters of the adapted matrices.
        n_parameters: parameters of the model, without adapters.
        rank: rank of the adapters.
    """

    with_adapter: dict[str, Shape]
    without: dict[str, Shape]
    n_trained: int
    n_covered: int
    n_parameters: int
    rank: int

    @property
    def share(self) -> float:
        """Share of the model's parameters that are in adapted matrices."""
        return self.n_covered / self.n_parameters

    def sentence(self) -> str:
        """Return one line for the plan of a training."""
        n = len(self.with_adapter)
        return (
            f"rank {self.rank} on {n} of {n + len(self.without)} matrices ({self.share:.1%} of the parameters); "
            f"{self.n_trained:,} parameters are trained, {self.n_trained / self.n_parameters:.2%} of the model's"
        )

    def table(self) -> str:
        """Return one line per matrix: its name, its shape, and the parameters of its adapter."""
        rows = [["matrix", "shape", "adapter"]]
        for name, shape in {**self.with_adapter, **self.without}.items():
            size = adapter_size({name: shape}, self.rank) if name in self.with_adapter else 0
            rows.append([name, " x ".join(map(str, shape)), f"{size:,}" if size else "none, frozen"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return (
            "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows) + "\n"
        )


def coverage(exp: ExperimentConfig) -> Coverage:
    """Return what the adapters of an experiment cover."""
    found, counted = adapted(exp.model, exp.lora), parameters(exp.model)
    return Coverage(
        with_adapter=found,
        without={name: shape for name, shape in matrix_shapes(exp.model).items() if name not in found},
        n_trained=adapter_size(found, exp.lora.rank),
        n_covered=sum(map(math.prod, found.values())),
        n_parameters=counted.total + counted.mtp,
        rank=exp.lora.rank,
    )
