"""What all ranks of a training agree on; with one process each of these is the identity."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.parallel.groups import Groups
from deepseek_exp.parallel.partition import ModelShard
from deepseek_exp.planner import bubble_fraction


class Ranks(Protocol):
    """Combines the ranks' values. Every rank calls the same methods in the same order."""

    def sum(self, values: Sequence[Tensor], counts: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Sum statistics over all ranks.

        Args:
            values: measured on this rank, of any shapes. Of ranks that compute the same loss one is counted.
            counts: what each of this rank's MoE layers counted, (experts + COUNTS,) each. They are set to their sums.

        Returns:
            The sums, in the shapes of `values`, and the summed counts of all MoE layers of the whole model, in order.
        """
        ...

    def max(self, value: int) -> int:
        """Return the largest value of all ranks."""
        ...

    def mean(self, values: Sequence[Tensor]) -> float | None:
        """Return the mean over all elements of all ranks' tensors, None if there are none."""
        ...

    def first(self, value: str | None) -> str | None:
        """Return the value of the first rank that has one, None if no rank has."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks."""
        ...

    def layout_metrics(self) -> dict[str, float]:
        """Return the metrics of a layout: peak memory of each stage and the pipeline's bubble."""
        ...


class OneRank:
    """A single process."""

    def sum(self, values: Sequence[Tensor], counts: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the values and counts as they are."""
        return values, counts

    def max(self, value: int) -> int:
        """Return the value."""
        return value

    def mean(self, values: Sequence[Tensor]) -> float | None:
        """Return the mean over all elements of the tensors, None if there are none."""
        return torch.cat([v.detach().float().flatten() for v in values]).mean().item() if values else None

    def first(self, value: str | None) -> str | None:
        """Return the value."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]

    def layout_metrics(self) -> dict[str, float]:
        """Return nothing."""
        return {}


class ManyRanks:
    """The ranks of a layout."""

    def __init__(self, exp: ExperimentConfig, groups: Groups, shard: ModelShard) -> None:
        """Remember this rank's place.

        Args:
            exp: the experiment.
            groups: this rank's.
            shard: what it holds of the model.
        """
        self.exp, self.groups, self.shard = exp, groups, shard

    def sum(self, values: Sequence[Tensor], counts: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Sum over the ranks that compute the loss, and counts over all stages, in one all-reduce; see `Ranks`."""
        flat = torch.cat([v.double().flatten() for v in values]).to(self.groups.device)
        if not self.groups.counts_loss:
            flat = torch.zeros_like(flat)
        rows = flat.new_zeros(self.shard.n_moe_layers, self.shard.counts_width)
        first = self.shard.first_moe_layer
        if counts and self.groups.at.tp == 0:
            rows[first : first + len(counts)] = torch.stack(tuple(counts))
        summed = self.groups.sum(torch.cat([flat, rows.flatten()]))
        flat, rows = summed[: len(flat)], summed[len(flat) :].view_as(rows)
        for mine, row in zip(counts, rows[first:], strict=False):
            mine.copy_(row)
        sums = flat.split([v.numel() for v in values])
        return [s.view(v.shape) for s, v in zip(sums, values, strict=True)], rows.unbind()

    def max(self, value: int) -> int:
        """Return the largest value of all ranks."""
        return self.groups.largest(value)

    def mean(self, values: Sequence[Tensor]) -> float | None:
        """Return the mean over all elements of all ranks' tensors, None if there are none."""
        flat = torch.cat([v.detach().double().flatten().cpu() for v in values] or [torch.zeros(0)])
        total, n = map(sum, zip(*self.groups.gather((flat.sum().item(), len(flat))), strict=True))
        return total / n if n else None

    def first(self, value: str | None) -> str | None:
        """Return the value of the first rank that has one, None if no rank has."""
        return next((found for found in self.groups.gather(value) if found is not None), None)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks."""
        return self.groups.gather(value)

    def layout_metrics(self) -> dict[str, float]:
        """Return the peak memory of each stage's fullest rank, and the pipeline's bubble."""
        peaks: dict[int, int] = {}
        for stage, peak in self.groups.gather((self.groups.at.pp, _peak_memory(self.groups.device))):
            peaks[stage] = max(peak, peaks.get(stage, 0))
        d, t = self.groups.degrees, self.exp.trainer
        n_micro_batches = t.global_batch_seqs // (t.micro_batch_seqs * d.dp)
        values = {f"parallel/peak_memory_bytes/{stage}": float(peak) for stage, peak in sorted(peaks.items())}
        return values | {"parallel/bubble_fraction": bubble_fraction(d.pp, n_micro_batches)}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
