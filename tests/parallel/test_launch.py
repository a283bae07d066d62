"""Ranks as real processes: that they end together, whatever ends first, and that it is told first."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deepseek_exp.parallel import launch
from tests.runs import ROOT

N_RANKS = 3


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.parallel.launch_parts", "parent", str(folder), str(N_RANKS), what]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
            if str(folder) in process.cmdline() and "rank" in process.cmdline():
                found.append(process)
        except psutil.Error:
            pass
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


def work_has_begun(folder: Path) -> bool:
    return len(list(folder.glob("*.pid"))) == N_RANKS


def pids(folder: Path) -> list[int]:
    return [int((folder / f"{rank}.pid").read_text()) for rank in range(N_RANKS)]


def test_the_ranks_meet_and_rank_0_gives_its_result(tmp_path):
    parent = start(tmp_path, "end")
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 0, err
    assert out == "rank 0 has 1 threads\nEnded(loss=3.0, stopped_at=None, signum=10)\n".replace(
        "10", repr(signal.SIGUSR1)
    )
    assert err == ""
    for rank in range(N_RANKS):
        assert (tmp_path / f"ranks/rank_{rank}.log").read_text() == f"rank {rank} has 1 threads\n"
    assert family(tmp_path) == []


def test_a_rank_that_raises_is_told_first_and_ends_the_others(tmp_path):
    parent = start(tmp_path, "raise")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    wait_for(lambda: family(tmp_path) == [], 10)
    out, err = parent.communicate(timeout=10)
    assert parent.returncode == 1 and err == ""
    lines = out.splitlines()
    assert re.fullmatch(r"RankError: rank=1 of 3 died of ValueError: one. Fix: read \S*ranks/rank_1.log\.", lines[1])
    assert lines[-3:] == ['    raise ValueError("one\\ntwo")', "ValueError: one", "two"]
    assert "ValueError: one\ntwo" in (tmp_path / "ranks/rank_1.log").read_text()


def test_an_error_of_the_user_reads_as_in_one_process(tmp_path):
    out, err = start(tmp_path, "user_error").communicate(timeout=60)
    assert out == "rank 0 has 1 threads\nDataError: data.path='x' is gone. Fix: bring it back.\n" and err == ""
    assert family(tmp_path) == []


def test_a_rank_that_is_killed_is_told_first_and_ends_the_others(tmp_path):
    parent, rank = start(tmp_path, "go on"), random.randrange(N_RANKS)
    wait_for(lambda: work_has_begun(tmp_path), 60)
    os.kill(pids(tmp_path)[rank], signal.SIGKILL)
    assert wait_for(lambda: family(tmp_path) == [], 10) < 5
    out, err = parent.communicate(timeout=10)
    assert parent.returncode == 1 and err == ""
    assert re.match(
        rf"RankError: rank={rank} of 3 was killed by SIGKILL. Fix: read \S*ranks/rank_{rank}.log; where nobody killed "
        r"it, memory ran out \(dmesg tells\)\.\n",
        out.split("\n", 1)[1],
    )


def test_a_rank_that_leaves_without_a_result_ends_the_others(tmp_path):
    out, _ = start(tmp_path, "leave").communicate(timeout=60)
    assert "RankError: rank=1 of 3 left with exit code 0 and no result." in out
    assert family(tmp_path) == []


def test_a_rank_that_hangs_and_ignores_sigterm_is_killed(tmp_path):
    parent = start(tmp_path, "go on")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    for pid in pids(tmp_path)[1:]:
        os.kill(pid, signal.SIGSTOP)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    assert wait_for(lambda: family(tmp_path) == [], 10) < 5
    assert "rank=0 of 3 was killed by SIGKILL" in parent.communicate(timeout=10)[0]


def test_a_killed_parent_leaves_no_orphans(tmp_path):
    parent = start(tmp_path, "go on")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    ranks = pids(tmp_path)
    parent.kill()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in ranks), 3)
    wait_for(lambda: family(tmp_path) == [], 10)  # their loaders look for them every 5 seconds
    parent.communicate()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_stops_all_ranks_after_one_step(tmp_path, signum):
    parent = start(tmp_path, "go on")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    parent.send_signal(signum)
    out, err = parent.communicate(timeout=20)
    assert parent.returncode == 0, err
    (step,) = {(tmp_path / f"{rank}.stopped").read_text() for rank in range(N_RANKS)}
    assert f"Ended(loss=None, stopped_at={step}, signum={int(signum)})" in out
    assert family(tmp_path) == []


def test_a_signal_while_the_ranks_start_is_not_lost(tmp_path):
    parent = start(tmp_path, "go on")
    wait_for(lambda: len(family(tmp_path)) == N_RANKS, 60)
    parent.send_signal(signal.SIGTERM)
    out, err = parent.communicate(timeout=60)
    assert "stopped_at=0, signum=15" in out, out + err


def test_a_second_signal_ends_it_at_once(tmp_path):
    parent = start(tmp_path, "go on")
    wait_for(lambda: work_has_begun(tmp_path), 60)
    for pid in pids(tmp_path):
        os.kill(pid, signal.SIGSTOP)  # so that they cannot stop in time
    parent.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(5) == -signal.SIGTERM
    parent.communicate()
    wait_for(lambda: family(tmp_path) == [], 10)


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert (launch.threads(0, 8), launch.threads(0, 64), launch.threads(3, 8)) == (2, 1, 3)
