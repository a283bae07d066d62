"""The sandbox of generated code: what passes, and what is ended, refused or kept inside."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deepseek_exp.evaluate.sandbox import Limits, has_no_network, run_program


def run(source, **changed):
    return run_program(source, Limits(**{"seconds": 10.0, "memory_bytes": 10**9, **changed}))


def test_a_program_passes_if_it_reaches_its_end():
    assert run("assert sum(range(5)) == 10\nif __name__ == '__main__':\n    print('ran')").passed
    assert run("assert 1 == 2, 'not equal'").reason == "AssertionError: not equal"
    assert run("def f(:").reason.startswith("SyntaxError")


@pytest.mark.parametrize("source", ["raise SystemExit(0)", "import os\nos._exit(0)", "print('x' * 64)\nexit()"])
def test_an_early_exit_is_no_pass(source):
    assert not run(source).passed


def test_time_is_limited():
    began = time.monotonic()
    assert run("import time\ntime.sleep(60)", seconds=0.7).reason == "time"
    assert run("while True: pass", seconds=0.7).reason == "time"
    assert time.monotonic() - began < 10


def test_memory_and_files_are_limited():
    assert "MemoryError" in run("x = bytearray(10**9)", memory_bytes=4 * 10**8).reason
    source = "with open('big', 'wb') as f:\n    f.write(bytes(10**6))\n    f.write(bytes(2 * 10**7))\n    f.flush()"
    assert not run(source).passed and run(source.replace("2 * 10**7", "1000")).passed
    many = "kept = [open('program.py') for _ in range(100)]"
    assert "Too many open files" in run(many).reason


def test_what_it_starts_ends_with_it(tmp_path):
    """A child in a session apart from the program's is killed too, where process namespaces are allowed."""
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    source = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    assert run(source).passed
    time.sleep(2.0)
    assert mark.exists() is not has_no_network()


def test_it_sees_neither_the_environment_nor_the_network(monkeypatch):
    monkeypatch.setenv("SECRET", "password")
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    assert run("import os\nassert 'SECRET' not in os.environ and 'PYTHONPATH' not in os.environ").passed
    assert run(f"import sys\nassert {str(Path.cwd())!r} not in sys.path").passed
    source = "import socket\ns = socket.socket()\ns.settimeout(2)\ns.bind(('127.0.0.1', 0))\ns.connect(s.getsockname())"
    assert run(source).passed is not has_no_network()


def test_its_files_are_removed():
    before = set(Path("/tmp").glob("evaluate-*"))
    assert run("open('left', 'w').write('x')").passed
    assert set(Path("/tmp").glob("evaluate-*")) - before == set()
