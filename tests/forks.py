"""run.py in a fork of a process that has imported all it needs: a start from nothing spends seconds on that.

A fork is a process of its own, with its folder, environment, output and exit code, and dies of signals as any other.
What it cannot show: that a module is imported where it is used, and that nothing depends on how strings hash, which
forks have in common. Tests that are about that, and one side of what is compared, start with `tests.runs`.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import composing, interpreter, runs

RUN = str(runs.ROOT / "run.py")
IMPORTED = (
    "deepseek_exp.train.build",
    "deepseek_exp.commands.certificate",
    "deepseek_exp.experiment.job",
    "deepseek_exp.inference",
    "deepseek_exp.commands.sweep",
    "deepseek_exp.tracking",
    "hydra.main",
    "torch._dynamo",
)


class Fork:
    """A run.py that was forked, with what tests use of `subprocess.Popen`."""

    def __init__(self, words: tuple[str, ...], server: socket.socket, job: dict[str, object]) -> None:
        self.args, self.returncode, self._server = (RUN, *words), None, server
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        socket.send_fds(server, [json.dumps(job).encode()], [f.fileno() for f in self._files])
        self.pid = int(server.recv(64))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; gives the exit code, or the signal as a negative number."""
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._server.recv(64))
        return self.returncode

    def poll(self) -> int | None:
        """Give the exit code if it has ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; gives what it wrote."""
        self.wait(timeout)
        for file in self._files:
            file.seek(0)
        out, err = (file.read().decode() for file in self._files)
        return out, err


class Server:
    """The process that imports and forks; it has one run at a time."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(command, cwd=runs.ROOT, env=env, pass_fds=[theirs.fileno()])
        theirs.close()
        self._last: Fork | None = None
        atexit.register(self.end)

    def start(self, folder: Path, words: tuple[str, ...]) -> Fork:
        """Fork run.py; a run that a failed test has left behind is killed."""
        if self._last is not None:
            self._last.send_signal(signal.SIGKILL)
            self._last.wait()
        job = {"folder": str(folder), "words": words, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}}
        self._last = Fork(words, self._ours, job)
        return self._last

    def end(self) -> None:
        """End it, and with it a run that is still there."""
        self._process.kill()
        self._process.wait()


server = functools.cache(Server)


def start(folder: Path, *overrides: str) -> Fork:
    """Start run.py in a folder, as `runs.start` does."""
    return server().start(folder, overrides)


def run(folder: Path, *overrides: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run run.py in a folder to its end, as `runs.run` does."""
    process = start(folder, *overrides)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def serve(asked: socket.socket) -> None:
    """Fork for each job and tell its process id and its end; returns in the fork, and when nobody asks any more."""
    die_with_parent()
    for module in IMPORTED:
        importlib.import_module(module)
    interpreter.quicken()
    composing.tree()  # reads the files of the defaults
    gc.freeze()  # a collection would have each fork copy what it leaves alone
    while True:
        message, files, _, _ = socket.recv_fds(asked, 1 << 18, 2)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            asked.close()
            return become(json.loads(message), files)
        for file in files:
            os.close(file)
        asked.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        asked.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(job: dict[str, Any], files: list[int]) -> None:
    """Do as `python run.py` does in a folder; the fork then ends as every Python does."""
    die_with_parent()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for ours, theirs in enumerate((nothing, *files)):
        os.dup2(theirs, ours)
        os.close(theirs)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = [RUN, *job["words"]]
    runpy.run_path(RUN, run_name="__main__")


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
