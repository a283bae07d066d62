"""Starts the ranks of one job on this machine and ends them together, no matter which ends first.

A rank gets the environment variables of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...), so the same entry point runs
under either; the ranks meet at a store that this process keeps. torchrun's own agent is not used here: it treats
SIGTERM as an immediate kill, waits 30 s for a hanging rank, empties the logs of an earlier life and shows a rank's
output only in blocks.

Files, all in one folder of the run: rank_N.log (output of rank N, all lives) and rank_N.json (how it ended).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, TextIO

from deepseek_exp.config import ROOT, LaunchConfig
from deepseek_exp.errors import KINDS, Problem, RankError, UserError
from deepseek_exp.launch.worker import PARENT, STOP, RankResult, is_repeat, log_path, outcome_path, stop_signals

if TYPE_CHECKING:
    from torch.distributed import TCPStore

POLL_SECONDS = 0.05
GRACE_SECONDS = 2.0
LOG_LINES = 12


@dataclass
class _Rank:
    """A rank as its parent sees it; its process id is also that of its process group, which includes its children."""

    number: int
    process: subprocess.Popen[bytes]
    folder: Path
    readers: list[threading.Thread]

    @property
    def code(self) -> int | None:
        """Return its exit code; None while it runs."""
        return self.process.poll()

    @property
    def outcome(self) -> dict[str, Any] | None:
        """Return the content of its outcome file; None if there is none."""
        path = outcome_path(self.folder, self.number)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def run(
    command: Sequence[str], n_ranks: int, folder: Path, env: Mapping[str, str], *, saves: bool = True
) -> RankResult:
    """Start the ranks, show the output of rank 0, and wait for all of them; no rank survives this call.

    SIGTERM, SIGINT and SIGHUP are forwarded as `STOP`; a second one ends this process, and the ranks with it.

    Args:
        command: what each rank runs; it ends with `report`.
        n_ranks: number of ranks.
        folder: for their logs and results.
        env: additional environment variables.
        saves: if False, the ranks have nothing to save, and are killed at once when this process is asked to stop.

    Returns:
        How rank 0 ended; for ranks that were killed at once, that they stopped.

    Raises:
        UserError: a rank failed; its own error, or a RankError with the cause of its death.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n_ranks):
        outcome_path(folder, number).unlink(missing_ok=True)
    store = _local_store()
    ranks: list[_Rank] = []
    with _handing_on_signals(ranks) as asked:
        try:
            for number in range(n_ranks):
                ranks.append(_start(command, number, folder, _environment(number, n_ranks, store.port) | dict(env)))
                if asked:
                    ranks[-1].process.send_signal(STOP)
            while not _all_ended(ranks):
                if asked and not saves:
                    return RankResult(stopped_at=0, signum=asked[0])
                time.sleep(POLL_SECONDS)
        finally:
            _end_all(ranks)
    outcome = ranks[0].outcome
    assert outcome is not None
    return RankResult(outcome["loss"], outcome["stopped_at"], asked[0] if asked else STOP)


def _local_store() -> TCPStore:
    """Open the store at which the ranks meet; other machines cannot reach it, as it needs no password."""
    from torch.distributed import TCPStore

    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listening.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def threads(n_threads: int, n_ranks: int) -> int:
    """Return the number of CPU threads per rank: as configured, else its share of the cores of this process."""
    return n_threads or max(1, len(os.sched_getaffinity(0)) // n_ranks)


def rank_variables(launch: LaunchConfig, n_threads: int, ranks_here: int) -> dict[str, str]:
    """Return the environment variables that the configuration sets in each rank."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    found = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    if n_threads or "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(threads(n_threads, ranks_here))
    if launch.socket_ifname is not None:
        found |= {"NCCL_SOCKET_IFNAME": launch.socket_ifname, "GLOO_SOCKET_IFNAME": launch.socket_ifname}
    return found


@contextmanager
def _handing_on_signals(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Ask the ranks to stop when this process is asked to; yield the received signals, at most one."""
    asked: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        if asked and is_repeat(signum):
            return
        if asked:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        asked.append(signum)
        for rank in ranks:
            rank.process.send_signal(STOP)  # to the rank only: its children may die of it

    before = {signum: signal.signal(signum, hand_on) for signum in stop_signals()}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _environment(number: int, n_ranks: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets, for one machine and without restarts."""
    numbers = {
        **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), number),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), n_ranks),
        **{"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "MASTER_PORT": port, PARENT: os.getpid()},
        **{"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0},
    }
    texts = {
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": str(os.getpid()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONIOENCODING": "utf-8:backslashreplace",  # as `_show` and the logs read it
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
    return {name: str(value) for name, value in numbers.items()} | texts


def _start(command: Sequence[str], number: int, folder: Path, env: Mapping[str, str]) -> _Rank:
    """Start one rank in its own process group, with `STOP` blocked until it listens."""
    log = log_path(folder, number)
    pipe = subprocess.PIPE if number == 0 else None
    signal.pthread_sigmask(signal.SIG_BLOCK, [STOP])
    try:
        log.touch(0o600)
        with log.open("ab", buffering=0) as file:
            process = subprocess.Popen(
                command,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=pipe or file,
                stderr=pipe or file,
                start_new_session=True,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [STOP])
    pipes = [(process.stdout, sys.stdout), (process.stderr, sys.stderr)] if pipe else []
    readers = [threading.Thread(target=_show, args=[source, to, log], daemon=True) for source, to in pipes]
    for reader in readers:
        reader.start()
    return _Rank(number, process, folder, readers)


def _show(source: IO[bytes], to: TextIO, log: Path) -> None:
    """Copy a rank's output to its log and to the terminal, for as long as either exists."""
    with source, log.open("ab", buffering=0) as file:
        for line in source:
            with suppress(OSError):
                file.write(line)
            with suppress(OSError, ValueError):
                to.write(line.decode(errors="replace"))
                to.flush()


def _all_ended(ranks: list[_Rank]) -> bool:
    """Return whether all ranks have ended successfully.

    Raises:
        UserError: a rank has failed.
    """
    if any(rank.code or (rank.code == 0 and rank.outcome is None) for rank in ranks):
        raise _error(_first_failed(ranks), len(ranks))
    return all(rank.code == 0 for rank in ranks)


def _first_failed(ranks: list[_Rank]) -> _Rank:
    """Return the rank whose failure made the others fail.

    A rank that died without a message comes first: the others' connections to it break afterwards, and gloo and NCCL
    then abort. Among those that left an error, it is the earliest.
    """

    def order(rank: _Rank) -> tuple[int, int]:
        outcome = rank.outcome
        if outcome is not None and outcome["error"]:
            return 1, outcome["time_ns"]
        return (2, 0) if outcome is not None or rank.code == -signal.SIGABRT else (0, 0)

    failed = [r for r in ranks if r.code or (r.outcome is None and r.code == 0) or (r.outcome or {}).get("error")]
    return min(failed, key=order)


def _error(rank: _Rank, n_ranks: int) -> UserError:
    """Return the error that a rank died of: its own, if the user can fix it."""
    outcome, log = rank.outcome or {"error": None}, os.path.relpath(log_path(rank.folder, rank.number))
    if outcome["error"] and outcome["problems"]:
        return KINDS[outcome["kind"]](*(Problem(**p) for p in outcome["problems"]))
    if outcome["error"]:
        rule = f"of {n_ranks} died of {outcome['error']}"
        return RankError(Problem("rank", rank.number, rule, f"read {log}"), _last_lines(outcome["traceback"]))
    for reader in rank.readers:  # its last output may be on its way to the log
        reader.join(POLL_SECONDS)
    code = rank.code or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code} and no result"
    fix = f"read {log}"
    if code == -signal.SIGKILL:
        fix += "; if you did not kill it, it probably ran out of memory (check dmesg)"
    return RankError(Problem("rank", rank.number, f"of {n_ranks} {how}", fix), _last_lines(_end_of(Path(log))))


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        return file.read().decode(errors="replace")


def _last_lines(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-LOG_LINES:])


def _end_all(ranks: list[_Rank]) -> None:
    """End the ranks and their children: first by a signal, and by force after a moment."""
    for rank in ranks:
        if rank.code is None:
            _signal_group(rank, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(rank.code is None for rank in ranks):
        time.sleep(POLL_SECONDS)
    for rank in ranks:
        _signal_group(rank, signal.SIGKILL)
        rank.process.wait()
        for reader in rank.readers:
            reader.join(GRACE_SECONDS)


def _signal_group(rank: _Rank, signum: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.process.pid, signum)
