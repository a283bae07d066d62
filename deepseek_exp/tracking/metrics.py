"""The one table of metric names: what each number is and in which unit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a metric's number means, and its unit."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats per token", "cross entropy of the training batch"),
    "train/bits_per_byte": Metric("bits per byte", "training loss per byte of text; comparable across tokenizers"),
    "val/loss": Metric("nats per token", "cross entropy of the validation set"),
    "val/bits_per_byte": Metric("bits per byte", "validation loss per byte of text; comparable across tokenizers"),
    "val/unigram_bits_per_byte": Metric(
        "bits per byte", "the same text under token frequencies alone: the bar to beat"
    ),
    "perf/tokens_per_second": Metric("tokens per second", "training tokens over wall time, all devices together"),
    "perf/step_seconds": Metric("seconds", "wall time of one optimizer step"),
    "perf/peak_memory_bytes": Metric("bytes", "largest memory that was in use on the device so far"),
    "optim/lr": Metric("1", "learning rate of the step"),
    "optim/grad_norm": Metric("1", "global gradient norm before clipping"),
    "data/position": Metric("sequences", "training sequences consumed so far"),
    "data/epoch": Metric("passes", "passes over the training data so far"),
    "attn/gate": Metric("0..1", "mean share that the attention gate gives to local attention"),
    "sweep/best_val_loss": Metric("nats per token", "lowest final val/loss among the runs of a sweep"),
}


def check_names(names: Iterable[str]) -> None:
    """Refuse metric names that the table lacks.

    Raises:
        ValueError: names the metrics and the table.
    """
    if unknown := sorted(set(names) - METRICS.keys()):
        raise ValueError(
            f"metric {', '.join(map(repr, unknown))} is not in METRICS (deepseek_exp/tracking/metrics.py): "
            "add it there with its unit and meaning."
        )


def describe(names: Iterable[str]) -> str:
    """Render the table's rows for the metrics that a run logged, as Markdown; empty if it logged none of them."""
    known = sorted(set(names) & METRICS.keys())
    if not known:
        return ""
    rows = [f"| `{name}` | {METRICS[name].unit} | {METRICS[name].meaning} |" for name in known]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows])
