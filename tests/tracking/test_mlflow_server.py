"""Runs against a real MLflow server that is not there, goes away, comes back or hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deepseek_exp.errors import TrackingError
from deepseek_exp.tracking.run import Delivery
from deepseek_exp.tracking.rundir import Progress
from tests.runs import hold_port
from tests.tracking.tracking_parts import history, make_config, start_run


class Server:
    """An MLflow server on this machine, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self._held = hold_port()  # also while the server is down
        self.port = self._held.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        self._command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
        self._command += ["--artifacts-destination", str(folder / "artifacts")]
        self._log = folder / "server.log"

    def start(self) -> None:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._command, start_new_session=True, env=env, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.1)

    def signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def stop(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()


@dataclass
class Outage:
    """What became of two runs in an outage: one outlives it, the other ends within it."""

    server: Server
    outlived: Delivery
    ended: Delivery


def _send_rest(delivery: Delivery) -> subprocess.CompletedProcess[str]:
    command = delivery.message.partition("Send them later with: ")[2]
    return subprocess.run(command, shell=True, cwd="/", capture_output=True, text=True)


def _wait_until_sent(run_dir: Path) -> None:
    deadline = time.monotonic() + 30
    while Progress.load(run_dir).values_offset < (run_dir / "journal.jsonl").stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def outage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outage]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder)
    server.start()
    try:
        cfg = make_config(server.uri)
        long = start_run(cfg, folder / "long")
        short = start_run(make_config(server.uri, drain_seconds=1.0), folder / "short")
        for run in (long, short):
            run.wait_ready(30)
            run.log_metrics({"train/loss": float("nan"), "val/loss": 1.0}, 1)
            _wait_until_sent(run.run_dir)
        server.stop()
        for run in (long, short):
            run.log_metrics({"train/loss": 2.0}, 2)
            run.log_text("hello", "hello.txt")
        ended = short.finish("FINISHED", None)
        server.start()
        long.log_metrics({"train/loss": 3.0}, 3)
        outlived = long.finish("FINISHED", None)
        yield Outage(server, outlived, ended)
    finally:
        server.stop()


def test_a_server_that_comes_back_gets_all(outage: Outage) -> None:
    assert outage.outlived.arrived, outage.outlived.message
    client = MlflowClient(outage.server.uri)
    first, *others = history(client, str(outage.outlived.run_id), "train/loss")
    assert first[0] == 1 and first[1] != first[1]  # NaN
    assert others == [(2, 2.0), (3, 3.0)]
    run = client.get_run(str(outage.outlived.run_id))
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert "hello.txt" in [artifact.path for artifact in client.list_artifacts(run.info.run_id)]


def test_a_server_that_is_gone_holds_up_nobody(outage: Outage) -> None:
    assert not outage.ended.arrived
    assert f"1 metric values and 1 artifacts have not reached {outage.server.uri} (connection" in outage.ended.message
    assert "/short/journal.jsonl. Send them later with: cd " in outage.ended.message


@pytest.mark.long
def test_the_command_of_the_message_sends_the_rest(outage: Outage) -> None:
    resent = _send_rest(outage.ended)
    assert resent.returncode == 0, resent.stderr
    assert f"is in run {outage.ended.run_id}" in resent.stdout
    client = MlflowClient(outage.server.uri)
    assert [step for step, _ in history(client, str(outage.ended.run_id), "train/loss")] == [1, 2]
    assert client.get_run(str(outage.ended.run_id)).info.status == "FINISHED"
    assert "hello.txt" in [artifact.path for artifact in client.list_artifacts(str(outage.ended.run_id))]
    assert _send_rest(outage.ended).returncode == 0


def test_a_server_that_hangs_holds_up_nobody(outage: Outage, tmp_path: Path) -> None:
    run = start_run(make_config(outage.server.uri, drain_seconds=1.0), tmp_path / "run")
    run.wait_ready(30)
    outage.server.signal(signal.SIGSTOP)
    try:
        run.log_metrics({"train/loss": 1.0}, 1)
        delivery = run.finish("FINISHED", None)
        assert run._process.returncode == 1  # it ended itself at the deadline
    finally:
        outage.server.signal(signal.SIGCONT)
    assert not delivery.arrived


def test_no_server_is_an_error(tmp_path: Path) -> None:
    run = start_run(make_config("http://localhost:9"), tmp_path / "run")
    with pytest.raises(TrackingError) as caught:
        run.wait_ready(30)
    assert str(caught.value) == (
        "tracking.uri='http://localhost:9' does not answer (connection refused). "
        "Fix: start that server, or set tracking.uri=sqlite:///outputs/mlflow.db."
    )


def test_a_server_that_never_answers_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = start_run(make_config(uri), tmp_path / "run")
        with pytest.raises(TrackingError, match=r"did not answer within 1 seconds. Fix: see whether"):
            run.wait_ready(1)
        assert run._process.wait(5) == -signal.SIGKILL
