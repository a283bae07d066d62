"""The journal of a run: an append-only file of JSON lines, written by the training process, read by the sender.

A line is one event: `t` (milliseconds since 1970), `kind`, and the fields of that kind. A line is one write system
call, so a SIGKILL of the writer loses nothing that was logged. NaN and infinities, which JSON lacks, are the strings
"NaN", "Infinity" and "-Infinity", which `float()` accepts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_READ_BYTES = 1 << 18
# The strings of `encode_float` for values that JSON lacks.
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class JournalWriter:
    """Appends events; one process at a time holds a journal, and may let another one write while it only waits.

    Attributes:
        size_before: size of the journal in bytes when `start` was called.
    """

    size_before = 0

    def __init__(self, path: Path, *, held_by_another: bool = False) -> None:
        """Open or create the journal; truncate the incomplete last line of a killed writer.

        Args:
            path: the journal.
            held_by_another: the process that holds the journal lets this one write.

        Raises:
            BlockingIOError: another process holds this journal.
        """
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        if held_by_another:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise BlockingIOError(f"{path} is being written by another process") from error
        self._cut_torn_line()

    def start(self) -> None:
        """Begin a life of the run; a resumed run has several."""
        self.size_before = os.fstat(self._fd).st_size
        self._append("start", {})

    def take_back(self) -> None:
        """Remove everything written since `start`, including its event."""
        os.ftruncate(self._fd, self.size_before)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metric values of one step."""
        fields: Event = {"step": step, "values": values}
        try:
            self._append("metrics", fields)
        except ValueError:  # not finite
            self._append("metrics", {"step": step, "values": {k: encode_float(v) for k, v in values.items()}})

    def params(self, values: Mapping[str, str]) -> None:
        """Record parameters."""
        self._append("params", {"values": values})

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags; a later value replaces an earlier one."""
        self._append("tags", {"values": values})

    def text(self, text: str, path: str) -> None:
        """Record a text to store as the artifact `path`."""
        self._append("text", {"text": text, "path": path})

    def file(self, path: Path, folder: str | None) -> None:
        """Record a file to copy to the artifact folder (None means the top)."""
        self._append("file", {"path": str(path), "folder": folder})

    def dataset(self, fields: Event) -> None:
        """Record a dataset: name, context, digest, source, profile."""
        self._append("dataset", fields)

    def end(self, status: str, error: str | None) -> None:
        """Record how the run ended; truncate a partial line first, if the process that was let write was killed."""
        self._cut_torn_line()
        self._append("end", {"status": status, "error": error})

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _append(self, kind: str, fields: Event) -> None:
        event = {"t": time.time_ns() // 1_000_000, "kind": kind, **fields}
        line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        written = os.write(self._fd, line)
        if written != len(line):
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(errno.ENOSPC, "the journal of the run cannot grow (disk full?)")

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            torn = os.pread(self._fd, size, 0)
            os.ftruncate(self._fd, torn.rfind(b"\n") + 1)


def encode_float(value: float) -> float | str:
    """Encode a float for JSON: itself, "NaN", "Infinity" or "-Infinity"."""
    if value != value:
        return "NaN"
    return {float("inf"): "Infinity", float("-inf"): "-Infinity"}.get(value, value)


def read_events(path: Path, offset: int, max_bytes: int = _READ_BYTES) -> tuple[list[Event], int]:
    """Read complete lines from a byte offset.

    Args:
        path: the journal.
        offset: where to begin, bytes; the start of a line.
        max_bytes: about how much to read at once; a longer line is read completely.

    Returns:
        The events (a line that is not JSON is an event of the kind `unreadable`) and the offset after them. A last
        line without its newline is left for the next call.
    """
    with path.open("rb") as file:
        file.seek(offset)
        chunk = file.read(max_bytes)
        if len(chunk) == max_bytes:
            chunk += file.readline()
    complete = chunk[: chunk.rfind(b"\n") + 1]
    return [_parse(line) for line in complete.splitlines()], offset + len(complete)


def copy_metrics(source: Path, target: Path, last_step: int) -> None:
    """Begin a journal with the metrics of another one, including their times.

    Args:
        source: the journal to read.
        target: the journal to create; it must not exist.
        last_step: metrics of later steps are left out. If a metric has several values for one step, since a resumed
            run repeated it, the last one is used.
    """
    last: dict[tuple[str, int], int] = {}
    for number, event in enumerate(metric_events(source)):
        last.update(((name, event["step"]), number) for name in event["values"])
    temporary = target.with_name(f".{target.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        for number, event in enumerate(metric_events(source)):
            values = {k: v for k, v in event["values"].items() if last[k, event["step"]] == number}
            if values and event["step"] <= last_step:
                file.write(json.dumps({**event, "values": values}, separators=(",", ":")) + "\n")
    target.hardlink_to(temporary)  # fails if it exists
    temporary.unlink()


def read_all(path: Path) -> Iterator[Event]:
    """Yield the events of a journal."""
    offset, events = 0, [{"kind": "begin"}]
    while events:
        events, offset = read_events(path, offset)
        yield from events


def metric_events(path: Path) -> Iterator[Event]:
    """Yield the metrics of a journal; skip lines that no journal writer wrote."""
    yield from (event for event in read_all(path) if _is_metrics(event))


def _is_metrics(event: Event) -> bool:
    """Return whether an event is a step's metrics; a foreign journal may hold anything."""
    if event.get("kind") != "metrics" or type(event.get("step")) is not int or type(event.get("t")) is not int:
        return False
    values = event.get("values")
    return isinstance(values, dict) and all(type(v) in (int, float) or v in NOT_FINITE for v in values.values())


def is_being_written(path: Path) -> bool:
    """Return whether a living process holds the journal."""
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _parse(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        return {"t": 0, "kind": "unreadable", "line": line[:80].decode(errors="replace")}
    return event if isinstance(event, dict) else {"t": 0, "kind": "unreadable", "line": str(event)[:80]}
