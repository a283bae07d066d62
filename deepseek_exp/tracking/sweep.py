"""The run that groups the jobs of a sweep, and the table of their results.

Used by the process that starts the jobs, which does not train: it talks to MLflow directly.
"""

from __future__ import annotations

import csv
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_exp.config import TrackingConfig
from deepseek_exp.tracking.journal import Event, read_all
from deepseek_exp.tracking.params import cut
from deepseek_exp.tracking.rundir import JOURNAL, Progress, Spec

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_BEST = "sweep/best_val_loss"
_HEADINGS = {
    "job": "job",
    "run_id": "run",
    "name": "name",
    "overrides": "overrides",
    "status": "status",
    "val_loss": "val/loss",
    "val_bits_per_byte": "bits/byte",
    "n_params": "parameters",
    "flops_per_token": "FLOPs/token",
    "tokens": "tokens seen",
    "tokens_per_second": "tokens/s",
    "minutes": "minutes",
    "error": "error",
}
_RUN_ID_CHARACTERS = 12


@dataclass(frozen=True)
class SweepRow:
    """One job of a sweep.

    Attributes:
        job: its number in the sweep, which is the name of its folder.
        run_id: its run.
        name: name of the run.
        overrides: its command-line overrides.
        status: of the run.
        val_loss: last validation loss, nats per token.
        val_bits_per_byte: the same in bits per byte.
        n_params: number of parameters of the model.
        flops_per_token: training FLOPs per token.
        tokens: number of training tokens seen.
        tokens_per_second: speed at the end.
        minutes: duration.
        error: first line of the error; empty if there was none.
    """

    job: str
    run_id: str
    name: str
    overrides: str
    status: str
    val_loss: float | None
    val_bits_per_byte: float | None
    n_params: int | None
    flops_per_token: float | None
    tokens: int | None
    tokens_per_second: float | None
    minutes: float | None
    error: str


def start_sweep(
    cfg: TrackingConfig,
    *,
    name: str,
    tags: dict[str, str],
    artifact_dir: Path,
    on_repair: Callable[[str], object] | None = None,
) -> str:
    """Create the parent run of a sweep; return its run id, the `parent_run_id` of each job.

    Args:
        cfg: the store, the experiment and further tags.
        name: name of the run.
        tags: tags of the run.
        artifact_dir: where a database store keeps artifacts; a server decides that itself.
        on_repair: called with a sentence if a sqlite database was incomplete.

    Raises:
        TrackingError: the store cannot be reached or used.
    """
    from deepseek_exp.tracking.connect import connect, create_run, store_errors

    client, experiment_id = connect(cfg, artifact_dir, on_repair)
    with store_errors(cfg.uri):
        return create_run(client, experiment_id, name, {**tags, **cfg.tags}, time.time_ns() // 1_000_000)


def sweep_table(cfg: TrackingConfig, parent_run_id: str) -> list[SweepRow]:
    """Read the jobs of a sweep from the store, the best val/loss first, those without one last.

    Raises:
        TrackingError: the store cannot be reached or used, or does not have the parent run.
    """
    from deepseek_exp.tracking.connect import store_errors

    with store_errors(cfg.uri):
        client, parent = _parent(cfg, parent_run_id)
        query, token, rows = f"tags.`mlflow.parentRunId` = '{parent_run_id}'", None, []
        while True:
            page = client.search_runs([parent.info.experiment_id], query, page_token=token)
            rows += [_row(run) for run in page]
            token = page.token
            if not token:
                return _sorted(rows)


def local_sweep_table(folder: Path) -> list[SweepRow]:
    """Read the jobs of a sweep that is not in MLflow from their folders, in the order of `sweep_table`."""
    return _sorted([_local_row(path.parent) for path in folder.glob(f"*/{JOURNAL}")])


def finish_sweep(cfg: TrackingConfig, parent_run_id: str, rows: list[SweepRow], failed: bool) -> None:
    """Store the table as summary.md and summary.csv, the best run as metric and tags, and the status of the sweep.

    Args:
        cfg: the store.
        parent_run_id: result of `start_sweep`.
        rows: the table.
        failed: a job failed, possibly before it had a run.

    Raises:
        TrackingError: the store cannot be reached or used, or does not have the parent run.
    """
    from deepseek_exp.tracking.connect import TAG_CHARACTERS, store_errors

    rows = _sorted(rows)
    with store_errors(cfg.uri):
        client, _ = _parent(cfg, parent_run_id)
        client.log_text(parent_run_id, _markdown(rows), "summary.md")
        client.log_text(parent_run_id, _csv(rows), "summary.csv")
        if rows and _has_loss(rows[0]):
            client.log_metric(parent_run_id, _BEST, rows[0].val_loss)
            client.set_tag(parent_run_id, "sweep.best", rows[0].name)
            client.set_tag(parent_run_id, "sweep.best_run_id", rows[0].run_id)
        client.set_tag(parent_run_id, "mlflow.note.content", cut(_markdown(rows), TAG_CHARACTERS))
        client.set_terminated(parent_run_id, "FAILED" if failed else "FINISHED")


def best_row(rows: list[SweepRow]) -> SweepRow | None:
    """Return the row with the lowest val/loss; None if no row has one."""
    return min(filter(_has_loss, rows), key=lambda row: row.val_loss or 0.0, default=None)


def render_table(rows: list[SweepRow]) -> str:
    """Render the table as text: aligned columns, the lowest val/loss first and marked with `*`.

    If the sweep has several seeds, a second table has mean and standard deviation over them.
    """
    rows = _without_common(_sorted(rows))
    columns = _shown_columns(rows)
    lines = [["", *(_HEADINGS[column] for column in columns)]]
    lines += [["*" if row is rows[0] and _has_loss(row) else "", *_cells(row, columns)] for row in rows]
    parts = [_aligned(lines)]
    if rows and _has_loss(rows[0]):
        parts.append("* lowest val/loss")
    seeds = seed_table(rows)
    if seeds:
        parts += ["", _aligned(seeds)]
    return "\n".join(parts)


def seed_table(rows: list[SweepRow]) -> list[list[str]]:
    """Return mean and standard deviation over the seeds of each configuration, as lines of cells.

    It is the sample standard deviation, with n - 1. Empty if no configuration has several seeds.
    """
    groups: dict[str, list[SweepRow]] = {}
    for row in filter(_has_loss, rows):
        words = row.overrides.split(" ")
        others = " ".join(word for word in words if not word.startswith("seed="))
        if len(others.split()) < len(row.overrides.split()):
            groups.setdefault(others, []).append(row)
    if all(len(group) < 2 for group in groups.values()):
        return []
    lines = [["over seeds", "n", "val/loss", "+-", "bits/byte", "+-"]]
    for others, group in sorted(groups.items(), key=lambda item: statistics.mean(_losses(item[1]))):
        bits = [row.val_bits_per_byte for row in group if row.val_bits_per_byte is not None]
        cells = [*_mean_and_spread(_losses(group)), *_mean_and_spread(bits)]
        lines.append([others or "all", str(len(group)), *map(_text, cells)])
    return lines


def _losses(rows: list[SweepRow]) -> list[float]:
    return [row.val_loss for row in rows if row.val_loss is not None]


def _mean_and_spread(values: list[float]) -> tuple[float | None, float | None]:
    mean = statistics.mean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _shown_columns(rows: list[SweepRow]) -> list[str]:
    """Choose the columns of the text: the name repeats the overrides, so it is shown only if there are none."""
    hidden = {"name"} if all(row.overrides for row in rows) else {"overrides"} if rows else set()
    if not any(row.error for row in rows):
        hidden.add("error")
    return [column for column in _HEADINGS if column not in hidden]


def _parent(cfg: TrackingConfig, parent_run_id: str) -> tuple[MlflowClient, Run]:
    from deepseek_exp.tracking.connect import find_run, open_store

    client = open_store(cfg)
    return client, find_run(client, cfg, parent_run_id)


def _row(run: Run) -> SweepRow:
    tags, info = run.data.tags, run.info
    job = Path(tags["run_dir"]).name if "run_dir" in tags else ""
    minutes = (info.end_time - info.start_time) / 60_000 if info.end_time else None
    about = (job, info.run_id, info.run_name, tags.get("overrides", ""), info.status)
    return _with_numbers(about, run.data.metrics, run.data.params, minutes, tags.get("error", ""))


def _local_row(run_dir: Path) -> SweepRow:
    spec, metrics, end = Spec.load(run_dir), {}, Event()
    for event in read_all(run_dir / JOURNAL):
        if event["kind"] == "metrics":
            metrics |= {name: float(value) for name, value in event["values"].items()}
        elif event["kind"] == "end":
            end = event
    about = (run_dir.name, Progress.load(run_dir).run_id or "", spec.name, spec.tags.get("overrides", ""))
    minutes = (end["t"] - spec.start_ms) / 60_000 if end else None
    return _with_numbers((*about, end.get("status", "RUNNING")), metrics, spec.params, minutes, end.get("error") or "")


def _with_numbers(
    about: tuple[str, str, str, str, str],
    metrics: dict[str, float],
    params: dict[str, str],
    minutes: float | None,
    error: str,
) -> SweepRow:
    """Return a row: its job, run id, name, overrides and status, with the last value of each metric."""
    error_lines = error.strip().splitlines()
    tokens = metrics.get("data/tokens")
    return SweepRow(
        *about,
        val_loss=metrics.get("val/loss"),
        val_bits_per_byte=metrics.get("val/bits_per_byte"),
        n_params=int(params["n_params"]) if "n_params" in params else None,
        flops_per_token=metrics.get("perf/flops_per_token"),
        tokens=None if tokens is None else int(tokens),
        tokens_per_second=metrics.get("perf/tokens_per_second"),
        minutes=minutes,
        error=error_lines[0] if error_lines else "",
    )


def _has_loss(row: SweepRow) -> bool:
    """Return whether there is a loss to compare; MLflow stores infinity as the largest float."""
    return row.val_loss is not None and abs(row.val_loss) < sys.float_info.max


def _without_common(rows: list[SweepRow]) -> list[SweepRow]:
    """Remove the overrides that all jobs share: the table shows the differences."""
    split = [row.overrides.split() for row in rows]
    common = set.intersection(*map(set, split)) if len(rows) > 1 else set()
    kept = (" ".join(o for o in own if o not in common) for own in split)
    return [replace(row, overrides=overrides) for row, overrides in zip(rows, kept, strict=True)]


def _sorted(rows: list[SweepRow]) -> list[SweepRow]:
    return sorted(rows, key=lambda row: (not _has_loss(row), row.val_loss if _has_loss(row) else 0.0, row.name))


def _cells(row: SweepRow, columns: Iterable[str] = _HEADINGS) -> list[str]:
    short = replace(row, run_id=row.run_id[:_RUN_ID_CHARACTERS])
    return [_text(getattr(short, column)) for column in columns]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _markdown(rows: list[SweepRow]) -> str:
    rows = _without_common(rows)
    table = [list(_HEADINGS.values()), ["---"] * len(_HEADINGS)]
    table += [[cell.replace("|", "\\|") for cell in _cells(row)] for row in rows]
    text = "".join("| " + " | ".join(line) + " |\n" for line in table)
    seeds = seed_table(rows)
    if seeds:
        lines = [seeds[0], ["---"] * len(seeds[0]), *seeds[1:]]
        text += "\n" + "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    return text


def _csv(rows: list[SweepRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADINGS)
    writer.writerows(asdict(row).values() for row in rows)
    return text.getvalue()
