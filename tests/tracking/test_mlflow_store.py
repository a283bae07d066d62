"""The sender's parts against a real sqlite store, within the test's process."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
from sqlalchemy import create_engine, text

from deepseek_exp.config import ROOT, TrackingConfig
from deepseek_exp.errors import TrackingError
from deepseek_exp.tracking.connect import connect, find_run
from deepseek_exp.tracking.journal import JournalWriter
from tests.tracking.tracking_parts import OfflineRun, history, make_config

GetRun = Callable[[str], Run]


@pytest.fixture
def offline(store: TrackingConfig, tmp_path: Path) -> OfflineRun:
    return OfflineRun(store, tmp_path / "run")


def _writer(offline: OfflineRun) -> JournalWriter:
    return JournalWriter(offline.run_dir / "journal.jsonl")


def test_more_than_a_batch_arrives(offline: OfflineRun, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    log_batch = MlflowClient.log_batch

    def recorded(self: MlflowClient, run_id: str, **batch: list[object]) -> None:
        sizes.append({kind: len(items) for kind, items in batch.items()})
        log_batch(self, run_id, **batch)

    monkeypatch.setattr(MlflowClient, "log_batch", recorded)
    writer = _writer(offline)
    for step in range(30):
        writer.metrics({f"m{i}": float(step) for i in range(100)}, step)
    writer.params({f"p{i}": str(i) for i in range(250)})
    writer.tags({f"t{i}": str(i) for i in range(250)})
    assert offline.carrier.attempt(closing=False)
    assert sizes == [{"metrics": 1000}] * 3 + [{"params": n} for n in (100, 100, 50)] + [
        {"tags": n} for n in (100, 100, 50)
    ]
    run = client.get_run(offline.run_id)
    assert history(client, offline.run_id, "m99") == [(step, float(step)) for step in range(30)]
    assert run.data.params == {f"p{i}": str(i) for i in range(250)}
    assert run.data.tags["t249"] == "249"


def test_sending_twice_is_harmless(offline: OfflineRun, client: MlflowClient) -> None:
    writer = _writer(offline)
    writer.metrics({"train/loss": float("nan"), "val/loss": 2.0}, 1)
    writer.params({"a": "1"})
    writer.dataset({"name": "d", "context": "training", "digest": "0" * 64, "source": "/x", "profile": {"bytes": 3}})
    assert offline.carrier.attempt(closing=False)
    offline.progress.values_offset = offline.progress.artifacts_offset = 0
    assert offline.reopen().attempt(closing=False)
    assert len(history(client, offline.run_id, "train/loss")) == 1
    assert history(client, offline.run_id, "val/loss") == [(1, 2.0)]
    assert len(client.get_run(offline.run_id).inputs.dataset_inputs) == 1
    assert offline.progress.refused == []


def test_what_was_sent_is_not_sent_again(offline: OfflineRun, client: MlflowClient) -> None:
    _writer(offline).tags({"a": "first"})
    assert offline.carrier.attempt(closing=False)
    client.set_tag(offline.run_id, "a", "changed by hand")
    assert offline.reopen().attempt(closing=False)
    assert client.get_run(offline.run_id).data.tags["a"] == "changed by hand"


def test_what_the_store_refuses_holds_up_nothing(offline: OfflineRun, client: MlflowClient) -> None:
    writer = _writer(offline)
    writer.metrics({"a": 1.0, "b?c": 2.0, "d": 3.0}, 1)
    writer.file(offline.run_dir / "not there", None)
    with (offline.run_dir / "journal.jsonl").open("a") as file:
        file.write("damaged\n")
    writer.metrics({"e": 4.0}, 2)
    assert offline.carrier.attempt(closing=False)
    assert client.get_run(offline.run_id).data.metrics == {"a": 1.0, "d": 3.0, "e": 4.0}
    refused = offline.progress.refused
    assert len(refused) == 3
    assert refused[0].startswith("metric 'b?c': Invalid value")
    assert refused[1] == "journal line 'damaged': not readable"
    assert refused[2].endswith("not there: not there any more")


def test_a_run_deleted_meanwhile_refuses_nothing_for_good(offline: OfflineRun, client: MlflowClient) -> None:
    client.delete_run(offline.run_id)
    _writer(offline).metrics({"a": 1.0}, 1)
    assert not offline.carrier.attempt(closing=False)
    assert offline.progress.refused == []
    client.restore_run(offline.run_id)
    assert offline.carrier.attempt(closing=False)
    assert client.get_run(offline.run_id).data.metrics == {"a": 1.0}


def test_a_broken_artifact_store_holds_up_no_metric(store: TrackingConfig, tmp_path: Path, get_run: GetRun) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "art").write_text("a file where the artifact folder should be")
    offline = OfflineRun(replace(store, experiment="broken artifacts"), tmp_path / "run")
    writer = _writer(offline)
    writer.text("hello", "a.txt")
    writer.metrics({"a": 1.0}, 1)
    writer.end("FINISHED", None)
    assert not offline.carrier.attempt(closing=True)
    run = get_run(offline.run_id)
    assert run.data.metrics == {"a": 1.0} and run.info.status == "FINISHED"
    assert offline.progress.trouble and offline.progress.artifacts_offset == 0


def test_a_store_on_a_full_disk_gets_all_once_there_is_room(
    offline: OfflineRun, store: TrackingConfig, client: MlflowClient
) -> None:
    writer = _writer(offline)
    size = Path(store.uri.removeprefix("sqlite:///")).stat().st_size
    for step in range(20):
        writer.metrics({f"m{i}": float(step) for i in range(100)}, step)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert not offline.carrier.attempt(closing=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert re.search("disk", str(offline.progress.trouble)) and offline.progress.values_offset == 0
    assert offline.carrier.attempt(closing=False) and offline.progress.trouble is None
    assert history(client, offline.run_id, "m99") == [(step, float(step)) for step in range(20)]
    assert offline.progress.refused == []


def test_long_values_are_cut_with_a_note(store: TrackingConfig, tmp_path: Path, get_run: GetRun) -> None:
    offline = OfflineRun(store, tmp_path / "run", params={"long": "x" * 7000})
    _writer(offline).tags({"long": "y" * 9000})
    assert offline.carrier.attempt(closing=False)
    data = get_run(offline.run_id).data
    assert data.params["long"].endswith("[cut, 7000 characters in all]")
    assert data.tags["long"].endswith("[cut, 9000 characters in all]")


def test_an_end_counts_only_if_nothing_began_after_it(offline: OfflineRun, get_run: GetRun) -> None:
    writer = _writer(offline)
    writer.end("FINISHED", None)
    writer.start()
    assert offline.carrier.attempt(closing=True)
    run = get_run(offline.run_id)
    assert run.info.status == "FAILED" and "was killed" in run.data.tags["error"]


def test_description_follows_the_text_of_the_run(offline: OfflineRun, get_run: GetRun) -> None:
    writer = _writer(offline)
    writer.metrics({"train/loss": 1.0}, 1)
    writer.tags({"description": "Does it learn?"})
    assert offline.carrier.attempt(closing=False)
    writer.metrics({"val/loss": 1.0}, 2)
    assert offline.reopen().attempt(closing=False)
    note = get_run(offline.run_id).data.tags["mlflow.note.content"]
    assert note.startswith("Does it learn?\n\n| metric |")
    assert "`train/loss` | nats per token" in note and "`val/loss`" in note


def test_runs_that_cannot_be_resumed(store: TrackingConfig, offline: OfflineRun, client: MlflowClient) -> None:
    with pytest.raises(
        TrackingError,
        match=r"^resume='0{32}' is not an MLflow run of tracking.uri='sqlite:.*Fix: set tracking.uri=\.\.\. "
        "to .* tracking.new_run=true",
    ):
        find_run(client, store, "0" * 32)
    client.delete_run(offline.run_id)
    with pytest.raises(TrackingError, match=r"is a deleted MLflow run .*Fix: restore it \(.*mlflow runs restore"):
        find_run(client, store, offline.run_id)


def test_a_deleted_experiment_is_an_error(store: TrackingConfig, client: MlflowClient, tmp_path: Path) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(TrackingError, match=r"tracking.experiment='gone' is deleted .*Fix: take another name"):
        connect(replace(store, experiment="gone"), tmp_path)


def test_a_store_that_cannot_be_used_is_an_error(store: TrackingConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match=r"tracking.uri='sqlite:.*/file/a.db' cannot be used \(.*Fix: check"):
        connect(replace(store, uri=f"sqlite:///{tmp_path}/file/a.db"), tmp_path)
    with pytest.raises(TrackingError, match=r"tracking.uri='./mlruns' cannot be used \(The filesystem tracking"):
        connect(replace(store, uri="./mlruns"), tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
import mlflow.store.db.utils as mlflow_db
from deepseek_exp.tracking.connect import connect
from tests.tracking.tracking_parts import make_config
mlflow_db._upgrade_db = lambda engine: os.kill(os.getpid(), signal.SIGKILL)  # the first tables are there
connect(make_config(sys.argv[1]), Path("/nowhere"))
"""


def _half_made(path: Path, *statements: str) -> None:
    """Make a database as a killed process used to leave it: MLflow's first tables, without a revision."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        InitialBase.metadata.create_all(connection)
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def test_a_kill_within_the_migration_leaves_no_store_that_is_half_made(tmp_path: Path) -> None:
    """Nor does one that an earlier version left stay: it is kept under another name."""
    cfg, notes = make_config(f"sqlite:///{tmp_path}/m.db"), []
    killed = subprocess.run([sys.executable, "-c", KILLED, cfg.uri], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "m.db").exists() and (tmp_path / ".m.db.new").stat().st_size > 0
    _half_made(tmp_path / "m.db", "INSERT INTO experiments (experiment_id, name) VALUES (0, 'Default')")
    before = (tmp_path / "m.db").read_bytes()
    client, experiment_id = connect(cfg, tmp_path, notes.append)
    assert client.get_experiment(experiment_id).name == "tests"
    kept = [path for path in tmp_path.iterdir() if "half-made" in path.name]
    assert [path.read_bytes() for path in kept] == [before]
    assert notes == [
        f"{tmp_path}/m.db was left half made, without runs; it was made again, and the old file is {kept[0]}"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"m.db", "m.db.lock", kept[0].name}
    client, _ = connect(cfg, tmp_path, notes.append)
    assert len(notes) == 1


@pytest.mark.parametrize(
    "row",
    [
        "INSERT INTO runs (run_uuid) VALUES ('a')",
        "INSERT INTO experiments (experiment_id, name) VALUES (1, 'planned')",
    ],
)
def test_a_store_of_another_version_that_is_used_is_left_alone(tmp_path: Path, row: str) -> None:
    _half_made(tmp_path / "m.db", row)
    before = (tmp_path / "m.db").read_bytes()
    with pytest.raises(TrackingError, match=r"is an MLflow store of another version.*revision none.*Fix: .*db upgrade"):
        connect(make_config(f"sqlite:///{tmp_path}/m.db"), tmp_path)
    assert (tmp_path / "m.db").read_bytes() == before
