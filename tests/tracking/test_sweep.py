"""A sweep's parent run and its table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deepseek_exp.config import TrackingConfig
from deepseek_exp.errors import TrackingError
from deepseek_exp.tracking import finish_sweep, render_table, start_sweep, sweep_table
from deepseek_exp.tracking.sweep import SweepRow


@dataclass
class Sweep:
    parent: str
    rows: list[SweepRow]
    ids: dict[str, str]


@pytest.fixture(scope="module")
def sweep(store: TrackingConfig, client: MlflowClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    folder = tmp_path_factory.mktemp("sweep")
    parent = start_sweep(store, name="lr sweep", tags={"kind": "sweep"}, artifact_dir=folder)
    experiment = client.get_run(parent).info.experiment_id
    jobs = {"middle": [3.0, 2.0], "best": [1.5], "diverged": [float("inf")], "nan": [float("nan")], "broken": []}
    ids: dict[str, str] = {}
    for name, losses in jobs.items():
        tags = {"mlflow.parentRunId": parent, "overrides": f"size=tiny optim.lr={name}|x", "run_dir": f"/m/{len(ids)}"}
        run = client.create_run(experiment, start_time=30_000, tags=tags, run_name=name).info.run_id
        ids[name] = run
        client.log_param(run, "n_params", 1234)
        for step, loss in enumerate(losses):
            client.log_metric(run, "val/loss", loss, step=step)
            client.log_metric(run, "val/bits_per_byte", loss / 2, step=step)
            client.log_metric(run, "perf/tokens_per_second", 1000.0, step=step)
            client.log_metric(run, "perf/flops_per_token", 5e9, step=step)
            client.log_metric(run, "data/tokens", 4096.0 * (step + 1), step=step)
        if not losses:
            client.set_tag(run, "error", "DataError: no text\nsecond line")
        client.set_terminated(run, "FINISHED" if losses else "FAILED", end_time=120_000)
    client.create_run(experiment, run_name="of another sweep")
    rows = sweep_table(store, parent)
    finish_sweep(store, parent, rows, failed=True)
    yield Sweep(parent, rows, ids)


def test_the_table_is_read_from_the_store(sweep: Sweep) -> None:
    assert [row.name for row in sweep.rows] == ["best", "middle", "broken", "diverged", "nan"]
    words = [f"size=tiny optim.lr={name}|x" for name in ("middle", "broken")]
    ids = [sweep.ids[name] for name in ("middle", "broken")]
    numbers = (2.0, 1.0, 1234, 5e9, 8192, 1000.0, 1.5)
    assert sweep.rows[1] == SweepRow("0", ids[0], "middle", words[0], "FINISHED", *numbers, "")
    numbers = (None, None, 1234, None, None, None, 1.5)
    assert sweep.rows[2] == SweepRow("4", ids[1], "broken", words[1], "FAILED", *numbers, "DataError: no text")


def test_the_text_marks_the_best_row(sweep: Sweep) -> None:
    lines = render_table(list(reversed(sweep.rows))).splitlines()
    assert lines[0].split()[:3] == ["job", "run", "overrides"] and lines[6] == "* lowest val/loss"
    best = ["*", "1", sweep.ids["best"][:12], "optim.lr=best|x", "FINISHED", "1.5", "0.75", "1,234", "5e+09", "4,096"]
    assert lines[1].split()[:10] == best
    column = lines[0].index("val/loss")
    assert [line[column:].split()[0] for line in lines[1:4]] == ["1.5", "2", "-"]
    assert "DataError: no text" in lines[3]
    assert "*" not in render_table(sweep.rows[2:])
    assert render_table([]).split()[:2] == ["job", "run"]


def test_seeds_have_a_mean_and_a_spread(sweep: Sweep) -> None:
    best = sweep.rows[0]
    losses = {"model=a seed=1": 1.0, "model=b seed=1": 4.0, "model=a seed=2": 3.0, "model=b seed=2": None}
    rows = [replace(best, overrides=words, val_loss=loss) for words, loss in losses.items()]
    assert [line.split() for line in render_table(rows).splitlines()[-3:]] == [
        ["over", "seeds", "n", "val/loss", "+-", "bits/byte", "+-"],
        ["model=a", "2", "2", "1.4142", "0.75", "0"],
        ["model=b", "1", "4", "-", "0.75", "-"],
    ]
    assert "over seeds" not in render_table(rows[:2])
    alone = [replace(row, overrides=row.overrides[-6:]) for row in (rows[0], rows[2])]
    assert render_table(alone).splitlines()[-1].split()[:3] == ["all", "2", "2"]


def test_the_parent_run_keeps_the_result(sweep: Sweep, client: MlflowClient) -> None:
    run = client.get_run(sweep.parent)
    assert run.info.status == "FAILED" and run.info.run_name == "lr sweep"
    assert run.data.metrics == {"sweep/best_val_loss": 1.5}
    assert run.data.tags["sweep.best"] == "best" and run.data.tags["sweep.best_run_id"] == sweep.ids["best"]
    assert run.data.tags["kind"] == "sweep"
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    with (folder / "summary.csv").open() as file:
        table = list(csv.DictReader(file))
    assert (
        table[0]["val_loss"] == "1.5"
        and table[0]["run_id"] == sweep.ids["best"]
        and table[2]["error"] == "DataError: no text"
    )
    markdown = (folder / "summary.md").read_text().splitlines()
    assert len(markdown) == 7 and "optim.lr=best\\|x" in markdown[2]


def test_a_sweep_without_a_result_finishes(store: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    parent = start_sweep(store, name="empty", tags={}, artifact_dir=tmp_path)
    finish_sweep(store, parent, sweep_table(store, parent), failed=False)
    run = client.get_run(parent)
    assert run.info.status == "FINISHED" and run.data.metrics == {}


def test_an_unknown_parent_is_an_error(store: TrackingConfig) -> None:
    with pytest.raises(TrackingError, match="is not an MLflow run"):
        sweep_table(store, "e" * 32)
