"""Run generated code in a separate process with limits. It keeps mistakes in; it is no protection against an attacker.

The process has its own session, an empty temporary folder for its files, an empty environment, Python's isolated mode,
and limits on CPU time, memory, file size, open files and processes; see confined.py. It ends when the time is over or
when this process dies. It can read the files that this user can read.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deepseek_exp.evaluate import confined

MOST_OUTPUT_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: wall time, and about as much CPU time.
        memory_bytes: address space.
        processes: processes and threads of the user. It does not hold for root.
    """

    seconds: float
    memory_bytes: int
    processes: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it ran to its last line and ended with status 0.
        reason: why not: the last line of its error, or `time`; empty if it passed.
    """

    passed: bool
    reason: str


def run_program(source: str, limits: Limits) -> Outcome:
    """Run a Python program; it passes if its last line is reached and it ends with status 0.

    A program that exits early with status 0 has not passed: only one that reaches the end writes a word that it cannot
    know.
    """
    word = secrets.token_hex(16)
    program = f"{source}\n\nimport os as _os\n_os.write(1, b'\\n{word}')\n"
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        Path(folder, "program.py").write_bytes(program.encode("utf-8", "backslashreplace"))
        out, err = Path(folder, "out"), Path(folder, "err")
        with out.open("wb") as output, err.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", confined.__file__, *_arguments(limits), "program.py"],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said, why = _tail(out), _tail(err).strip().splitlines()
    if code is None or code == 128 + signal.SIGXCPU:
        return Outcome(False, "time")
    if code or word not in said:
        return Outcome(False, why[-1] if why else f"ended with status {code} before its last line")
    return Outcome(True, "")


@cache
def has_no_network() -> bool:
    """Return whether the kernel lets a program run without a network."""
    words = [sys.executable, "-I", "-B", "-c", f"import runpy; m = runpy.run_path({confined.__file__!r}); "]
    words[-1] += "raise SystemExit(not m['leave_network']())"
    return subprocess.run(words, check=False, stdin=subprocess.DEVNULL).returncode == 0


def _arguments(limits: Limits) -> list[str]:
    return [str(max(1, round(limits.seconds + 0.5))), str(limits.memory_bytes), str(limits.processes)]


def _tail(path: Path) -> str:
    """Read the end of a file; the program may have replaced it by something else."""
    if not path.is_file() or path.is_symlink():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MOST_OUTPUT_BYTES))
        return file.read().decode("utf-8", "replace")
