"""run.py with several ranks: what MLflow and the person in front of it are told, however the ranks end."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_exp.commands import dispatch, spawn
from deepseek_exp.errors import DiskError
from deepseek_exp.experiment.job import Job, make_job
from deepseek_exp.launch import local, worker
from tests import forks, runs
from tests.composing import shared_hydra, tree
from tests.launch.test_launch import family, wait_for
from tests.test_run import all_runs

EVAL = ("do=eval", "device=cpu", "parallel.dp=2", "launch.socket_ifname=lo")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint of one process, on a text."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("".join(f"line {i} has {i * i} in it\n" for i in range(4000)))
    own = [o for o in runs.TRACKED if o != "data=synthetic"]
    done = forks.run(folder, *own, "data=text", f"data.path={folder}/text.txt", "trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    return folder


def loss_of(folder: Path) -> float:
    (loss,) = set(runs.trace(runs.run_dirs(folder)[0], "val/loss").values())
    return loss


def newest(folder: Path) -> Path:
    return max((folder / "outputs/runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def check_finished(folder: Path) -> None:
    """The newest run was recorded once, with the loss that one process found."""
    assert list(runs.trace(newest(folder), "val/loss").values()) == [loss_of(folder)]
    run = all_runs(folder)[0]
    assert (run.info.status, run.data.params["launch.socket_ifname"]) == ("FINISHED", "lo")
    assert {"env.OMP_NUM_THREADS", "env.NCCL_SOCKET_IFNAME", "env.GLOO_SOCKET_IFNAME"} <= set(run.data.tags)


def test_rank_0_speaks_and_is_recorded(trained):
    done = forks.run(trained, *EVAL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluating") == done.stdout.count("validation") == 1
    assert done.stdout == (newest(trained) / "ranks/rank_0.log").read_text()
    check_finished(trained)


def test_a_killed_rank_fails_the_run(trained):
    process = forks.start(trained, *EVAL)
    wait_for(lambda: len(family(newest(trained).relative_to(trained) / "ranks/job.json")) == 2, 60)
    first = family(newest(trained).relative_to(trained) / "ranks/job.json")[0]
    rank = int(first.environ()["RANK"])
    first.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    want = rf"rank={rank} of 2 was killed by SIGKILL. Fix: read outputs/runs/\S+/ranks/rank_{rank}.log; "
    assert re.match(want, err), err
    run = all_runs(trained)[0]
    assert run.info.status == "FAILED" and re.match(want, run.data.tags["error"])


@pytest.mark.long
def test_an_error_of_the_user_reads_as_in_one_process(trained):
    text, n_runs = trained / "text.txt", len(all_runs(trained))
    before = text.read_text()
    text.write_text(before + "more and more\n" * 2000)
    alone, together = forks.run(trained, *EVAL[:2]), forks.run(trained, *EVAL)
    text.write_text(before)
    assert "(changed: tokenizer)" in alone.stderr
    message = alone.stderr.splitlines()[-1]  # after what preparing the text said
    assert (together.returncode, together.stderr) == (alone.returncode, f"{message}\n")
    assert len(all_runs(trained)) == n_runs  # refused before anything is recorded


@pytest.mark.long
def test_two_nodes_by_the_commands_that_are_printed(trained):
    held = runs.hold_port()
    port = f"launch.master_port={held.getsockname()[1]}"
    done = forks.run(trained, *EVAL, "launch=torchrun", "launch.n_nodes=2", "launch.master_addr=127.0.0.1", port)
    assert done.returncode == 0, done.stderr
    command = done.stdout.strip().splitlines()[-1]
    assert done.stdout.startswith("run this on each of the 2 machines:\n\ncd ")
    node = [subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [n.communicate(timeout=120)[0] for n in node]
    assert [n.returncode for n in node] == [0, 0]
    assert "".join(said).count("validation") == 1
    check_finished(trained)


FAKES = {
    "scontrol": "echo 127.0.0.1; sleep 0.2; echo 127.0.0.2",  # whoever reads one line alone breaks its pipe
    "srun": 'shift 2; "$@" & first=$!; "$@" & second=$!; wait $first && wait $second',  # by number: %2 may be gone
    "sbatch": 'echo "Submitted batch job 7"; SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n bash "$1" > slurm.log 2>&1',
}


@pytest.mark.long
def test_two_nodes_of_slurm(trained, tmp_path, monkeypatch):
    """With the programs of Slurm replaced by ones that use this machine twice; no Slurm is here."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    held = runs.hold_port()
    port = f"launch.master_port={held.getsockname()[1]}"
    done = forks.run(trained, *EVAL, "launch=slurm", "launch.n_nodes=2", "launch.submit=true", port)
    assert done.returncode == 0, done.stderr + "\n" + "\n".join(f.read_text() for f in trained.rglob("slurm.log"))
    assert re.fullmatch(r"wrote     outputs/runs/\S+/ranks/job.sbatch\nsubmitted Submitted batch job 7\n", done.stdout)
    check_finished(trained)


def job(folder: Path, *overrides: str) -> Job:
    composed = tree(*runs.TRACKED, *overrides, f"output_dir={folder}")
    composed.tracking.uri = f"sqlite:///{folder}/outputs/mlflow.db"
    with shared_hydra():
        return make_job(composed, overrides, "tiny", None)


def test_a_job_survives_the_trip_to_its_ranks(tmp_path):
    before = job(tmp_path, "parallel=3d", "device=cpu", "data=mixture", f"+data.mixture.a.path={tmp_path}")
    file = before.save("abc")
    assert Job.load(file) == (before, "abc")
    assert file.stat().st_mode & 0o77 == 0
    resumed = replace(before, checkpoint=tmp_path / "step-1")
    assert Job.load(resumed.save(None)) == (resumed, None)


def test_stopped_ranks_are_a_killed_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local, "run", lambda *_, **__: worker.RankResult(stopped_at=3, signum=signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        dispatch.run(job(tmp_path, "parallel=3d", "device=cpu"))
    assert left.value.code == 128 + signal.SIGTERM
    assert re.search(
        r"^stopped by SIGTERM after step 3; the checkpoint is saved. Continue with: ", capsys.readouterr().out
    )
    (run,) = all_runs(tmp_path)
    assert run.info.status == "KILLED" and run.data.tags["error"] == "stopped by SIGTERM after step 3"


def test_the_disk_is_tested_before_a_run(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked, found = [], job(tmp_path, "launch=torchrun", "parallel=3d")
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "check_writable", lambda *words: asked.append(words))
        dispatch.run(found)
    assert asked == [("output_dir", tmp_path), ("run_dir", found.run_dir)]
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(DiskError, match=r"output_dir='.*' cannot be written \(No space left on device\)\. Fix: free"):
        dispatch.run(found)


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_what_starts_ranks_elsewhere_is_private(tmp_path, launcher):
    found, mask = job(tmp_path, f"launch={launcher}", "parallel=3d"), os.umask(0)
    try:
        spawn.hand_out(found)
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (found.run_dir / "ranks").iterdir()}
    assert modes == dict.fromkeys(["job.json", "job.sbatch"][: 1 + (launcher == "slurm")], 0o600)
