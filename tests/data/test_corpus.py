import dataclasses
import json
import os
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from deepseek_exp.config import OnBadLine, Source
from deepseek_exp.data.corpus import Corpus, library_files
from deepseek_exp.errors import DataError


def split(cfg, skipped=None) -> dict[str, list[str]]:
    found = {"train": [], "valid": []}
    for side, text in Corpus.of(cfg).documents(Counter() if skipped is None else skipped):
        found[side].append(text)
    return found


def write_rows(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def n_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def test_library_files_in_order_without_tests(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/z.py",
        "a.py",
        "test/x.py",
        "a/tests/x.py",
        "site-packages/x.py",
        "c.txt",
        "idle_test/x.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    assert [p.relative_to(tmp_path).as_posix() for p in library_files(tmp_path)] == ["a.py", "a/z.py", "b.py"]


def test_stdlib_is_split_by_name_and_keeps_only_utf8(tmp_path: Path, cfg, monkeypatch) -> None:
    for i in range(300):
        (tmp_path / f"m{i:03}.py").write_text(f"x = {i}\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*- \xe9")
    (tmp_path / "empty.py").write_text("\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    cfg = dataclasses.replace(cfg, source=Source.stdlib, max_bytes=None)
    found = split(cfg)
    assert len(found["train"]) + len(found["valid"]) == 300
    assert 15 <= len(found["valid"]) <= 45
    for path in tmp_path.glob("m*.py"):  # other text under the same name stays on its side
        path.write_text(path.read_text().replace("x", "other"))
    assert split(cfg)["valid"] == [text.replace("x", "other") for text in found["valid"]]
    assert Corpus.of(cfg).source("valid") == str(tmp_path)


def test_many_documents_are_split_by_their_text(tmp_path: Path, text_cfg) -> None:
    texts = [f"document {i}" for i in range(400)]
    found = split(text_cfg(write_rows(tmp_path / "a.jsonl", texts)))
    assert 20 <= len(found["valid"]) <= 60
    assert sorted(found["train"] + found["valid"]) == sorted(texts)
    more = split(text_cfg(write_rows(tmp_path / "b.jsonl", ["new", *reversed(texts)])))
    assert set(found["valid"]) <= set(more["valid"])
    assert set(found["train"]) <= set(more["train"])


def test_of_few_documents_the_last_lines_are_held_out(tmp_path: Path, text_cfg) -> None:
    lines = [f"line number {i:03}\n" for i in range(200)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.txt").write_text("short\n" * 66)
    (tmp_path / "c.txt").write_text("x" * 2000)
    found = split(text_cfg(tmp_path, valid_fraction=0.25))
    assert found["train"] == ["".join(lines[:151]), "short\n" * 66, "x" * 2000]
    assert found["valid"] == ["".join(lines[151:])]


def test_the_last_words_are_held_out_of_texts_without_lines(tmp_path: Path, text_cfg) -> None:
    (tmp_path / "a.txt").write_text("word " * 200)
    (tmp_path / "b.txt").write_text("字" * 1000)
    (tmp_path / "c.txt").write_text("short")
    found = split(text_cfg(tmp_path, valid_fraction=0.2489))  # the first cut is in the word after 150 words
    assert found == {"train": ["word " * 151, "字" * 751, "short"], "valid": ["word " * 49, "字" * 249]}
    (tmp_path / "d.txt").write_text("with lines\n" * 100)
    found = split(text_cfg(tmp_path, valid_fraction=0.2))
    assert found["valid"] == ["with lines\n" * 19]


@pytest.mark.parametrize(("fraction", "n"), [(0.05, 1), (0.4, 3), (0.99, 7)])
def test_of_short_texts_whole_ones_are_held_out(tmp_path: Path, text_cfg, fraction: float, n: int) -> None:
    texts = [f"a short text, the {i}th\n" for i in range(8)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    found = split(text_cfg(tmp_path, valid_fraction=fraction))
    assert len(found["valid"]) == n and sorted(found["train"] + found["valid"]) == texts
    assert found == split(text_cfg(tmp_path, valid_fraction=fraction))
    more = split(text_cfg(write_rows(tmp_path / "9.jsonl", texts[::-1]), valid_fraction=fraction))
    assert set(more["valid"]) == set(found["valid"])  # by content, not by name or place


def test_of_equal_texts_some_are_held_out(tmp_path: Path, text_cfg) -> None:
    found = split(text_cfg(write_rows(tmp_path / "a.jsonl", ["the same"] * 4), valid_fraction=0.5))
    assert found == {"train": ["the same"] * 2, "valid": ["the same"] * 2}


def test_of_many_texts_one_is_held_out_at_least(tmp_path: Path, text_cfg) -> None:
    texts = [f"document {i}" for i in range(150)]
    found = split(text_cfg(write_rows(tmp_path / "a.jsonl", texts), valid_fraction=1e-6))
    assert len(found["valid"]) == 1 and sorted(found["train"] + found["valid"]) == sorted(texts)


def test_the_end_of_the_only_text_is_held_out(tmp_path: Path, text_cfg) -> None:
    for text, train in (("one two three", "one two "), ("abcde", "abc"), ("one\ntwo", "one\n")):
        (tmp_path / "a.txt").write_text(text)
        assert split(text_cfg(tmp_path, valid_fraction=0.4)) == {"train": [train], "valid": [text[len(train) :]]}
    (tmp_path / "a.txt").write_text("a")
    assert split(text_cfg(tmp_path)) == {"train": ["a"], "valid": []}


def test_what_cannot_be_read_is_counted_or_an_error(tmp_path: Path, text_cfg) -> None:
    (tmp_path / "a.txt").write_text("line\n" * 200)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^data\.path='.*gone\.txt' cannot be read \(No such file or directory\)"):
        Corpus.of(text_cfg(tmp_path))
    skipped = Counter()
    assert split(text_cfg(tmp_path, on_bad_line=OnBadLine.skip), skipped)["train"] == ["line\n" * 181]
    assert skipped == {f"{tmp_path}/gone.txt": 1}


@pytest.mark.parametrize("fraction", [0.9999999999999999, 1e-5, 0.9995])
def test_a_share_of_sums_that_is_hardly_ever_met(cfg, fraction: float) -> None:
    cfg = dataclasses.replace(cfg, max_bytes=300_000, valid_fraction=fraction)
    with pytest.raises(DataError) as error:
        Corpus.of(cfg)
    small, what = (1, "train") if fraction > 0.9999 else (3, "validate") if fraction < 0.1 else (150, "train")
    assert str(error.value) == (
        f"data.valid_fraction={fraction} leaves {small} bytes of data.max_bytes=300000 to {what} on, less than a "
        "document of sums. Fix: use a share of 260 bytes or more, or raise data.max_bytes."
    )


def test_a_valid_path_is_the_validation_text(tmp_path: Path, text_cfg) -> None:
    (tmp_path / "train.txt").write_text("to learn")
    write_rows(tmp_path / "valid.jsonl", ["to check", "and check"])
    cfg = text_cfg(tmp_path / "*.txt", valid_path=str(tmp_path / "valid.jsonl"))
    assert split(cfg) == {"train": ["to learn"], "valid": ["to check", "and check"]}
    assert (Corpus.of(cfg).source("train"), Corpus.of(cfg).source("valid")) == (cfg.path, cfg.valid_path)


def test_a_bad_row_of_the_valid_path_names_that_key(tmp_path: Path, text_cfg) -> None:
    (tmp_path / "train.txt").write_text("to learn")
    (tmp_path / "valid.jsonl").write_text("x\n")
    cfg = text_cfg(tmp_path / "train.txt", valid_path=str(tmp_path / "valid.jsonl"))
    with pytest.raises(DataError, match=r"^data\.valid_path='.*valid\.jsonl:1' is not valid JSON"):
        split(cfg)
    skipped = Counter()
    assert split(dataclasses.replace(cfg, on_bad_line=OnBadLine.skip), skipped)["valid"] == []
    assert skipped == {str(tmp_path / "valid.jsonl"): 1}


def test_no_file_is_for_both(tmp_path: Path, text_cfg) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError) as error:
        Corpus.of(text_cfg(tmp_path, valid_path=str(tmp_path / "a.txt")))
    assert str(error.value) == (
        f"data.valid_path='{tmp_path}/a.txt' names 1 file(s) that data.path names too ({tmp_path}/a.txt). "
        "Fix: leave validation text out of data.path."
    )


def test_max_bytes_is_shared_between_the_splits(tmp_path: Path, text_cfg) -> None:
    texts = [f"document {i} ä" for i in range(1000)]
    path = write_rows(tmp_path / "a.jsonl", texts)
    whole, part = split(text_cfg(path)), split(dataclasses.replace(text_cfg(path), max_bytes=1001))
    assert 1000 - 100 <= n_bytes(part["train"]) <= 901
    assert 98 <= n_bytes(part["valid"]) <= 100
    for side in part:
        n = len(part[side])
        assert part[side][:-1] == whole[side][: n - 1]
        assert whole[side][n - 1].startswith(part[side][-1])


def test_max_bytes_with_a_valid_path(tmp_path: Path, text_cfg) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    (tmp_path / "b.txt").write_text("ä" * 1000)
    cfg = text_cfg(tmp_path / "a.txt", valid_path=str(tmp_path / "b.txt"))
    assert split(dataclasses.replace(cfg, max_bytes=110)) == {"train": ["a" * 99], "valid": ["ä" * 5]}


def test_synthetic_text_is_right_and_the_same_each_time(cfg) -> None:
    found = split(cfg)
    assert found == split(cfg)
    assert (n_bytes(found["train"]), n_bytes(found["valid"])) == (27_000, 3_000)
    lines = [line for texts in found.values() for text in texts[:-1] for line in text.splitlines()]
    assert len(lines) > 2000
    for line in lines:
        a, b, c = map(int, re.fullmatch(r"(\d+) \+ (\d+) = (\d+)", line).groups())
        assert a + b == c


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"source": Source.text, "path": None},
            "data.path=null names no text for data.source=text. Fix: set data.path to a file, folder or glob.",
        ),
        (
            {"max_bytes": None},
            "data.max_bytes=null leaves data.source=synthetic without an end. Fix: set data.max_bytes, such as 300000.",
        ),
    ],
)
def test_a_missing_setting(cfg, changes, message) -> None:
    with pytest.raises(DataError) as error:
        Corpus.of(dataclasses.replace(cfg, **changes))
    assert str(error.value) == message


def test_the_fingerprint_follows_files_and_settings(tmp_path: Path, text_cfg) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["a"])
    cfg = text_cfg(path)
    seen = [Corpus.of(cfg).fingerprint()]
    for changes in (
        {"valid_fraction": 0.2},
        {"max_bytes": 10},
        {"vocab_size": 301},
        {"text_key": "other"},
        {"on_bad_line": OnBadLine.skip},
    ):
        seen.append(Corpus.of(dataclasses.replace(cfg, **changes)).fingerprint())
    os.utime(path, ns=(1, 1))
    seen.append(Corpus.of(cfg).fingerprint())
    path.write_text("longer than before")
    os.utime(path, ns=(1, 1))
    seen.append(Corpus.of(cfg).fingerprint())
    other = write_rows(tmp_path / "b.jsonl", ["a"])
    seen.append(Corpus.of(dataclasses.replace(cfg, valid_path=str(other))).fingerprint())
    assert len(set(seen)) == len(seen)
    assert Corpus.of(dataclasses.replace(cfg, seq_len=99, cache_dir="x")).fingerprint() == seen[-2]
