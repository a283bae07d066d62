"""Standard output and error streams whose failure never ends a training run. Uses only the standard library.

If the reader exits, the disk is full, the terminal hangs up or a stream is closed, only the text that could not be
written is lost. Characters that the stream's encoding lacks are written as escape sequences. Passwords are hidden
(`redact`), also in tracebacks.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from deepseek_exp.config.schema import ROOT
from deepseek_exp.redact import redact

# Characters that move the cursor or change the title or colors of a terminal. A line may end with \r\n.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


class _Sink(io.FileIO):
    """A file descriptor that drops the data it cannot write."""

    def write(self, data: Any, /) -> int:
        """Write all of the data, or drop the rest on an error. Always report success."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            try:
                written = os.write(self.fileno(), left)
            except BlockingIOError:  # another program made the terminal non-blocking
                select.select([], [self.fileno()], [])
                continue
            except OSError:
                break
            left = left[written:]
        return size


def protect() -> None:
    """Replace `sys.stdout` and `sys.stderr` with streams whose writes never fail, for the rest of the process.

    Closed descriptors are opened on /dev/null. Otherwise a file that is opened later could get descriptor 1 or 2, and
    output would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)
    sys.excepthook = _show_traceback


def write(stream: TextIO, text: str) -> None:
    """Write and flush the text, with secrets hidden and control characters escaped.

    Never fails, even if `protect` was not called (when the package is used as a library).
    """
    text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", redact(text))
    try:
        stream.write(text)
        stream.flush()
    except UnicodeEncodeError as error:
        write(stream, text.encode(error.encoding, "backslashreplace").decode(error.encoding))
    except (OSError, ValueError, AttributeError):  # gone, full, closed, or None
        pass


@contextlib.contextmanager
def redacted(wanted: bool) -> Iterator[None]:
    """Buffer standard output and print it at the end with secrets hidden. Do nothing if `wanted` is false."""
    if not wanted:
        yield
        return
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        write(sys.stdout, text.getvalue())


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception in Python's format, with secrets hidden."""
    write(sys.stderr, "".join(traceback.format_exception(kind, error, trace)))


def _stream(number: int, now: TextIO | None) -> TextIO:
    """Return a stream for the descriptor, with the encoding of its current stream."""
    encoding = getattr(now, "encoding", None) or "utf-8"
    buffer = io.BufferedWriter(_Sink(number, "w", closefd=False))
    return io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=True)


def say(text: str) -> None:
    """Print one or more lines. Never fails, whatever the terminal, pipe, disk or encoding."""
    write(sys.stdout, text + "\n")


def command() -> str:
    """Return the shell command that starts a run from the current folder."""
    return f"{python()} {shlex.quote(shown(ROOT / 'run.py'))}"


def shown(path: Path | None) -> str:
    """Return the path relative to the current folder if it is below it, else absolute."""
    if path is None:
        return "none"
    whole, here = path.absolute(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(whole)


def python() -> str:
    """Return the shell word for this Python: its name if the shell finds it by name, else its path."""
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found is not None and Path(found).absolute() == Path(sys.executable).absolute():
            return name
    return shlex.quote(shown(Path(sys.executable)))
