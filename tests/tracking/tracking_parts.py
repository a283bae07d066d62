"""Runs for the tests: with a sender process of their own, or with its parts called in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from deepseek_exp.config import TrackingConfig
from deepseek_exp.tracking import TrackedRun
from deepseek_exp.tracking.carry import Carrier
from deepseek_exp.tracking.outbox import open_run
from deepseek_exp.tracking.rundir import Progress, Spec


def make_config(uri: str, **changes: Any) -> TrackingConfig:
    cfg = TrackingConfig(
        uri=uri,
        experiment="tests",
        run_name=None,
        parent_run_id=None,
        tags={},
        system_metrics=False,
        drain_seconds=20.0,
    )
    return replace(cfg, **changes)


def start_run(cfg: TrackingConfig, run_dir: Path, **changes: Any) -> TrackedRun:
    arguments: dict[str, Any] = {
        "name": run_dir.name,
        "params": {},
        "config_yaml": "seed: 1\n",
        "tags": {},
        "source_dir": run_dir.parent,
        "artifact_dir": run_dir.parent / "artifacts",
    }
    return TrackedRun.start(cfg, run_dir=run_dir, **{**arguments, **changes})


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


class OfflineRun:
    """A run folder and its run in the store without a second process: the sender's parts, called by the test."""

    def __init__(self, cfg: TrackingConfig, run_dir: Path, params: dict[str, str] | None = None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.spec = Spec(cfg, "offline", params or {}, "", {}, str(run_dir), "test", str(run_dir / "art"), None, 1000)
        self.progress = Progress(facts_sent=True)
        (run_dir / "journal.jsonl").touch()
        self.carrier = self.reopen()

    def reopen(self) -> Carrier:
        outbox, _ = open_run(self.run_dir, self.spec, self.progress, {}, live=False)
        return Carrier(self.run_dir, self.spec, self.progress, outbox, None)

    @property
    def run_id(self) -> str:
        return str(self.progress.run_id)
