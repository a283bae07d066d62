"""Standard output and standard error that fail, and words for a disk that does."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys

import pytest

from deepseek_exp import console, disk
from deepseek_exp.errors import DiskError, Problem
from tests import runs

PRINTS = (
    "import os, sys\n"
    "from deepseek_exp import console\n"
    "console.protect()\n"
    "for stream in (sys.stdout, sys.stderr):\n"
    "    console.write(stream, 'd\\xe9j\\xe0 \\u4f60 \\udcff\\n')\n"
    "    for i in range(20000):\n"
    "        stream.write(f'{i}\\n')\n"  # more than a pipe holds
    "file = open('made', 'w', encoding='utf-8')\n"
    "os.system('printf child')\n"
    "file.write('whole')\n"
    "print('last', end='')"  # is left to the flush at exit
)


PIPES = ("| head -1", "2>&1 | head -4")
FILES = (">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", ">&- 2>&-", "<&- >&-")


@pytest.mark.parametrize("to", [*PIPES, *FILES])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_stream_ends_a_program(tmp_path, to, encoding):
    words = f"'{sys.executable}' -c \"$CODE\" {to}; exit ${{PIPESTATUS[0]}}"
    env = {**os.environ, "CODE": PRINTS, "PYTHONPATH": str(runs.ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "made").read_text() == "whole"  # nothing that is printed goes to a file


def test_what_a_stream_cannot_take_is_written_as_an_escape_sequence(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(runs.ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", PRINTS], cwd=tmp_path, env=env, capture_output=True, timeout=60)
    assert done.stdout.splitlines()[0] == done.stderr.splitlines()[0] == rb"d\xe9j\xe0 \u4f60 \udcff"
    assert done.stdout.splitlines()[1:20001] == [str(i).encode() for i in range(20000)]
    assert done.stdout.endswith(b"childlast")


def test_control_characters_are_shown():
    stream = io.StringIO(newline="")
    console.write(stream, "a\x1b]0;title\x07 b\rc\r\n\td\x9b1m\n")
    assert stream.getvalue() == "a\\x1b]0;title\\x07 b\\x0dc\r\n\td\\x9b1m\n"


class TestDisk:
    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("/dev/null/x/y", "Not a directory"),
            ("/proc/x", "No such file or directory"),
            ("{here}/file", "Not a directory"),
            ("{here}/file/x", "Not a directory"),
            ("{here}/" + "x" * 256, "File name too long"),
            ("{here}/new/" + "x" * 256, "File name too long"),
            ("{here}/nowhere/x", "No such file or directory"),
        ],
    )
    def test_a_folder_that_cannot_be_written(self, tmp_path, path, reason):
        (tmp_path / "file").touch()
        (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
        folder = path.format(here=tmp_path)
        with pytest.raises(DiskError) as raised:
            disk.check_writable("output_dir", disk.Path(folder))
        want = str(Problem("output_dir", folder, f"cannot be written ({reason})", "use a")).removesuffix(".")
        assert str(raised.value).startswith(want)

    def test_a_folder_that_can_is_left_as_it_was(self, tmp_path):
        disk.check_writable("output_dir", tmp_path / "a/b")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_on_a_full_disk(self, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(DiskError) as raised:
                disk.check_writable("output_dir", tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        want = f"output_dir='{tmp_path}' cannot be written (File too large). Fix: raise the largest file size"
        assert str(raised.value).startswith(want)

    @pytest.mark.parametrize("number", disk.REMEDIES, ids=errno.errorcode.get)
    def test_a_remedy_for_each_error_of_a_disk(self, tmp_path, monkeypatch, number):
        def fails(**_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(disk.tempfile, "TemporaryFile", fails)
        with pytest.raises(DiskError) as raised:
            disk.check_writable("output_dir", tmp_path)
        reason = f"cannot be written ({os.strerror(number)}). Fix: {disk.REMEDIES[number]}."
        assert str(raised.value) == f"output_dir='{tmp_path}' {reason}"
        assert str(disk.disk_error(raised.value.__cause__, "run_dir", "r")) == f"run_dir='r' {reason}"

    def test_the_errors_of_a_full_read_only_or_forbidden_disk_have_a_remedy(self):
        assert {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM} <= set(disk.REMEDIES)

    def test_an_error_names_its_file(self):
        error = OSError(errno.EROFS, "Read-only file system", "/x/y")
        want = "file='/x/y' cannot be used (Read-only file system). Fix: use a folder that this user may write."
        assert str(disk.disk_error(error, "output_dir", "o")) == want

    @pytest.mark.parametrize(
        "error",
        [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device (os error 28)")],
    )
    def test_an_error_without_a_file_names_the_folder(self, error):
        want = "output_dir='o' cannot be written (No space left on device). Fix: free space on that disk, or use a "
        assert str(disk.disk_error(error, "output_dir", "o")).startswith(want)

    @pytest.mark.parametrize("error", [OSError("x"), ConnectionResetError(104, "x"), RuntimeError("x"), KeyError(28)])
    def test_a_defect_is_not_put_into_words(self, error):
        assert disk.disk_error(error, "output_dir", "o") is None

    def test_a_name_that_the_locale_cannot_write(self, monkeypatch):
        error = UnicodeEncodeError("ascii", "\u4f60", 0, 1, "ordinal not in range(128)")
        assert disk.disk_error(error, "output_dir", "o") is None  # not that of file names
        monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
        assert "in the encoding of this locale (ascii). Fix: use a UTF-8" in str(disk.disk_error(error, "k", "v"))
