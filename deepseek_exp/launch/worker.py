"""Process lifecycle of a rank: start-up, stop signal, exit report."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from deepseek_exp import console
from deepseek_exp.disk import disk_error
from deepseek_exp.errors import UserError
from deepseek_exp.redact import redact, redact_tree

FOLDER = "ranks"
STOP = signal.SIGUSR1  # asks a rank to save and stop; SIGTERM ends it at once
PARENT = "DEEPSEEK_EXP_PARENT"  # process id of `launch.run`; not set under torchrun
PR_SET_PDEATHSIG = 1
# While one rank prepares the data of a first run, the others wait this long at most.
DATA_TIMEOUT = timedelta(hours=6)
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # these ask a run to save and stop

_stop_asked = False


@dataclass(frozen=True)
class RankResult:
    """How a rank ended, if nothing went wrong.

    Attributes:
        loss: the validation loss, if any.
        stopped_at: the optimizer step that it stopped after because it was asked to.
        signum: the signal that asked for it.
    """

    loss: float | None = None
    stopped_at: int | None = None
    signum: int = STOP


def number() -> int:
    """Return this process's rank; 0 if there is one process."""
    return int(os.environ.get("RANK", "0"))


def has_parent() -> bool:
    """Return whether `launch.run` started this rank, in which case the parent records the run."""
    return PARENT in os.environ


def stop_asked() -> bool:
    """Return whether this rank was asked to save and stop; the others may not know yet."""
    return _stop_asked


def stop_signals() -> list[signal.Signals]:
    """Return the signals to listen for; SIGHUP is left out if it is ignored, as under `nohup`."""
    return [s for s in ASKING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def is_repeat(signum: int) -> bool:
    """Return whether a repeated signal is to be ignored: a shell that ends sends a second SIGHUP to its jobs."""
    return signum == signal.SIGHUP


def log_path(folder: Path, rank: int) -> Path:
    """Return the file with all output of a rank, in all lives of the run."""
    return folder / f"rank_{rank}.log"


def outcome_path(folder: Path, rank: int) -> Path:
    """Return the file with how a rank ended."""
    return folder / f"rank_{rank}.json"


def enter(folder: Path) -> None:
    """Make this process a rank: die with the parent, listen for `STOP`, and leave the terminal to rank 0.

    Args:
        folder: for logs and results.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(STOP, _remember_stop)
    signal.siginterrupt(STOP, False)  # system calls of gloo and NCCL resume
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [STOP])
    if not has_parent() and number() > 0:
        log_path(folder, number()).touch(0o600)
        with log_path(folder, number()).open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    faulthandler.enable()


def report(folder: Path, work: Callable[[], RankResult]) -> int:
    """Run a rank's work, write how it ended, and return the exit code.

    If it fails, the process exits here: a regular shutdown may hang, with the others waiting for it.
    """
    try:
        ended = work()
    except BaseException as error:
        _leave(folder, error)
    _write(folder, {**asdict(ended), "error": None})
    return 0


def share(name: str, value: str | None) -> str:
    """Send a text from one rank to all before they have a process group, through the store of torchrun's agent.

    Args:
        name: key of the text.
        value: the text; None on the receivers.
    """
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store.set_timeout(DATA_TIMEOUT)  # the first rank may prepare the data first; the default is 5 minutes
    if value is not None:
        store.set(name, value)
    return str(store.get(name).decode())


def _remember_stop(signum: int, frame: FrameType | None) -> None:
    global _stop_asked
    _stop_asked = True


def _leave(folder: Path, error: BaseException) -> NoReturn:
    trace = redact(traceback.format_exc())
    error = disk_error(error, "output_dir", str(folder.parent)) or error
    said = f"{error}\n" if isinstance(error, UserError) else trace
    problems = [redact_tree(vars(p)) for p in error.problems] if isinstance(error, UserError) else []
    kind = type(error).__name__
    first_line = redact(next(iter(str(error).splitlines()), ""))
    failure = {"error": f"{kind}: {first_line}", "kind": kind, "problems": problems, "traceback": trace}
    _write(folder, failure)
    if has_parent():  # it reports the first failure to the user
        with log_path(folder, number()).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(redact(said))
    else:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # for torchrun
        console.write(sys.stderr, said)
    for stream in (sys.stdout, sys.stderr):
        console.write(stream, "")
    os._exit(1)


def _write(folder: Path, outcome: dict[str, Any]) -> None:
    """Write the outcome atomically."""
    path = outcome_path(folder, number())
    part = path.with_suffix(".part")
    part.touch(0o600)
    part.write_text(json.dumps({"time_ns": time.time_ns(), **outcome}, default=str), encoding="utf-8")
    part.replace(path)
