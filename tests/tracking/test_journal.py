"""The journal: what is written is read back, whatever happens to the writer."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_exp.config import ROOT
from deepseek_exp.tracking import copy_history
from deepseek_exp.tracking.journal import JournalWriter, is_being_written, read_events


def _refuse(token: str) -> float:
    raise AssertionError(f"{token} is not JSON")


def test_values_that_are_not_finite_survive_as_json(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    JournalWriter(path).metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}, 7)
    json.loads(path.read_text(), parse_constant=_refuse)
    values = read_events(path, 0)[0][0]["values"]
    assert math.isnan(float(values["a"]))
    assert [float(values[name]) for name in "bcd"] == [math.inf, -math.inf, 0.1]


def test_a_torn_last_line_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text('{"t":1,"kind":"start"}\n{"t":2,"ki')
    events, offset = read_events(path, 0)
    assert [event["t"] for event in events] == [1]
    with path.open("a") as file:
        file.write('nd":"start"}\n')
    assert [event["t"] for event in read_events(path, offset)[0]] == [2]


def test_a_new_writer_cuts_the_torn_line_of_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text('{"t":1,"kind":"start"}\n{"t":2,"ki')
    JournalWriter(path).tags({"a": "b"})
    assert [event["kind"] for event in read_events(path, 0)[0]] == ["start", "tags"]


def test_reading_in_small_pieces_gives_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    writer = JournalWriter(path)
    for step in range(50):
        writer.metrics({"a": 1.0}, step)
        writer.text("x" * 3000, "long.txt")
    steps, offset, events = [], 0, [{"kind": "begin"}]
    while events:
        events, offset = read_events(path, offset, max_bytes=1000)
        steps += [event["step"] for event in events if event["kind"] == "metrics"]
    assert steps == list(range(50))
    assert offset == path.stat().st_size


def test_a_damaged_line_is_reported_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text('garbage\n[1]\n{"t":2,"kind":"start"}\n')
    assert [event["kind"] for event in read_events(path, 0)[0]] == ["unreadable", "unreadable", "start"]


def test_only_one_process_writes_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    code = (
        "import sys; from pathlib import Path; from deepseek_exp.tracking.journal import *\n"
        "w = JournalWriter(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        assert is_being_written(path)
        with pytest.raises(BlockingIOError, match="another process"):
            JournalWriter(path)
        other.communicate()
    assert not is_being_written(path)


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    writer = JournalWriter(path)
    writer.tags({"a": "1"})
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="disk full"):
            writer.tags({"b": "2"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    writer.tags({"c": "3"})
    assert [event["values"] for event in read_events(path, 0)[0]] == [{"a": "1"}, {"c": "3"}]


def test_a_process_that_is_let_write_may_be_killed_within_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    holder, writer = JournalWriter(path), JournalWriter(path, held_by_another=True)
    holder.start()
    writer.tags({"a": "b"})
    with path.open("a") as file:
        file.write('{"t":2,"ki')
    holder.end("FAILED", "killed")
    assert [event["kind"] for event in read_events(path, 0)[0]] == ["start", "tags", "end"]
    writer.close()
    assert is_being_written(path)


def test_metrics_of_a_run_begin_the_journal_of_the_next(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal.jsonl")
    writer.start()
    writer.metrics({"a": 1.0, "b": math.nan}, 1)
    writer.params({"p": "1"})
    writer.metrics({"a": 2.0}, 2)
    writer.metrics({"a": 3.0}, 3)
    writer.end("KILLED", None)
    writer.metrics({"a": 2.5}, 2)  # a resumed life repeats it
    copy_history(tmp_path, tmp_path / "new", 2)
    (old, _), (new, _) = (read_events(folder / "journal.jsonl", 0) for folder in (tmp_path, tmp_path / "new"))
    assert [(event["step"], event["values"]) for event in new] == [(1, {"a": 1.0, "b": "NaN"}), (2, {"a": 2.5})]
    assert [event["t"] for event in new] == [old[1]["t"], old[6]["t"]]
    copy_history(tmp_path, tmp_path / "new", 1)  # the ranks of one job file may be started twice
    assert read_events(tmp_path / "new" / "journal.jsonl", 0)[0] == new


def test_a_run_without_a_journal_has_no_history(tmp_path: Path) -> None:
    copy_history(tmp_path / "moved", tmp_path / "new", 2)
    os.mkfifo(tmp_path / "journal.jsonl")  # reading it would wait
    copy_history(tmp_path, tmp_path / "new", 2)
    assert list((tmp_path / "new").iterdir()) == []


def test_what_no_journal_writer_wrote_is_no_history(tmp_path: Path) -> None:
    lines = [
        {"t": 1, "kind": "metrics", "step": 1, "values": {"a": 1.0, "b": "NaN"}},
        {"t": 1, "kind": "metrics", "values": {"a": 1.0}},
        {"t": 1, "kind": "metrics", "step": 1},
        {"t": 1, "kind": "metrics", "step": 1, "values": {"a": "one"}},
        {"t": 1, "kind": "metrics", "step": "1", "values": {"a": 1.0}},
        {"t": "x", "kind": "metrics", "step": 1, "values": {"a": 1.0}},
        {"t": 1},
        [],
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    copy_history(tmp_path, tmp_path / "new", 2)
    assert read_events(tmp_path / "new" / "journal.jsonl", 0)[0] == lines[:1]
