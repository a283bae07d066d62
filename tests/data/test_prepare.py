import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deepseek_exp.config import OnBadLine
from deepseek_exp.data import Tokenizer, prepare, shards
from deepseek_exp.data.corpus import Corpus
from deepseek_exp.errors import DataError

PROCESSES = multiprocessing.get_context("forkserver")  # real processes, from one that has imported the room once
PROCESSES.set_forkserver_preload(["deepseek_exp.data"])


def tokens(shard) -> list[int]:
    return shard.open().tolist()


def folder_of(cfg) -> Path:
    return Path(cfg.cache_dir) / "shards" / Corpus.of(cfg).fingerprint()


def state(data) -> tuple:
    return (
        data.tokenizer.digest,
        tokens(data.parts[0].train),
        tokens(data.parts[0].valid),
        data.unigram_bits.tolist(),
        data.inputs,
    )


def built(caplog) -> bool:
    was = any(message.startswith("packed ") for message in caplog.messages)
    caplog.clear()
    return was


def write_rows(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_tokens_are_the_documents_each_with_an_end(tmp_path, text_cfg) -> None:
    texts = [f"the {i}th document, of the {i % 7}th kind" for i in range(300)]
    cfg = text_cfg(write_rows(tmp_path / "a.jsonl", ["", *texts]))
    data = prepare(cfg)
    sides = {"train": [], "valid": []}
    for side, text in Corpus.of(cfg).documents(Counter()):
        sides[side].append(text)
    for shard, side in ((data.parts[0].train, sides["train"]), (data.parts[0].valid, sides["valid"])):
        ids = shard.open()
        ends = np.flatnonzero(ids == 0)
        parts = np.split(ids, ends + 1)
        assert [data.tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]] == side
        assert parts[-1].size == 0
        assert (ids.dtype, shard.n_tokens, shard.n_documents) == (np.uint16, len(ids), len(side))
        assert shard.n_bytes == sum(len(text) for text in side) == data.tokenizer.token_bytes[ids.tolist()].sum()
        text = b"".join(len(text).to_bytes(8) + text.encode() for text in side)
        assert shard.digest == hashlib.sha256(text).hexdigest()
    assert data.tokenizer.digest == Tokenizer.train(sides["train"], 300).digest


def test_inputs_for_tracking(cfg, tmp_path, text_cfg) -> None:
    data = prepare(cfg)
    assert data.inputs[1] == {
        "name": "synthetic",
        "context": "valid",
        "digest": data.parts[0].valid.digest,
        "source": "synthetic",
        "n_documents": data.parts[0].valid.n_documents,
        "n_bytes": 3000,
        "n_tokens": data.parts[0].valid.n_tokens,
    }
    write_rows(tmp_path / "a.jsonl", ["a b c d e"] * 20)
    write_rows(tmp_path / "b.jsonl", ["f g h i j"] * 20)
    data = prepare(text_cfg(tmp_path / "a.jsonl", valid_path=str(tmp_path / "b.jsonl")))
    assert [(i["name"], i["context"], i["source"], i["n_documents"]) for i in data.inputs] == [
        ("a.jsonl", "train", f"{tmp_path}/a.jsonl", 20),
        ("b.jsonl", "valid", f"{tmp_path}/b.jsonl", 20),
    ]


def test_a_document_longer_than_a_batch(tmp_path, text_cfg, monkeypatch) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARS", 1000)
    monkeypatch.setattr("deepseek_exp.data.tokenizer.PIECE_CHARS", 500)
    text = "".join(f"line {i} of a long text\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("other words\n" * 50)
    data = prepare(text_cfg(tmp_path / "a.txt", valid_path=str(tmp_path / "b.txt")))
    assert tokens(data.parts[0].train) == [*data.tokenizer.encode(text), 0]


def test_unigram_bits_against_a_loop(cfg) -> None:
    data = prepare(cfg)
    counts, size = Counter(tokens(data.parts[0].train)), data.tokenizer.vocab_size
    assert data.unigram_bits.shape == (size,)
    for token, bits in enumerate(data.unigram_bits.tolist()):
        assert bits == pytest.approx(-math.log2((counts[token] + 1) / (data.parts[0].train.n_tokens + size)), rel=1e-12)


def test_a_large_vocabulary_takes_four_bytes(tmp_path, cfg, monkeypatch) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", 1 << 16, raising=False)
    corpus, tokenizer = Corpus.of(cfg), Tokenizer.train(["a"], 300)
    found = shards.survey(corpus)
    for size, dtype in ((1 << 16, "uint16"), ((1 << 16) + 1, "uint32")):
        tokenizer.vocab_size = size
        tokenizer.__dict__.pop("token_bytes", None)  # of the size before
        packed = shards.build(corpus, found, tokenizer, "t.json", tmp_path / str(size))
        assert packed.train.dtype == dtype
        assert packed.train.open()[:3].tolist() == tokenizer.encode(next(corpus.documents(Counter()))[1])[:3]


def test_a_second_start_builds_nothing_until_something_changes(tmp_path, text_cfg, caplog) -> None:
    caplog.set_level(logging.INFO)
    path = write_rows(tmp_path / "a.jsonl", [f"document {i}" for i in range(200)])
    cfg = text_cfg(path)
    first = prepare(cfg)
    assert built(caplog)
    assert state(prepare(cfg)) == state(first)
    assert state(prepare(dataclasses.replace(cfg, seq_len=8))) == state(first)
    assert not built(caplog)
    write_rows(path, [f"changed {i}" for i in range(200)])
    second = prepare(cfg)
    assert built(caplog)
    assert second.parts[0].train.digest != first.parts[0].train.digest


def test_the_tokenizer_is_shared_by_all_with_the_same_training_text(tmp_path, text_cfg, caplog) -> None:
    caplog.set_level(logging.INFO)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"some words of {name}\n" * 50)
    first = prepare(text_cfg(tmp_path / "a.txt", valid_path=str(tmp_path / "b.txt")))
    assert "training a tokenizer of 300 entries on 0.0 MB" in caplog.messages
    caplog.clear()
    second = prepare(text_cfg(tmp_path / "a.txt", valid_path=str(tmp_path / "c.txt")))
    assert built(caplog)
    assert not [message for message in caplog.messages if "tokenizer" in message]
    assert second.tokenizer.digest == first.tokenizer.digest
    assert len(list((tmp_path / "cache/tokenizers").iterdir())) == 1
    third = prepare(text_cfg(tmp_path / "a.txt", valid_path=str(tmp_path / "b.txt"), vocab_size=260))
    assert third.tokenizer.vocab_size == 260


def test_text_that_changes_while_it_is_read(tmp_path, text_cfg, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("words and more words\n" * 100)
    build, cfg = shards.build, text_cfg(path)

    @functools.wraps(build)
    def build_slowly(*args):
        packed = build(*args)
        path.write_text("other\n")
        return packed

    monkeypatch.setattr(shards, "build", build_slowly)
    with pytest.raises(DataError) as error:
        prepare(cfg)
    assert str(error.value) == (
        f"data.path='{path}' names text that changed while it was read. Fix: start again when the files are complete."
    )
    assert not list((tmp_path / "cache/shards").glob("*/meta.json"))


def test_skipped_rows_are_counted_and_told_each_time(tmp_path, text_cfg, caplog) -> None:
    write_rows(tmp_path / "a.jsonl", ["some text of some length"] * 30)
    for name, bad in (("b.jsonl", "x\ny\n"), ("c.jsonl", "z\n")):
        (tmp_path / name).write_text(bad)
    cfg = text_cfg(tmp_path / "[bc].jsonl", on_bad_line=OnBadLine.skip, valid_path=str(tmp_path / "a.jsonl"))
    write_rows(tmp_path / "c.jsonl", ["text to train on, and more"] * 30)
    (tmp_path / "c.jsonl").open("a").write("{}\n")
    for _ in range(2):
        caplog.clear()
        data = prepare(cfg)
        assert data.skipped == {f"{tmp_path}/b.jsonl": 2, f"{tmp_path}/c.jsonl": 1}
        message = f"skipped 3 rows that could not be read ({tmp_path}/b.jsonl: 2, {tmp_path}/c.jsonl: 1)"
        assert caplog.messages == [message]


def test_progress_is_reported(cfg, caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shards, "REPORT_SECONDS", 0)
    prepare(dataclasses.replace(cfg, max_bytes=1_000_000))
    assert "packing tokens: 0.5 of 1.0 MB" in caplog.messages
    assert "reading for the tokenizer: 0.5 of 1.0 MB" in caplog.messages


NO_TRAIN = "data.path='{}/a.txt' holds no text to train on. Fix: point it at files with text."
NO_VALID = "data.valid_path='{}/b.txt' holds no text to validate on. Fix: point it at files with text."
NO_TAIL = (
    "data.valid_fraction=0.1 holds out nothing of 1 documents to validate on. "
    "Fix: set data.valid_path to validation text, or raise data.valid_fraction."
)


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [("", "b" * 99, NO_TRAIN), (" \n", None, NO_TRAIN), ("a" * 99, "\n", NO_VALID), ("a", None, NO_TAIL)],
)
def test_no_text(tmp_path, text_cfg, train, valid, message) -> None:
    (tmp_path / "a.txt").write_text(train)
    (tmp_path / "b.txt").write_text(valid or "")
    cfg = text_cfg(tmp_path / "a.txt", valid_path=None if valid is None else str(tmp_path / "b.txt"))
    with pytest.raises(DataError) as error:
        prepare(cfg)
    assert str(error.value) == message.format(tmp_path)
    assert not (tmp_path / "cache/tokenizers").exists()


def test_no_text_within_max_bytes(cfg) -> None:
    with pytest.raises(DataError) as error:
        prepare(dataclasses.replace(cfg, max_bytes=1, valid_fraction=0.9999999999999999999))
    assert str(error.value) == "data.max_bytes=1 leaves no text to train on. Fix: raise data.max_bytes."


def test_fewer_tokens_than_a_sequence(cfg) -> None:
    data = prepare(cfg)
    n_train, n_valid = data.parts[0].train.n_tokens, data.parts[0].valid.n_tokens
    prepare(dataclasses.replace(cfg, seq_len=n_valid - 1))
    with pytest.raises(DataError) as error:
        prepare(dataclasses.replace(cfg, seq_len=n_valid))
    assert str(error.value) == (
        f"data.seq_len={n_valid} needs {n_valid + 1} tokens of valid text and there are {n_valid}. "
        "Fix: lower data.seq_len, raise data.valid_fraction, or add more valid text."
    )
    with pytest.raises(DataError) as error:
        prepare(dataclasses.replace(cfg, seq_len=n_train))
    assert [problem.rule for problem in error.value.problems] == [
        f"needs {n_train + 1} tokens of train text and there are {n_train}",
        f"needs {n_train + 1} tokens of valid text and there are {n_valid}",
    ]


def test_a_given_tokenizer(cfg, tmp_path) -> None:
    path = tmp_path / "t.json"
    trained = Tokenizer.train(["other words " * 50], 290)
    trained.save(path)
    data = prepare(dataclasses.replace(cfg, tokenizer=str(path), vocab_size=trained.vocab_size))
    assert data.tokenizer.digest == trained.digest
    assert data.tokenizer.token_bytes[tokens(data.parts[0].train)].sum() == data.parts[0].train.n_bytes
    n = trained.vocab_size
    with pytest.raises(DataError) as error:
        prepare(dataclasses.replace(cfg, tokenizer=str(path), vocab_size=n - 1))
    assert str(error.value) == (
        f"data.tokenizer='{path}' has {n} entries and data.vocab_size is {n - 1}. "
        f"Fix: set model.vocab_size={n} or more (data.vocab_size follows it unless it is set), "
        "or with init_from use the tokenizer that the checkpoint was trained with."
    )
    path.write_text("{")
    with pytest.raises(DataError, match=r"data\.tokenizer='.*' is not the JSON of a tokenizer .* Fix: use a"):
        prepare(dataclasses.replace(cfg, tokenizer=str(path)))
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)\. Fix: use a tokenizer.json"):
        prepare(dataclasses.replace(cfg, tokenizer=f"{path}x"))


def test_the_tokenizer_of_a_checkpoint(cfg, tmp_path, text_cfg, caplog) -> None:
    caplog.set_level(logging.INFO)
    first = prepare(cfg)
    first.tokenizer.save(tmp_path / "tokenizer.json")
    theirs = {"tokenizer": str(tmp_path / "tokenizer.json")}
    caplog.clear()
    assert prepare(dataclasses.replace(cfg, **theirs)).digests() == first.digests()
    assert not built(caplog)  # what was packed with the tokenizer trained on this text
    elsewhere = dataclasses.replace(cfg, **theirs, cache_dir=str(tmp_path / "other"))
    assert prepare(elsewhere).digests() == first.digests() and built(caplog)
    text = text_cfg(write_rows(tmp_path / "a.jsonl", [f"other text, number {i}" for i in range(300)]))
    assert prepare(text).tokenizer.digest != first.tokenizer.digest
    caplog.clear()
    other = prepare(dataclasses.replace(text, **theirs))
    assert not [m for m in caplog.messages if "training a tokenizer" in m] and built(caplog)
    assert other.tokenizer.digest == first.tokenizer.digest
    assert first.tokenizer.token_bytes[tokens(other.parts[0].train)].sum() == other.parts[0].train.n_bytes
    assert prepare(dataclasses.replace(text, **theirs)).digests() == other.digests() and not built(caplog)


def test_digests_are_of_the_content(tmp_path, text_cfg) -> None:
    texts = [f"document {i}" for i in range(300)]
    first = prepare(text_cfg(write_rows(tmp_path / "a.jsonl", texts)))
    assert list(first.digests()) == ["tokenizer", "train", "train tokens", "valid", "valid tokens"]
    assert first.digests()["train tokens"] == hashlib.sha256(first.parts[0].train.path.read_bytes()).hexdigest()
    assert prepare(text_cfg(write_rows(tmp_path / "moved.jsonl", texts))).digests() == first.digests()
    first.tokenizer.save(tmp_path / "t.json")
    moved = write_rows(tmp_path / "b.jsonl", [*texts[1:], texts[0]])
    changed = prepare(text_cfg(moved, tokenizer=str(tmp_path / "t.json"))).digests()
    assert {name for name in changed if changed[name] != first.digests()[name]} == {"train", "train tokens"}


@pytest.mark.parametrize(
    ("cache_dir", "reason", "fix"),
    [
        ("file/cache", "Not a directory", "use a path whose parents are folders"),
        ("/dev/null/x", "Not a directory", "use a path whose parents are folders"),
        ("/proc/x", "No such file or directory", "use a folder that this user may write"),
    ],
)
def test_a_cache_that_cannot_be_made(cfg, tmp_path, cache_dir, reason, fix) -> None:
    (tmp_path / "file").write_text("x")
    folder = str(tmp_path / cache_dir)  # an absolute one stays what it is
    with pytest.raises(DataError) as error:
        prepare(dataclasses.replace(cfg, cache_dir=folder))
    message = str(error.value)
    assert message.startswith(f"data.cache_dir='{folder}' cannot be used ({reason}: {folder}")
    assert message.endswith(f"). Fix: {fix}.")


@pytest.mark.parametrize("place", ["_write_tokens", "_sync"])
def test_a_full_disk_while_packing(cfg, monkeypatch, place) -> None:
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shards, place, full)
        with pytest.raises(DataError) as error:
            prepare(cfg)
    assert str(error.value) == (
        f"data.cache_dir='{cfg.cache_dir}' cannot be used (No space left on device). "
        "Fix: free space on that disk, or use a folder on another disk."
    )
    assert not list(Path(cfg.cache_dir).glob("shards/*/")) and prepare(cfg).n_train_tokens


def test_a_hint_for_validation_text_that_is_trained_on(tmp_path, text_cfg, caplog) -> None:
    for name in ("corpus.train.jsonl", "corpus.valid.jsonl", "more/val/a.jsonl", "developer.jsonl", "latest.jsonl"):
        (tmp_path / "valid" / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "valid" / name, [f"document {i} of {name}" for i in range(100)])
    cfg = text_cfg(tmp_path / "valid")
    for _ in range(2):  # from a cache too
        caplog.clear()
        prepare(cfg)
        assert caplog.messages == [
            f"data.path={cfg.path} trains on {tmp_path}/valid/corpus.valid.jsonl and 1 more, whose name says that it "
            "is for validation or tests. To validate on it, leave it out of data.path and set data.valid_path"
        ]
    caplog.clear()
    train = f"{cfg.path}/*.train.jsonl"
    prepare(dataclasses.replace(cfg, path=train, valid_path=f"{cfg.path}/*.valid.jsonl"))
    prepare(dataclasses.replace(cfg, path=train))
    prepare(dataclasses.replace(cfg, path=f"{cfg.path}/corpus.valid.jsonl"))  # meant, since it is all there is
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n  To be, or not to be,\nthat is the question", "To be, or not to"),
        ("short\n\nline", "short"),
        ("大" * 100, "大" * 40),
    ],
)
def test_the_first_words_of_the_validation_text(tmp_path, text_cfg, text, words) -> None:
    write_rows(tmp_path / "a.jsonl", ["To be, or not to be, that is the 大大大 question"] * 50)
    write_rows(tmp_path / "b.jsonl", [text, "another document, long enough"])
    assert prepare(text_cfg(tmp_path / "a.jsonl", valid_path=str(tmp_path / "b.jsonl"))).first_words() == words
