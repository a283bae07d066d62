import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from deepseek_exp.config import OnBadLine
from deepseek_exp.config.text_files import exists, find_files, shown
from deepseek_exp.data.readers import Reader
from deepseek_exp.errors import DataError
from tests.runs import ROOT

OTHER_KEY = "Fix: set data.text_key to the key of the text, or data.on_bad_line=skip."
FIX_ROW = "Fix: correct the row, or set data.on_bad_line=skip."

BAD_LINES = [
    (b'{"text": ', f"is not valid JSON (column 9: Expecting value). {FIX_ROW}"),
    (b"[" * 100_000, f"is JSON with too long a number or nested too deeply. {FIX_ROW}"),
    (b"7" * 5000, f"is JSON with too long a number or nested too deeply. {FIX_ROW}"),
    (b'["a"]', f"holds a list, not an object with keys. {FIX_ROW}"),
    (b'{"content": "a", "id": 1}', f"has no key 'text'; its keys are 'content', 'id'. {OTHER_KEY}"),
    (b"{}", f"has no key 'text'; its keys are none. {OTHER_KEY}"),
    (b'{"text": 7}', f"holds a number under 'text', not a string. {OTHER_KEY}"),
    (b'{"text": null}', f"holds null under 'text', not a string. {OTHER_KEY}"),
    (b'{"text": "\xff"}', f"is not valid UTF-8 (byte 0xff). {FIX_ROW}"),
    (b'{"text": "a\\ud83d"}', f"holds half a character (surrogate U+D83D). {FIX_ROW}"),
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
    assert str(error.value) == f"data.path='{path}:2' holds null, not a string. {FIX_ROW}"


def test_parquet_cell_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    cells = pyarrow.array([b"good", b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": cells}), path)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == f"data.path='{path}:2' is not valid UTF-8. {FIX_ROW}"


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
    assert str(error.value) == (
        f"data.path='{path}:3' is not valid UTF-8 (byte 0xe9). Fix: convert the file (if it is Latin-1: "
        "iconv -f latin1 -t utf-8), leave it out, or set data.on_bad_line=skip."
    )
    skipped = Counter()
    assert read(path, OnBadLine.skip, skipped) == []
    assert skipped == {str(path): 1}


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_in_utf_16(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(("\ufeff" * (encoding != "utf-16") + "some words\n").encode(encoding))
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == (
        f"data.path='{path}:1' is UTF-16, not UTF-8. Fix: convert the file (iconv -f utf-16 -t utf-8), leave it out, "
        "or set data.on_bad_line=skip."
    )


def test_a_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\x7fELF\0\0\n\xff")
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == (
        f"data.path='{path}:2' is not text but binary data (it has bytes of zero, and is not valid UTF-8). "
        "Fix: leave it out, or set data.on_bad_line=skip."
    )


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"]), path)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value) == f"data.path='{path}' has 2 columns 'text'. Fix: rename all of them but one."


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


def found(path: Path | str, unreadable: list[str] | None = None) -> list[str]:
    return [file.name for file in find_files("data.path", str(path), unreadable)]


def test_links_are_followed_in_folders_as_in_globs_and_circles_end(tmp_path: Path) -> None:
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for folder in (texts / "sub", elsewhere):
        folder.mkdir(parents=True)
    for file in (texts / "a.txt", texts / "sub/b.txt", elsewhere / "c.txt"):
        file.write_text("x")
    (texts / "linked").symlink_to(elsewhere)
    for name in ("loop", "again", "sub/up"):
        (texts / name).symlink_to(texts)
    (texts / "self").symlink_to(texts / "self")
    for pattern in (texts, texts / "**", texts / "**/*.txt", texts / "**/**/**/**/*.txt", f"{texts}/../texts/**/*"):
        assert found(pattern) == ["c.txt", "a.txt", "b.txt"]  # the real paths, in order
    assert found(texts / "*/c.txt") == ["c.txt"]
    assert found(texts / "**/up/a.txt") == ["a.txt"]
    assert exists(f"{texts}/**/*.txt") and not exists(f"{texts}/**/*.md")


def test_hidden_names_and_brackets(tmp_path: Path) -> None:
    for name in (".hidden/a.txt", "b[1]/c.txt", "b1/d.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    assert found(tmp_path) == found(tmp_path / "**/*.txt") == ["d.txt", "c.txt"]
    assert found(tmp_path / ".h*/*.txt") == found(tmp_path / ".hidden") == ["a.txt"]
    assert found(tmp_path / "b[1]") == ["c.txt"]  # a folder of this name is there
    assert found(tmp_path / "b[1]/*") == ["d.txt"]


def test_pipes_and_devices_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "null.txt").symlink_to("/dev/null")
    assert found(tmp_path) == found(tmp_path / "*.txt") == ["a.txt"]
    with pytest.raises(DataError, match="matches no file with a suffix"):
        found(tmp_path / "pipe.txt")


def test_a_link_that_leads_nowhere_is_no_text_left_out_in_silence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError) as error:
        found(tmp_path)
    assert str(error.value) == (
        f"data.path='{tmp_path}/gone.txt' cannot be read (No such file or directory). Fix: make it readable, leave it "
        "out of data.path, or skip and count it with data.on_bad_line=skip."
    )
    unreadable: list[str] = []
    assert found(tmp_path, unreadable) == ["a.txt"] and unreadable == [f"{tmp_path}/gone.txt"]


def as_nobody(folder: Path, *patterns: str) -> list[list[str]]:
    """Find files as a user without rights: first with an error, then with the list of what cannot be read."""
    script = """if True:
        import json, os, sys
        from deepseek_exp.errors import DataError
        from deepseek_exp.config.text_files import exists, find_files
        if os.getuid() == 0:
            os.setgid(65534), os.setuid(65534)
        answers = []
        for pattern in sys.argv[1:]:
            try:
                answers.append([str(f) for f in find_files("data.path", pattern)])
            except DataError as error:
                answers.append([str(error)])
            unreadable = []
            try:
                files = [str(f) for f in find_files("data.path", pattern, unreadable)]
            except DataError as error:
                files = [str(error)]
            answers.append([*files, "but", *sorted(unreadable)])
        print(json.dumps(answers))
    """
    done = subprocess.run([sys.executable, "-c", script, *patterns], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_may_not_be_read_is_no_text_left_out_in_silence() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # every user may enter it
        folder, fix = Path(name), "make it readable, leave it out of data.path, or skip and count it with"
        folder.chmod(0o755)
        for sub in ("a", "b", "c"):
            (folder / sub).mkdir()
            (folder / sub / "x.txt").write_text("x")
        (folder / "b").chmod(0)
        try:
            answers = as_nobody(folder, name, f"{name}/**/*.txt", f"{name}/*/x.txt", f"{name}/b/x.txt", f"{name}/b")
        finally:
            (folder / "b").chmod(0o755)
    for stopped, skipped in zip(answers[:6:2], answers[1:6:2], strict=True):
        assert stopped[0].startswith(f"data.path='{name}/b") and "cannot be read (Permission denied" in stopped[0]
        assert stopped[0].endswith(f"Fix: {fix} data.on_bad_line=skip.")
        assert skipped[:3] == [f"{name}/a/x.txt", f"{name}/c/x.txt", "but"] and skipped[3].startswith(f"{name}/b")
    assert all("Permission denied" in answer or "cannot be read" in answer for answer, *_ in answers[6:])


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.txt"))
    path.write_bytes(b"one\xe9")
    assert find_files("data.path", str(tmp_path)) == [path]
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"data.path='{tmp_path}/\\xe9.txt:1' is not valid UTF-8")
    str(error.value).encode()
    assert shown(path) == f"{tmp_path}/\\xe9.txt"


def test_a_home_directory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert found("~") == found("~/*.txt") == found("~/a.txt") == ["a.txt"]
    assert exists("~/a.txt") and not exists("~/b.txt")
