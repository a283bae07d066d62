"""Read documents from text files, one at a time. An unreadable row stops the run or is skipped and counted."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_exp.config import OnBadLine
from deepseek_exp.config.text_files import shown
from deepseek_exp.errors import DataError, Problem

BOM = b"\xef\xbb\xbf"
OTHER_KEY = "set data.text_key to the key of the text, or data.on_bad_line=skip"
FIX_ROW = "correct the row, or set data.on_bad_line=skip"
CONVERT = "convert the file ({}), leave it out, or set data.on_bad_line=skip"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
REPLACE = "replace the file, or leave it out"


class BadRow(Exception):
    """A row cannot be read, or not used.

    Attributes:
        rule: the rule that it breaks.
        fix: what to do.
        lines_before: number of lines of the row before the fault.
        may_skip: whether data.on_bad_line=skip skips it.
    """

    def __init__(self, rule: str, fix: str = FIX_ROW, lines_before: int = 0, *, may_skip: bool = True) -> None:
        """Describe the fault."""
        super().__init__(rule)
        self.rule, self.fix, self.lines_before, self.may_skip = rule, fix, lines_before, may_skip


@dataclass(frozen=True)
class Reader:
    """Reads documents and handles rows that cannot be read.

    A .txt or .md file is one document, with its line ends. Each line of .jsonl and each row of .parquet is one
    document, in the field `text_key`. Rows of only whitespace are skipped. corpus.py splits documents into training and
    validation text.

    Attributes:
        key: configuration key of the path, for messages.
        text_key: field of a .jsonl row or column of a .parquet file that holds the text.
        on_bad_line: stop with a DataError, or skip and count.
        skipped: number of skipped rows by file; updated in place.
        document_of: returns the document of a .jsonl row, which is an object; None means its field `text_key`. Other
            files are then refused.
    """

    key: str
    text_key: str
    on_bad_line: OnBadLine
    skipped: Counter[str]
    document_of: Callable[[dict[str, Any]], str] | None = None

    def documents(self, path: Path) -> Iterator[str]:
        """Yield the documents of one file.

        Raises:
            DataError: a row cannot be read and on_bad_line is stop, or the file cannot be read at all.
        """
        rows, parse = self._open(path)
        for line, row in self._guarded(path, rows):
            try:
                text = parse(row)
            except BadRow as bad:
                if self.on_bad_line is OnBadLine.stop or not bad.may_skip:
                    where = f"{shown(path)}:{line + bad.lines_before}"
                    raise DataError(Problem(self.key, where, bad.rule, bad.fix)) from bad
                self.skipped[shown(path)] += 1
                continue
            if text.strip():
                yield text

    def _open(self, path: Path) -> tuple[Iterator[tuple[int, Any]], Callable[[Any], str]]:
        """Return an iterator over the file's (number from 1, raw row), and the function that decodes a raw row."""
        name = path.name.lower()
        if self.document_of is not None and not name.endswith((".jsonl", ".jsonl.gz")):
            rule, fix = "is not .jsonl, and only such files hold rows of messages", "leave it out, or convert it"
            raise DataError(Problem(self.key, shown(path), rule, fix))
        if name.endswith((".txt", ".md")):
            return _whole(path), _file_text
        if name.endswith(".parquet"):
            return self._cells(path), _cell_text
        return _lines(path), self._json_text

    def _guarded(self, path: Path, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        line = 0
        try:
            for line, row in rows:
                yield line, row
        except (OSError, EOFError, zlib.error) as error:
            rule = f"cannot be read ({error})"
            raise DataError(Problem(self.key, f"{shown(path)}:{line + 1}", rule, REPLACE)) from error

    def _json_text(self, raw: bytes) -> str:
        if raw.startswith(UTF_16):
            raise _not_utf_8(raw, "", 0)
        line = _decode(raw)
        if not line.strip():
            return ""
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise BadRow(f"is not valid JSON (column {error.colno}: {error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise BadRow("is JSON with too long a number or nested too deeply") from error
        if not isinstance(row, dict):
            raise BadRow(f"holds {kind(row)}, not an object with keys")
        if self.document_of is not None:
            return self.document_of(row)
        if self.text_key not in row:
            raise BadRow(f"has no key '{self.text_key}'; its keys are {listed(row)}", OTHER_KEY)
        text = row[self.text_key]
        if not isinstance(text, str):
            raise BadRow(f"holds {kind(text)} under '{self.text_key}', not a string", OTHER_KEY)
        return encodable(text)

    def _cells(self, path: Path) -> Iterator[tuple[int, Any]]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as table:
                n_columns = table.schema_arrow.names.count(self.text_key)
                if n_columns > 1:
                    rule, fix = f"has {n_columns} columns '{self.text_key}'", "rename all of them but one"
                    raise DataError(Problem(self.key, shown(path), rule, fix))
                if not n_columns:
                    rule = f"has no column '{self.text_key}'; its columns are {listed(table.schema_arrow.names)}"
                    raise DataError(Problem(self.key, shown(path), rule, "set data.text_key to one of them"))
                batches = table.iter_batches(batch_size=1024, columns=[self.text_key])
                cells = (cell for batch in batches for cell in batch.column(0))
                yield from enumerate(cells, start=1)
        except pyarrow.ArrowException as error:
            raise OSError(error) from error


def _whole(path: Path) -> Iterator[tuple[int, bytes]]:
    yield 1, path.read_bytes()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        yield from enumerate(file, start=1)


def _decode(raw: bytes) -> str:
    """Decode UTF-8, without a leading byte order mark."""
    try:
        return raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        rule = f"is not valid UTF-8 (byte 0x{error.object[error.start]:02x})"
        raise BadRow(rule, lines_before=before.count(b"\n")) from error


def _file_text(raw: bytes) -> str:
    """Decode an entire file, whose encoding cannot be judged by a single row."""
    try:
        return _decode(raw)
    except BadRow as bad:
        raise _not_utf_8(raw, bad.rule, bad.lines_before) from bad


def _not_utf_8(raw: bytes, rule: str, lines_before: int) -> BadRow:
    """Return the error for a file that breaks `rule` because it is not UTF-8, with a guess at its encoding."""
    if raw.startswith(UTF_16):
        return BadRow("is UTF-16, not UTF-8", CONVERT.format("iconv -f utf-16 -t utf-8"), lines_before)
    if b"\0" in raw:
        fix = "leave it out, or set data.on_bad_line=skip"
        return BadRow("is not text but binary data (it has bytes of zero, and is not valid UTF-8)", fix, lines_before)
    return BadRow(rule, CONVERT.format("if it is Latin-1: iconv -f latin1 -t utf-8"), lines_before)


def _cell_text(cell: Any) -> str:
    try:
        text = cell.as_py()
    except UnicodeDecodeError as error:
        raise BadRow("is not valid UTF-8") from error
    if not isinstance(text, str):
        raise BadRow(f"holds {kind(text)}, not a string")
    return text


def encodable(text: str) -> str:
    r"""Return the text; raise an error for a lone surrogate, which JSON can express (as \ud83d) and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"holds half a character (surrogate U+{ord(text[error.start]):04X})") from error
    return text


def kind(value: Any) -> str:
    """Return what kind of JSON value this is, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def listed(names: Iterable[str]) -> str:
    """Return names as a list in quotes, for messages."""
    return ", ".join(f"'{name}'" for name in names) or "none"
