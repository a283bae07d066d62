"""Results of an evaluation: means with their standard errors, and the table of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Measure:
    """One number of one task.

    Attributes:
        task: its name.
        metric: such as `accuracy`.
        value: the number.
        stderr: its standard error over the items; None if there are too few items or it is unknown.
        n: number of items, or of tokens for a loss.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int


def mean(task: str, metric: str, values: Sequence[float]) -> Measure:
    """Return the mean of independent items, with standard error sqrt(sum (x - mean)^2 / (n - 1) / n)."""
    n = len(values)
    value = math.fsum(values) / n
    spread = math.fsum((x - value) ** 2 for x in values)
    return Measure(task, metric, value, math.sqrt(spread / (n - 1) / n) if n > 1 else None, n)


def ratio(task: str, metric: str, sums: Sequence[float], weights: Sequence[float], n: int) -> Measure:
    """Return sum(sums) / sum(weights) over independent items, such as nats per token over documents.

    The standard error is that of a ratio estimate: sqrt(k / (k - 1) sum (s - r w)^2) / sum(w) for k items (Cochran
    1977, "Sampling Techniques", section 6.4, for a large population).

    Args:
        task: its name.
        metric: its name.
        sums: of each item.
        weights: of each item, in total above 0.
        n: the number to report with it.
    """
    total, k = math.fsum(weights), len(sums)
    value = math.fsum(sums) / total
    spread = math.fsum((s - value * w) ** 2 for s, w in zip(sums, weights, strict=True))
    return Measure(task, metric, value, math.sqrt(k / (k - 1) * spread) / total if k > 1 else None, n)


def table(measures: Iterable[Measure]) -> str:
    """Return the measures as lines of text, one per number."""
    rows = [("task", "metric", "value", "stderr", "n")]
    for m in measures:
        rows.append((m.task, m.metric, f"{m.value:.4f}", "-" if m.stderr is None else f"{m.stderr:.4f}", f"{m.n:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        left = [row[i].ljust(widths[i]) for i in range(2)]
        right = [row[i].rjust(widths[i]) for i in range(2, 5)]
        lines.append("  ".join([*left, *right]))
    return "\n".join(lines)


def as_json(measures: Iterable[Measure]) -> str:
    """Return the measures as JSON, with all digits."""
    return json.dumps([asdict(m) for m in measures], indent=1)


def as_metrics(measures: Iterable[Measure]) -> dict[str, float]:
    """Return the measures by metric name: eval/<task>/<metric>, and the standard error as <metric>_stderr."""
    values = {}
    for m in measures:
        values[f"eval/{m.task}/{m.metric}"] = m.value
        if m.stderr is not None:
            values[f"eval/{m.task}/{m.metric}_stderr"] = m.stderr
    return values
