"""tracking=none: a run with its folder, journal and checkpoints, without MLflow and without a sender."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepseek_exp.config import Tracker
from deepseek_exp.errors import TrackingError
from deepseek_exp.tracking import local_sweep_table
from deepseek_exp.tracking.journal import read_all
from deepseek_exp.tracking.rundir import LOG, Progress, Spec
from tests import forks, runs
from tests.tracking.tracking_parts import make_config, start_run

OWN = [o for o in runs.QUICK if not o.startswith("trainer.max_steps=")]


def test_a_run_without_a_store(tmp_path):
    cfg, run_dir = make_config("sqlite:///none.db", backend=Tracker.none), tmp_path / "run"
    run = start_run(cfg, run_dir, params={"n_params": 7}, tags={"overrides": "seed=1"})
    run_id = run.wait_ready(0)
    assert re.fullmatch("[0-9a-f]{32}", run_id) and run.notes == []
    run.log_metrics({"val/loss": 2.5}, 3)
    with pytest.raises(TrackingError, match="is the folder of"):
        start_run(cfg, run_dir, run_id="f" * 32)
    delivery = run.finish("FAILED", "DataError: no text\nmore")
    assert (delivery.arrived, delivery.run_id, delivery.message) == (True, run_id, "")
    assert [e["kind"] for e in read_all(run_dir / "journal.jsonl")] == ["start", "metrics", "end"]
    assert not (run_dir / LOG).exists() and Spec.load(run_dir).tracking.backend is Tracker.none
    (row,) = local_sweep_table(tmp_path)
    assert (row.job, row.run_id, row.overrides, row.status) == ("run", run_id, "seed=1", "FAILED")
    assert (row.val_loss, row.n_params, row.error) == (2.5, 7, "DataError: no text")

    resumed = start_run(cfg, run_dir, run_id=run_id)
    assert resumed.wait_ready(0) == run_id
    resumed.finish("FINISHED", None)
    assert Spec.load(run_dir).run_id == run_id and local_sweep_table(tmp_path)[0].status == "FINISHED"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untracked")
    done = forks.run(folder, *OWN, "trainer.max_steps=6")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.xdist_group("untracked")
class TestRun:
    def test_it_leaves_what_a_run_leaves_but_no_database(self, finished):
        folder, out = finished
        (run_dir,) = runs.run_dirs(folder)
        assert len(runs.trace(run_dir, "train/loss")) == 6 and list(runs.trace(run_dir, "val/loss")) == [6]
        assert not (run_dir / LOG).exists() and not list(Path(folder).rglob("mlflow*"))
        run_id = Progress.load(run_dir).run_id
        assert f"run {run_id[:12]}, not in MLflow" in out and "mlflow ui" not in out and "make ui" not in out
        assert f"resume={run_id[:12]} trainer.max_steps=12" in out

    def test_its_id_is_resumed(self, finished):
        folder, _ = finished
        (run_dir,) = runs.run_dirs(folder)
        resume = f"resume={Progress.load(run_dir).run_id[:12]}"
        done = forks.run(folder, resume, "trainer.max_steps=8")
        assert done.returncode == 0, done.stderr
        further = next(path for path in runs.run_dirs(folder) if path != run_dir)
        assert Spec.load(further).tags["continues.run_id"] == Progress.load(run_dir).run_id
        assert runs.last_step(further) == 8 and not (further / LOG).exists()


@pytest.mark.xdist_group("untracked")
def test_a_sweep_prints_its_table_from_the_journals(tmp_path):
    done = forks.run(tmp_path, "-m", *OWN, "trainer.max_steps=4", "optim.clip_norm=0", "optim.lr=1e30,1e-3")
    assert done.returncode == 1, done.stderr
    table = done.stdout[done.stdout.index("overrides") :]
    assert "FINISHED" in table and "FAILED" in table and "1 of 2 jobs failed" in table
    assert re.search(r"resume=[0-9a-f]{12} do=sample", table) and not list(tmp_path.rglob("mlflow*"))
