"""Files are UTF-8, whatever the locale."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import runs

# modules and objects whose open() is not that of text files
NOT_TEXT = ("os", "gzip", "shard")
PLACE_OF_MODE = {"open": 0, "fdopen": 1, "read_text": None, "write_text": None}


def constant(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def without_encoding(source: str) -> Iterator[int]:
    """List the lines with a call that reads or writes text in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function, keywords = node.func, {k.arg: k.value for k in node.keywords}
        if isinstance(function, ast.Attribute):
            name, place = function.attr, PLACE_OF_MODE.get(function.attr)
            if name == "open" and isinstance(function.value, ast.Name) and function.value.id in NOT_TEXT:
                continue
        else:
            name, place = getattr(function, "id", ""), 1
        if name in PLACE_OF_MODE:
            given = node.args[place] if place is not None and len(node.args) > place else keywords.get("mode")
            text = "b" not in str(constant(given))
        else:
            text = any(constant(keywords.get(word)) is True for word in ("text", "universal_newlines"))
        if text and "encoding" not in keywords:
            yield node.lineno


@pytest.mark.parametrize(
    "source",
    [
        "open(path)",
        "path.open()",
        "path.open('a')",
        "path.open(mode='w')",
        "os.fdopen(handle, 'w')",
        "(a / b).read_text()",
        "path.write_text(text)",
        "subprocess.run(words, text=True)",
    ],
)
def test_what_is_found(source):
    assert list(without_encoding(source)) == [1]


def test_every_text_file_is_utf_8():
    files = [*(runs.ROOT / "deepseek_exp").rglob("*.py"), runs.ROOT / "run.py"]
    assert len(files) > 80
    found = {
        f"{file.relative_to(runs.ROOT)}:{line}"
        for file in files
        for line in without_encoding(Path(file).read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.long
def test_a_run_in_a_locale_that_is_not_utf_8(tmp_path):
    """Training, a checkpoint of texts beyond ASCII, a sample and a resume, with ASCII as the locale's encoding."""
    (tmp_path / "text.txt").write_text("d\xe9j\xe0 vu, \u4f60\u597d \u2014 na\xefve\n\n" * 4000, encoding="utf-8")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def run(*words):
        command = [sys.executable, str(runs.ROOT / "run.py"), *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300)

    own = [o for o in runs.QUICK if not o.startswith(("data=", "trainer.max_steps="))]
    trained = run(*own, "data=text", "data.path=text.txt", "trainer.max_steps=4", "data.vocab_size=300")
    assert trained.returncode == 0, trained.stderr
    sampled = run("do=sample", "resume=last", "sample.max_new_tokens=20", "sample.temperature=1")
    assert sampled.returncode == 0 and sampled.stdout.isascii(), sampled.stderr
    resumed = run("resume=last", "trainer.max_steps=6")
    assert resumed.returncode == 0, resumed.stderr
    refused = run(*runs.QUICK, "tracking.run_name=\xe9")
    assert refused.returncode == 2 and b"tracking.run_name='\\xe9' holds bytes that are not text" in refused.stderr
