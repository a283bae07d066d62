"""Ranks as real processes: that they end together, whatever ends first, and that it is told first."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deepseek_exp.config import LaunchConfig, Launcher
from deepseek_exp.config.rules import launch
from deepseek_exp.launch import local, multi_node, worker
from tests.runs import ROOT

# Two ranks, of which one does something, are enough to see what the other does; "the others" are two of three.
N_RANKS = 2
MORE_RANKS = 3


def start(folder: Path, what: str, launcher: list[str] | None = None, n_ranks: int = N_RANKS) -> subprocess.Popen[str]:
    """Start ranks by our launcher, or by another."""
    ours = [sys.executable, "-m", "tests.launch.launch_parts", "parent"]
    command = [*(launcher or ours), str(folder), str(n_ranks), what]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}  # gloo complains of a host name that it cannot resolve
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """Where a test fails nobody would end what it started."""
    yield
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(tmp_path) in process.cmdline():
                process.kill()


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Wait for something to be; returns how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.01)
    return time.monotonic() - began


def family(folder: Path) -> list[psutil.Process]:
    """List the ranks and their loaders: what has the test's folder in its command line, or came from such."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            is_a_rank = str(folder) in words and {"rank", "deepseek_exp.commands.rank"} & set(words)
            if is_a_rank and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass  # it has just ended
    return found


def work_has_begun(folder: Path, n_ranks: int = N_RANKS) -> bool:
    return len(list(folder.glob("*.pid"))) == n_ranks


def pids(folder: Path, n_ranks: int = N_RANKS) -> list[int]:
    return [int((folder / f"{rank}.pid").read_text()) for rank in range(n_ranks)]


def is_stopped(pid: int) -> bool:
    """Say whether each thread has stopped; one that has not yet may still take a signal."""
    states = [re.search(r"^State:\s*(\w)", f.read_text(), re.M)[1] for f in Path(f"/proc/{pid}/task").glob("*/status")]
    return set(states) == {"T"}


def was_told(pid: int) -> bool:
    """Say whether a stopped process has been sent SIGUSR1."""
    pending = re.search(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(pending[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def is_gone(pid: int) -> bool:
    """Say whether a process has ended; one that nobody has waited for (a zombie) has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_ranks_meet_and_rank_0_gives_its_result(tmp_path):
    parent = start(tmp_path, "end", n_ranks=MORE_RANKS)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 0, err
    assert out == "rank 0 has 1 threads\nRankResult(loss=3.0, stopped_at=None, signum=10)\n".replace(
        "10", repr(signal.SIGUSR1)
    )
    assert err == ""
    for rank in range(MORE_RANKS):
        assert (tmp_path / f"ranks/rank_{rank}.log").read_text() == f"rank {rank} has 1 threads\n"
    assert family(tmp_path) == []


def test_a_rank_that_raises_is_told_first_and_ends_the_others(tmp_path):
    parent = start(tmp_path, "raise")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    wait_for(lambda: family(tmp_path) == [], 10)
    out, err = parent.communicate(timeout=10)
    assert parent.returncode == 1 and err == ""
    lines = out.splitlines()
    assert re.fullmatch(r"RankError: rank=1 of 2 died of ValueError: one. Fix: read \S*ranks/rank_1.log\.", lines[1])
    assert lines[-3:] == ['    raise ValueError("one\\ntwo")', "ValueError: one", "two"]
    assert "ValueError: one\ntwo" in (tmp_path / "ranks/rank_1.log").read_text()


@pytest.mark.long
def test_an_error_of_the_user_reads_as_in_one_process(tmp_path):
    out, err = start(tmp_path, "user_error").communicate(timeout=60)
    assert out == "rank 0 has 1 threads\nDataError: data.path='x' is gone. Fix: bring it back.\n" and err == ""
    assert family(tmp_path) == []


def test_a_rank_that_is_killed_is_told_first_and_ends_the_others(tmp_path):
    parent = start(tmp_path, "run with a child", n_ranks=MORE_RANKS)
    rank = random.randrange(MORE_RANKS)
    wait_for(lambda: work_has_begun(tmp_path, MORE_RANKS), 60)
    os.kill(pids(tmp_path, MORE_RANKS)[rank], signal.SIGKILL)
    assert wait_for(lambda: family(tmp_path) == [], 10) < 5
    out, err = parent.communicate(timeout=10)
    assert parent.returncode == 1 and err == ""
    assert re.match(
        rf"RankError: rank={rank} of 3 was killed by SIGKILL. Fix: read \S*ranks/rank_{rank}.log; if you did not "
        r"kill it, it probably ran out of memory \(check dmesg\)\.\n",
        out.split("\n", 1)[1],
    )


@pytest.mark.long
def test_a_rank_that_leaves_without_a_result_ends_the_others(tmp_path):
    ranks = tmp_path / worker.FOLDER
    ranks.mkdir()
    worker.outcome_path(ranks, 1).write_text('{"error": null}')  # of an earlier life of the run
    out, _ = start(tmp_path, "leave").communicate(timeout=60)
    assert "RankError: rank=1 of 2 left with exit code 0 and no result." in out
    assert family(tmp_path) == []


@pytest.mark.long
def test_a_rank_that_hangs_and_ignores_sigterm_is_killed(tmp_path):
    parent = start(tmp_path, "go on")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    for pid in pids(tmp_path)[1:]:
        os.kill(pid, signal.SIGSTOP)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    assert wait_for(lambda: family(tmp_path) == [], 10) < 5
    assert "rank=0 of 2 was killed by SIGKILL" in parent.communicate(timeout=10)[0]


def test_a_killed_parent_leaves_no_orphans(tmp_path):
    parent = start(tmp_path, "go on")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    ranks = pids(tmp_path)
    parent.kill()
    wait_for(lambda: all(is_gone(pid) for pid in ranks), 3)
    wait_for(lambda: family(tmp_path) == [], 10)  # their loaders look for them every 5 seconds
    parent.communicate()


@pytest.mark.parametrize(
    "signum",
    [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.long) for s in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_to_the_parent_stops_all_ranks_after_one_step(tmp_path, signum):
    parent = start(tmp_path, "run with a child")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    parent.send_signal(signum)
    out, err = parent.communicate(timeout=20)
    assert parent.returncode == 0, err
    (step,) = {(tmp_path / f"{rank}.stopped").read_text() for rank in range(N_RANKS)}
    assert f"RankResult(loss=None, stopped_at={step}, signum={int(signum)})" in out
    assert family(tmp_path) == []


@pytest.mark.long
def test_ranks_with_nothing_to_save_are_ended_at_once(tmp_path):
    """As do=eval asks for: its ranks look at no signal before they end."""
    parent = start(tmp_path, "go on and save nothing")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGSTOP)  # so that they hear of nothing
    parent.send_signal(signal.SIGINT)
    out, err = parent.communicate(timeout=20)
    assert "RankResult(loss=None, stopped_at=0, signum=2)" in out, out + err
    assert family(tmp_path) == []


def test_other_machines_cannot_reach_the_store():
    store = local._local_store()
    listening = [c for c in psutil.Process().net_connections() if c.laddr and c.laddr.port == store.port]
    assert {c.laddr.ip for c in listening if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    store.set("a", "b")
    assert store.get("a") == b"b"


def test_what_a_rank_leaves_after_a_disk_error_is_worded_and_private(tmp_path, monkeypatch):
    class Left(Exception):
        pass

    def leave(code):
        raise Left

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv(worker.PARENT, "1")
    monkeypatch.setenv("RANK", "0")
    mask = os.umask(0)
    try:
        rank = local._start([sys.executable, "-c", "pass"], 0, tmp_path, {})
        rank.process.wait()
        with pytest.raises(Left):
            worker._leave(tmp_path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    finally:
        os.umask(mask)
    outcome = json.loads(worker.outcome_path(tmp_path, 0).read_text())
    assert outcome["error"].startswith(f"DiskError: output_dir='{tmp_path.parent}' cannot be written (No space left")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"rank_0.json": 0o600, "rank_0.log": 0o600}


@pytest.mark.long
def test_a_signal_while_the_ranks_start_is_not_lost(tmp_path):
    parent = start(tmp_path, "go on")
    wait_for(lambda: len(family(tmp_path)) >= N_RANKS, 60)
    parent.send_signal(signal.SIGTERM)
    out, err = parent.communicate(timeout=60)
    assert "stopped_at=0, signum=15" in out, out + err


def test_a_second_signal_ends_it_at_once(tmp_path):
    parent = start(tmp_path, "go on")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGSTOP)  # so that they cannot stop in time
    wait_for(lambda: all(is_stopped(pid) for pid in pids(tmp_path)), 10)
    parent.send_signal(signal.SIGTERM)
    wait_for(lambda: all(was_told(pid) for pid in pids(tmp_path)), 10)  # two signals that wait become one
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(5) == -signal.SIGTERM
    parent.communicate()
    wait_for(lambda: family(tmp_path) == [], 10)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(N_RANKS), "--standalone",
            "--signals-to-handle", multi_node.SIGNALS, "-m", "tests.launch.launch_parts", "rank"]  # fmt: skip


def test_torchrun_stops_the_same_ranks_by_sigusr1(tmp_path):
    torchrun = start(tmp_path, "go on", TORCHRUN)
    wait_for(lambda: work_has_begun(tmp_path), 60)
    torchrun.send_signal(signal.SIGUSR1)
    torchrun.communicate(timeout=30)
    assert len({(tmp_path / f"{rank}.stopped").read_text() for rank in range(N_RANKS)}) == 1


@pytest.mark.long
def test_torchrun_tells_the_same_error(tmp_path):
    out, err = start(tmp_path, "raise", TORCHRUN).communicate(timeout=60)
    assert out == "rank 0 has 1 threads\n" and "ValueError: one" in err
    wait_for(lambda: family(tmp_path) == [], 10)  # torchrun leaves the loaders to their own look, every 5 seconds


@pytest.mark.long
def test_torchrun_takes_its_ranks_along(tmp_path):
    torchrun = start(tmp_path, "go on", TORCHRUN)
    wait_for(lambda: work_has_begun(tmp_path), 60)
    torchrun.kill()
    wait_for(lambda: family(tmp_path) == [], 10)
    torchrun.communicate()


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert (local.threads(0, 8), local.threads(0, 64), local.threads(3, 8)) == (2, 1, 3)


LAUNCH = LaunchConfig(
    launcher=Launcher.torchrun, n_nodes=4, ranks_per_node=0, master_addr="192.168.1.1", master_port=29500,
    socket_ifname="eth0", account="me", partition=None, time_limit="12:00:00", submit=False,
)  # fmt: skip


def test_the_command_for_4_nodes_of_8_ranks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    env = local.rank_variables(LAUNCH, 2, 8)
    command = multi_node.torchrun_command(LAUNCH, 32, Path("outputs/runs/a b/ranks/job.json"), env)
    assert command == (
        f"cd {tmp_path} && PYTHONPATH={ROOT} OMP_NUM_THREADS=2 NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0 "
        f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 {sys.executable} -m torch.distributed.run --nnodes 4 --nproc-per-node 8 "
        "--max-restarts 0 --rdzv-backend c10d --rdzv-endpoint 192.168.1.1:29500 --rdzv-id 'a b' --signals-to-handle "
        "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m deepseek_exp.commands.rank 'outputs/runs/a b/ranks/job.json'"
    )


@pytest.mark.parametrize("name", ["master_addr", "socket_ifname", "account", "partition", "time_limit"])
@pytest.mark.parametrize("word", ["x\ntouch y", "x\ry", "x\x1b[2J", "x\x00", "x\u2028y"])
def test_words_that_begin_another_line_are_refused(name, word):
    (problem,) = launch._unprintable_words(replace(LAUNCH, **{name: word}))
    assert problem.key == f"launch.{name}" and "line breaks" in problem.rule


def test_words_of_the_script_are_quoted(tmp_path):
    words = "a b; touch x $(touch y) `z` 'q' ="
    launch_ = replace(LAUNCH, account=words, partition=words, time_limit=words)
    script = multi_node.slurm_script(launch_, 32, tmp_path / "r/ranks/job.json", {}, on_gpus=False)
    for name in ("account", "partition", "time"):
        (line,) = (line for line in script.splitlines() if line.startswith(f"#SBATCH --{name}="))
        assert shlex.split(line, comments=False)[1:] == [f"--{name}={words}"]


def test_the_script_for_4_nodes_of_8_ranks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = multi_node.slurm_script(LAUNCH, 32, Path("outputs/runs/a/ranks/job.json"), {"A": "b c"}, on_gpus=True)
    assert script.splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=a",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --exclusive",
        "#SBATCH --account=me",
        "#SBATCH --time=12:00:00",
        f"#SBATCH --output={tmp_path}/outputs/runs/a/ranks/slurm_%j.log",
        "#SBATCH --signal=USR1@600",
        "set -euo pipefail",
        f"cd {tmp_path}",
        'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "head=${hosts%%$'\\n'*}",
        "export A='b c' TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600",
        f"srun --kill-on-bad-exit=1 --cpu-bind=none {sys.executable} -m torch.distributed.run --nnodes 4 "
        '--nproc-per-node 8 --max-restarts 0 --rdzv-backend c10d --rdzv-endpoint "$head:29500" '
        '--rdzv-id "$SLURM_JOB_ID" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 '
        "-m deepseek_exp.commands.rank outputs/runs/a/ranks/job.json",
    ]
