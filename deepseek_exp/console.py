"""Standard output and standard error as streams that end no training; the standard library alone.

A reader that goes away, a full disk below a log, a terminal that hangs up or closed streams cost what could not be
written, and nothing else. A character that the stream's encoding lacks is written as an escape sequence. Passwords
are hidden (`redact`), those in tracebacks too.
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

# what moves the cursor, changes the title or the colors of a terminal; a line may end with \r\n
CONTROL = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


class _Sink(io.FileIO):
    """A file descriptor that drops what it cannot take."""

    def write(self, data: Any, /) -> int:
        """Write all of the data, or drop the rest of it; the caller sees success in both cases."""
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
    """Replace `sys.stdout` and `sys.stderr` by streams whose write never fails, for the rest of the process.

    A descriptor that is closed is opened on /dev/null: a file that is opened later would otherwise get its number, and
    whatever writes to descriptor 1 or 2 would write into that file.
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
    """Write a text with its secrets hidden and its control characters made visible, and flush it.

    It never fails, also if `protect` was not called, as in a program that uses this package.
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
    """Hold standard output back, and print it at the end with its secrets hidden; if not `wanted`, do nothing."""
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
    """Print an error that nobody caught as Python does, its secrets hidden."""
    write(sys.stderr, "".join(traceback.format_exception(kind, error, trace)))


def _stream(number: int, now: TextIO | None) -> TextIO:
    """Open a descriptor with the encoding of the stream that uses it now."""
    encoding = getattr(now, "encoding", None) or "utf-8"
    buffer = io.BufferedWriter(_Sink(number, "w", closefd=False))
    return io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=True)


def say(text: str) -> None:
    """Print a line or several; it fails on no terminal, pipe, disk or encoding."""
    write(sys.stdout, text + "\n")


def command() -> str:
    """Return the words that start a run from the current folder."""
    return f"{python()} {shlex.quote(shown(ROOT / 'run.py'))}"


def shown(path: Path | None) -> str:
    """Return a path as it is typed from here: relative if it is below the current folder."""
    if path is None:
        return "none"
    whole, here = path.absolute(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(whole)


def python() -> str:
    """Return the word for this Python: its name if that is what a shell finds, else its path."""
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found is not None and Path(found).absolute() == Path(sys.executable).absolute():
            return name
    return shlex.quote(shown(Path(sys.executable)))
