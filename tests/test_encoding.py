"""Files are UTF-8, whatever the locale."""

from __future__ import annotations

import ast
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
