"""Whole runs: a training process, its sender and a sqlite store."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from deepseek_exp.config import ROOT, TrackingConfig
from deepseek_exp.errors import TrackingError
from deepseek_exp.tracking import RunLog, TrackedRun, copy_history
from deepseek_exp.tracking.journal import JournalWriter, metric_events, read_events
from deepseek_exp.tracking.run import Delivery
from deepseek_exp.tracking.rundir import Progress, Spec
from tests.tracking.tracking_parts import OfflineRun, history, make_config, start_run

GetRun = Callable[[str], Run]

TRAINING = """
import os, sys, time
from dataclasses import fields
from pathlib import Path
from deepseek_exp.config import TrackingConfig
from deepseek_exp.tracking import TrackedRun
folder = Path(sys.argv[1])
cfg = TrackingConfig(uri=sys.argv[2], experiment="tests", run_name=None, parent_run_id=None, tags={},
                     system_metrics=True, drain_seconds=20.0)
run = TrackedRun.start(cfg, run_dir=folder / "run", name="killed", params={}, config_yaml="", tags={},
                       source_dir=folder, artifact_dir=folder / "artifacts")
run_id = run.wait_ready(30)
worker = os.fork()
if worker == 0:  # a loader's worker: outlives the training process and holds its pipes
    time.sleep(60)
    os._exit(0)
for step in range(500):
    run.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
heavy = [name for name in ("mlflow", "pytorch_lightning", "torch") if name in sys.modules]
print(run_id, run._process.pid, worker, heavy, flush=True)
time.sleep(60)
"""


def _wait_until_gone(pid: int, seconds: float) -> bool:
    """Whether a process ends within some seconds; what nobody waits for (a zombie) has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def whole(store: TrackingConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrackedRun, Delivery]:
    """A run that logs one of everything, started from elsewhere, and ends well."""
    folder = tmp_path_factory.mktemp("whole")
    cfg = replace(store, parent_run_id="0" * 32, tags={"team": "b"}, system_metrics=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = start_run(
            cfg, Path("run"), params={"optim": {"lr": 0.001}, "betas": [0.9, 0.95]}, tags={"team": "a", "host": "h"}
        )
    run.wait_ready(30)
    with pytest.raises(ValueError, match="'train/los' is not in METRICS"):
        run.log_metrics({"train/los": 1.0}, 1)
    run.log_metrics({"train/loss": math.nan, "val/loss": math.inf}, 1)
    run.log_metrics({"train/loss": 2.5}, 2)
    run.log_params({"model": {"n_params": 12}})
    run.log_tags({"description": "one of everything"})
    run.log_text("It was a dark night", "samples/step_2.txt")
    (folder / "checkpoint.bin").write_bytes(b"weights")
    run.log_file(folder / "checkpoint.bin", "checkpoints")
    run.log_dataset("stdlib", "training", "ab" * 32, "/usr/lib/python3", {"bytes": 1000})
    return folder, run, run.finish("FINISHED", None)


Whole = tuple[Path, TrackedRun, Delivery]


def test_all_arrives(whole: Whole, client: MlflowClient) -> None:
    delivery = whole[2]
    assert delivery.arrived and delivery.message == ""
    run_id = str(delivery.run_id)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params == {"optim.lr": "0.001", "betas": "[0.9, 0.95]", "model.n_params": "12"}
    (step, value), second = history(client, run_id, "train/loss")
    assert step == 1 and math.isnan(value) and second == (2, 2.5)
    assert history(client, run_id, "val/loss") == [(1, sys.float_info.max)]  # MLflow's way to store infinity
    assert run.data.tags["mlflow.note.content"].startswith("one of everything\n\n| metric |")


def test_tags_say_where_the_run_comes_from(whole: Whole, get_run: GetRun) -> None:
    tags = get_run(str(whole[2].run_id)).data.tags
    expected = {"team": "b", "host": "h", "mlflow.parentRunId": "0" * 32, "git.state": "not a repository"}
    assert {name: tags.get(name) for name in expected} == expected
    assert tags["mlflow.source.name"] == sys.argv[0] and tags["mlflow.user"]


def test_artifacts_and_dataset(whole: Whole, client: MlflowClient) -> None:
    folder, _, delivery = whole
    root = Path(client.get_run(str(delivery.run_id)).info.artifact_uri.removeprefix("file://"))
    assert root.is_relative_to(folder.parent)
    assert (root / "config.yaml").read_text() == "seed: 1\n"
    assert (root / "samples/step_2.txt").read_text() == "It was a dark night"
    assert (root / "checkpoints/checkpoint.bin").read_bytes() == b"weights"
    assert "mlflow==" in (root / "packages.txt").read_text()
    assert json.loads((root / "hardware.json").read_text())["threads"] >= 1
    (used,) = client.get_run(str(delivery.run_id)).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.tags[0].value) == ("stdlib", ("ab" * 32)[:36], "training")
    assert json.loads(used.dataset.profile) == {"bytes": 1000}


def test_a_short_run_has_a_sample_of_the_system(whole: Whole, get_run: GetRun) -> None:
    metrics = get_run(str(whole[2].run_id)).data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0
    assert metrics["system/cpu_utilization_percentage"] > 0


def test_a_folder_belongs_to_one_run(whole: Whole, store: TrackingConfig) -> None:
    folder, _, delivery = whole
    with pytest.raises(TrackingError, match=f"is the folder of MLflow run {delivery.run_id}. Fix: use another"):
        start_run(store, folder / "run")


def test_resume_goes_on_in_the_same_run(store: TrackingConfig, tmp_path: Path, client: MlflowClient) -> None:
    first = start_run(store, tmp_path / "run", params={"max_steps": 4, "lr": 1.0})
    run_id = first.wait_ready(30)
    for step in range(1, 5):
        first.log_metrics({"train/loss": step / 10, "perf/step_seconds": 1.0}, step)
    assert first.finish("FAILED", "ValueError: boom\nmore").arrived
    run = client.get_run(run_id)
    assert run.info.status == "FAILED" and run.data.tags["error"] == "ValueError: boom\nmore"

    second = start_run(store, tmp_path / "run", params={"max_steps": 5, "lr": 1.0, "new": 1}, run_id=run_id)
    second.skip_known_after(2)
    assert second.wait_ready(30) == run_id
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING" and "error" not in run.data.tags
    for step in range(3, 6):
        second.log_metrics({"train/loss": step / 10, "perf/step_seconds": 2.0}, step)
    assert second.finish("FINISHED", None).arrived
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"max_steps": "4", "lr": "1.0", "new": "1"}
    assert run.data.tags["changed_on_resume"] == "max_steps: 4 -> 5"
    assert history(client, run_id, "train/loss") == [(step, step / 10) for step in range(1, 6)]
    assert sorted(history(client, run_id, "perf/step_seconds"))[2:6] == [(3, 1.0), (3, 2.0), (4, 1.0), (4, 2.0)]
    names = [artifact.path for artifact in client.list_artifacts(run_id)]
    assert "config.yaml" in names and any(name.startswith("resumed_") for name in names)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_resume_that_fails_changes_nothing(store: TrackingConfig, tmp_path: Path, client: MlflowClient) -> None:
    offline = OfflineRun(store, tmp_path / "run")
    offline.spec.save(offline.run_dir)
    writer = JournalWriter(offline.run_dir / "journal.jsonl")
    writer.metrics({"train/loss": 1.0}, 1)
    assert offline.carrier.attempt(closing=True)
    writer.metrics({"train/loss": 2.0}, 2)  # has not been sent
    writer.close()
    (offline.run_dir / "sender.log").write_text("an earlier life\n")
    before = _contents(offline.run_dir)

    client.delete_run(offline.run_id)
    second = start_run(store, offline.run_dir, params={"new": 1}, run_id=offline.run_id)
    with pytest.raises(TrackingError, match=r"is a deleted MLflow run of .*tracking\.new_run=true"):
        second.wait_ready(30)
    assert second.finish("FAILED", "no store") == Delivery(True, None, "")
    after = _contents(offline.run_dir)
    assert after.pop("sender.lock") == b""  # the first sender of the folder
    assert after == before

    client.restore_run(offline.run_id)
    offline.spec, offline.progress = Spec.load(offline.run_dir), Progress.load(offline.run_dir)
    assert offline.reopen().attempt(closing=False)
    assert history(client, offline.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(offline.run_id).data.params == {}


def test_a_new_run_continues_an_old_one(store: TrackingConfig, tmp_path: Path, client: MlflowClient) -> None:
    (tmp_path / "run").mkdir()
    first = JournalWriter(tmp_path / "run" / "journal.jsonl")
    for step in (1, 2, 3):
        first.metrics({"train/loss": float(step)}, step)
    copy_history(tmp_path / "run", tmp_path / "next", 2)
    second = start_run(store, tmp_path / "next", continues=("a" * 32, 2))
    run_id = second.wait_ready(30)
    second.log_metrics({"train/loss": 3.5}, 3)
    assert second.finish("FINISHED", None).arrived
    assert history(client, run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.5)]
    times = [event["t"] for event in metric_events(tmp_path / "run" / "journal.jsonl")]
    assert [m.timestamp for m in client.get_metric_history(run_id, "train/loss")][:2] == times[:2]
    tags = client.get_run(run_id).data.tags
    assert (tags["continues.run_id"], tags["continues.step"]) == ("a" * 32, "2")


def test_a_new_run_that_cannot_start_lost_nothing_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    JournalWriter(tmp_path / "run" / "journal.jsonl").metrics({"train/loss": 1.0}, 1)
    copy_history(tmp_path / "run", tmp_path / "next", 1)
    second = start_run(make_config("http://127.0.0.1:9"), tmp_path / "next", continues=("a" * 32, 1))
    with pytest.raises(TrackingError, match="does not answer"):
        second.wait_ready(30)
    assert second.finish("FAILED", "no store") == Delivery(False, None, "")


def test_a_killed_training_process_loses_nothing(store: TrackingConfig, tmp_path: Path, client: MlflowClient) -> None:
    command = [sys.executable, "-c", TRAINING, str(tmp_path), store.uri]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout is not None
        run_id, sender, worker, heavy = training.stdout.readline().split(maxsplit=3)
        assert heavy == "[]\n"
        os.kill(int(sender), signal.SIGTERM)  # a scheduler that ends the group must not end the sender
        training.send_signal(signal.SIGKILL)
        try:
            assert _wait_until_gone(int(sender), 15)
        finally:
            os.kill(int(worker), signal.SIGKILL)
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert "was killed" in run.data.tags["error"]
    assert history(client, run_id, "train/loss") == [(step, 1.0 / (step + 1)) for step in range(500)]


@pytest.mark.long
def test_another_process_logs_into_the_run(store: TrackingConfig, tmp_path: Path, client: MlflowClient) -> None:
    run = start_run(store, tmp_path / "run")
    run_id = run.wait_ready(30)
    RunLog.attach(tmp_path / "run", records=True).log_metrics({"train/loss": 1.0}, 1)
    again = RunLog.attach(tmp_path / "run", records=True)  # repeats step 1 and goes on
    again.skip_known_after(0)
    silent = RunLog.attach(tmp_path / "run", records=False)
    silent.skip_known_after(0)
    for step in (1, 2):
        again.log_metrics({"train/loss": 1.0}, step)
        silent.log_metrics({"train/loss": 9.0}, step)
    silent.log_text("nothing", "sample.txt")
    assert run.finish("FINISHED", None).arrived
    assert history(client, run_id, "train/loss") == [(1, 1.0), (2, 1.0)]
    assert "sample.txt" not in [artifact.path for artifact in client.list_artifacts(run_id)]


NICER = """
import os, threading
from deepseek_exp.tracking.sender import _be_nice
thread = threading.Thread(target=_be_nice, args=[7])
thread.start()
thread.join()
print(os.getpriority(os.PRIO_PROCESS, threading.main_thread().native_id))
"""


def test_a_process_gives_way_whole_whichever_of_its_threads_asks_for_it() -> None:
    """Linux has a nice level for each thread; the one that sees the training end is not the one that sends."""
    command = [sys.executable, "-c", NICER]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, start_new_session=True, check=True)
    assert int(said.stdout) == 7


@pytest.mark.long
def test_two_runs_may_create_the_database_at_once(tmp_path: Path) -> None:
    cfg = make_config(f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    runs = [start_run(cfg, tmp_path / name) for name in ("a", "b")]
    assert len({run.wait_ready(60) for run in runs}) == 2
    assert all(run.finish("FINISHED", None).arrived for run in runs)


def test_a_sender_that_died_is_told(store: TrackingConfig, tmp_path: Path) -> None:
    run = start_run(store, tmp_path / "run")
    run._process.kill()
    with pytest.raises(TrackingError, match=r"could not be opened .*Fix: read .*sender.log"):
        run.wait_ready(30)
    run.log_metrics({"train/loss": 1.0}, 1)
    delivery = run.finish("FINISHED", None)
    assert not delivery.arrived
    assert delivery.message.startswith("1 metric values and 0 artifacts have not reached sqlite:")
    assert [event["kind"] for event in read_events(tmp_path / "run/journal.jsonl", 0)[0]] == ["start", "metrics", "end"]


def test_a_sender_that_still_collects_the_facts_holds_up_nobody(
    store: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 8\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run = start_run(replace(store, drain_seconds=1.0), tmp_path / "run")
    run.wait_ready(30)
    delivery = run.finish("FINISHED", None)
    assert run._process.returncode == 1  # it ended itself at the deadline
    assert not delivery.arrived
