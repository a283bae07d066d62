import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from deepseek_exp.config import OnBadLine
from deepseek_exp.data.readers import Reader, find_files
from deepseek_exp.errors import DataError

OTHER_KEY = "Fix: set data.text_key to the key of the text, or data.on_bad_line=skip."
MEND = "Fix: mend the row, or set data.on_bad_line=skip."

BAD_LINES = [
    (b'{"text": ', f"is not valid JSON (column 9: Expecting value). {MEND}"),
    (b"[" * 100_000, f"is JSON with too long a number or nested too deeply. {MEND}"),
    (b"7" * 5000, f"is JSON with too long a number or nested too deeply. {MEND}"),
    (b'["a"]', f"holds a list, not an object with keys. {MEND}"),
    (b'{"content": "a", "id": 1}', f"has no key 'text'; its keys are 'content', 'id'. {OTHER_KEY}"),
    (b"{}", f"has no key 'text'; its keys are none. {OTHER_KEY}"),
    (b'{"text": 7}', f"holds a number under 'text', not a string. {OTHER_KEY}"),
    (b'{"text": null}', f"holds null under 'text', not a string. {OTHER_KEY}"),
    (b'{"text": "\xff"}', f"is not valid UTF-8 (byte 0xff). {MEND}"),
    (b'{"text": "a\\ud83d"}', f"holds half a character (surrogate U+D83D). {MEND}"),
]


def read(path: Path, on_bad_line: OnBadLine = OnBadLine.stop, skipped: Counter | None = None) -> list[str]:
    return list(Reader("data.path", "text", on_bad_line, Counter() if skipped is None else skipped).documents(path))


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_a_bad_line_stops_with_its_place(tmp_path: Path, bad: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + bad + b"\n")
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == f"data.path='{path}:3' {message}"


@pytest.mark.parametrize("bad", [line for line, _ in BAD_LINES])
def test_a_bad_line_is_skipped_and_counted(tmp_path: Path, bad: bytes) -> None:
    path, skipped = tmp_path / "a.jsonl", Counter()
    path.write_bytes(b'{"text": "good"}\n' + bad + b'\n{"text": "better"}\n')
    assert read(path, OnBadLine.skip, skipped) == ["good", "better"]
    assert skipped == {str(path): 1}


def test_one_document_a_row_and_none_for_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one\\n"}\r\n{"text": " \\n"}\n{"text": ""}\n  \n{"text": "tw\xc3\xb6 \xe2\x80\xa8"}'
    )
    assert read(path) == ["one\n", "twö \u2028"]


def test_a_gzipped_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    rows = b"".join(json.dumps({"text": f"row {i} {i * i}"}).encode() + b"\n" for i in range(1000))
    path.write_bytes(gzip.compress(rows))
    assert read(path)[999] == "row 999 998001"
    path.write_bytes(gzip.compress(rows)[:-500])
    with pytest.raises(DataError) as error:
        read(path, OnBadLine.skip)
    assert "cannot be read (Compressed file ended before the end-of-stream marker was reached)" in str(error.value)
    path.write_bytes(rows)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == (
        f"data.path='{path}:1' cannot be read (Not a gzipped file (b'{{\"')). Fix: replace the file, or leave it out."
    )


def test_parquet(tmp_path: Path) -> None:
    path, skipped = tmp_path / "a.parquet", Counter()
    parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "text": ["one", None, " ", "two"]}), path)
    assert read(path, OnBadLine.skip, skipped) == ["one", "two"]
    assert skipped == {str(path): 1}
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == f"data.path='{path}:2' holds null, not a string. {MEND}"


def test_parquet_cell_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    cells = pyarrow.array([b"good", b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": cells}), path)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == f"data.path='{path}:2' is not valid UTF-8. {MEND}"


def test_parquet_without_the_column_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(DataError) as error:
        read(path, OnBadLine.skip)
    assert str(error.value) == (
        f"data.path='{path}' has no column 'text'; its columns are 'id', 'body'. Fix: set data.text_key to one of them."
    )
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a.parquet:1' cannot be read \(.*Parquet magic bytes not found"):
        read(path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(b"\xef\xbb\xbf# Title\r\n\r\ntext")
    assert read(path) == ["# Title\r\n\r\ntext"]
    path.write_bytes(b"one\ntwo\nth\xe9ee")
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == f"data.path='{path}:3' is not valid UTF-8 (byte 0xe9). {MEND}"
    skipped = Counter()
    assert read(path, OnBadLine.skip, skipped) == []
    assert skipped == {str(path): 1}


def test_files_of_a_folder_or_glob(tmp_path: Path) -> None:
    for name in ("b.txt", "a.MD", "sub/c.jsonl.gz", "d.csv", ".hidden.txt", ".git/e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = lambda path: [f.relative_to(tmp_path).as_posix() for f in find_files("data.path", str(path))]  # noqa: E731
    assert names(tmp_path) == ["a.MD", "b.txt", "sub/c.jsonl.gz"]
    assert names(tmp_path / "*") == ["a.MD", "b.txt"]
    assert names(tmp_path / "**/*.gz") == ["sub/c.jsonl.gz"]
    assert names(tmp_path / "b.txt") == ["b.txt"]


@pytest.mark.parametrize("path", ["nothing", "*.txt", "empty"])
def test_no_file_matches(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.csv").write_text("x")
    with pytest.raises(DataError) as error:
        find_files("data.valid_path", f"{tmp_path}/{path}")
    assert str(error.value) == (
        f"data.valid_path='{tmp_path}/{path}' matches no file with a suffix of .txt .md .jsonl .jsonl.gz .parquet. "
        "Fix: point data.valid_path at such files."
    )


def test_a_named_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x")
    with pytest.raises(DataError) as error:
        find_files("data.path", str(path))
    assert str(error.value) == (
        f"data.path='{path}' has none of the known suffixes .txt .md .jsonl .jsonl.gz .parquet. "
        "Fix: convert or rename the file."
    )
