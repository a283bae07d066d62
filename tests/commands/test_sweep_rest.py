"""The jobs of a sweep that was interrupted: each is run once by the commands that are printed."""

from __future__ import annotations

import itertools
import os
import pickle
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from deepseek_exp import config
from deepseek_exp.commands import sweep, sweep_rest
from deepseek_exp.config import Tracker, compose
from tests import forks, runs
from tests.launch.test_launch import wait_for
from tests.test_run import all_runs

SWEEP = ("size=tiny", "a=1,2,3", "+x.y='a, b'", "b=range(0,2)", "c='p q',r")


def jobs(overrides):
    return [sorted(words) for words in itertools.product(*sweep_rest.grid(overrides).values())]


@pytest.mark.parametrize("n_done", range(13))
def test_the_rest_is_run_once_and_in_order(n_done):
    every = jobs(SWEEP)
    assert len(every) == sweep_rest.n_jobs(SWEEP) == 12
    sweeps = sweep_rest.rest(SWEEP, n_done)
    assert [job for words in sweeps for job in jobs(words)] == every[n_done:]
    assert len(sweeps) <= 3


@pytest.mark.long
def test_a_sweep_that_is_interrupted_says_how_it_goes_on(tmp_path):
    """The first job ends, the second is stopped by Ctrl-C while it trains, two are left."""
    own = [o for o in runs.TRACKED if not o.startswith("trainer.max_steps=")]
    process = forks.start(tmp_path, "-m", *own, "seed=1,2", "trainer.max_steps=4,100000")
    wait_for(lambda: any(runs.last_step(f) >= 2 for f in tmp_path.glob("outputs/multiruns/*/1")), 200)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err, err
    told = out.splitlines()
    assert told[-2] == "the sweep was interrupted in job 2 of 4; 2 remain. Run them with"
    rest = shlex.split(told[-1])[3:]
    assert rest == [*own, "seed=2", "trainer.max_steps=4,100000"]
    assert "Continue with: " in out and len([line for line in told if " KILLED " in line]) == 1
    parent = next(run for run in all_runs(tmp_path) if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FAILED"


def test_plans_are_no_runs(tmp_path):
    done = forks.run(tmp_path, "-m", "do=plan", "size=tiny,small")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model     v1_dense") == 2 and "val/loss" not in done.stdout
    assert not (tmp_path / "outputs/mlflow.db").exists()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a sweep of a folder in this process, without a store."""
    monkeypatch.setattr(sweep.tracking, "start_sweep", lambda *_, **__: "run")
    monkeypatch.setattr(sweep.atexit, "register", lambda *_: None)
    monkeypatch.setattr(sweep, "_tracking", lambda _: SimpleNamespace(run_name=None, backend=Tracker.mlflow))

    def start_in(folder: Path) -> None:
        hydra = {"overrides": {"task": ["seed=1,2"]}, "sweep": {"dir": str(folder)}}
        sweep.SweepRun().on_multirun_start(OmegaConf.create({"hydra": hydra, "output_dir": str(tmp_path)}))

    return start_in


def test_no_two_sweeps_share_a_folder(tmp_path, start, capsys):
    start(tmp_path / "sweep")
    with pytest.raises(SystemExit):
        start(tmp_path / "sweep")
    assert "sweep.json' cannot be used (File exists). Fix: " in capsys.readouterr().err
    conf = OmegaConf.load(runs.ROOT / "conf/config.yaml").hydra.sweep
    assert "${pid:}" in OmegaConf.to_container(conf, resolve=False)["dir"]


def test_the_folder_of_a_sweep_is_tested_before_its_run_is_made(tmp_path, start, monkeypatch, capsys):
    monkeypatch.setattr(sweep.tracking, "start_sweep", lambda *_, **__: pytest.fail("a run is made"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        start(tmp_path / "file" / "sweep")
    want = f"hydra.sweep.dir='{tmp_path}/file/sweep' cannot be written (Not a directory). Fix: "
    assert capsys.readouterr().err.startswith(want)


def test_what_hydra_records_of_a_sweep_is_private(tmp_path, start):
    mask = os.umask(0)
    try:
        start(tmp_path / "sweep")
    finally:
        os.umask(mask)
    assert (tmp_path / "sweep" / sweep.HYDRA_FILE).stat().st_mode & 0o777 == 0o600


def test_a_job_that_fails_before_it_has_a_run_is_counted(tmp_path, capsys):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / sweep.FAILED_FILE).touch()
    hydra = {"overrides": {"task": ["seed=1,2"]}, "sweep": {"dir": str(tmp_path)}}
    with pytest.raises(SystemExit) as left:
        sweep.SweepRun().on_multirun_end(OmegaConf.create({"hydra": hydra, "output_dir": str(tmp_path)}))
    assert left.value.code == 1 and "1 of 2 jobs failed" in capsys.readouterr().out


def test_the_jobs_of_a_sweep_share_its_folder_in_whatever_process():
    config.register()
    with compose.hydra_ready():
        hydra = GlobalHydra.instance().hydra
        whole = hydra.compose_config("config", ["seed=1,2"], RunMode.MULTIRUN, from_shell=False)
        folder = whole.hydra.sweep.dir
        reader, writer = os.pipe()
        if os.fork() == 0:  # as a launcher does that runs jobs at the same time
            try:
                job = hydra.config_loader.load_sweep_config(pickle.loads(pickle.dumps(whole)), ["seed=1"])
                os.write(writer, job.hydra.sweep.dir.encode())
            finally:
                os._exit(0)
        os.close(writer)
        assert os.read(reader, 4096).decode() == folder
        assert str(os.getpid()) in folder


def test_the_record_of_a_sweep_is_whole_while_jobs_hide_its_secrets(tmp_path, monkeypatch):
    file = tmp_path / sweep.HYDRA_FILE
    file.touch(0o600)
    file.write_text("tracking: {uri: 'http://a:hunter2@h'}\n", encoding="utf-8")
    monkeypatch.setattr(Path, "replace", lambda part, _: seen.append((part.stat().st_mode & 0o777, part.read_text())))
    seen: list[tuple[int, str]] = []
    sweep._redact_file(file)
    assert file.read_text(encoding="utf-8").startswith("tracking: {uri")
    assert seen == [(0o600, "tracking:\n  uri: http://a:***@h\n")]
