"""The cache of prepared text: damage, killed builds, and several processes at once."""

import dataclasses
import hashlib
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from deepseek_exp.data import Tokenizer, prepare, shards
from tests.data.test_prepare import PROCESSES, built, folder_of, state, tokens


def flip(path: Path, place: int) -> None:
    """Change a byte in the middle of a file, and keep the time of its last change."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# what is damaged by a function of the folder, and what the log says about it
DAMAGES = {
    "flipped train": (lambda f: flip(f / "train.bin", 1000), "train.bin is not what was packed"),
    "flipped valid": (lambda f: flip(f / "valid.bin", 0), "valid.bin is not what was packed"),
    "beyond the vocabulary": (lambda f: (f / "train.bin").write_bytes(b"\xff" * (f / "train.bin").stat().st_size), ""),
    "gone train": (lambda f: (f / "train.bin").unlink(), "train.bin is missing"),
    "nan unigram": (lambda f: np.save(f / "unigram_bits.npy", np.full(300, np.nan)), "unigram_bits.npy is not what"),
    "odd unigram": (lambda f: np.save(f / "unigram_bits.npy", np.zeros((2, 2))), "unigram_bits.npy is not what was"),
    "flipped unigram": (lambda f: flip(f / "unigram_bits.npy", 900), "unigram_bits.npy is not what was written"),
    "gone unigram": (lambda f: (f / "unigram_bits.npy").unlink(), "unigram_bits.npy is missing"),
    "{}": (lambda f: (f / "meta.json").write_text("{}"), "meta.json is not what was written"),
    "[]": (lambda f: (f / "meta.json").write_text("[]"), "meta.json is not what was written"),
    "nested": (lambda f: (f / "meta.json").write_text("[" * 100_000), "meta.json is not valid JSON"),
    "dtype": (
        lambda f: (f / "meta.json").write_text((f / "meta.json").read_text().replace("uint16", "uint61")),
        "meta.json is not what was written",
    ),
    "count": (
        lambda f: (f / "meta.json").write_text(
            (f / "meta.json").read_text().replace('"n_bytes": 3000', '"n_bytes": 9')
        ),
        "meta.json is not what was written",
    ),
}


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory) -> Path:
    """A folder that holds a cache; its copy is whole too, though its files are others."""
    return tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_tokens_are_found_and_packed_again(cfg, whole_cache, tmp_path, caplog, damage, said: str) -> None:
    caplog.set_level(logging.INFO)
    first = state(prepare(dataclasses.replace(cfg, cache_dir=str(whole_cache))))
    shutil.copytree(whole_cache, cfg.cache_dir)
    caplog.clear()
    assert state(prepare(cfg)) == first and not built(caplog)
    damage(folder_of(cfg))
    assert state(prepare(cfg)) == first
    (message,) = [m for m in caplog.messages if " is damaged (" in m]
    assert message.startswith(f"{folder_of(cfg)} is damaged (") and said in message
    assert built(caplog)


def test_tokens_are_read_for_their_digest_only_if_they_changed(cfg, monkeypatch) -> None:
    first, read = state(prepare(cfg)), []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: [read.append(file.name), digest(file, name)][1])
    assert state(prepare(cfg)) == first
    assert read == []  # `build` has just written them
    train, valid = (folder_of(cfg) / name for name in ("train.bin", "valid.bin"))
    os.utime(valid)
    for _ in range(2):
        assert state(prepare(cfg)) == first
        assert read == [str(train), str(valid)]
    (folder_of(cfg) / "verified.json").write_text("[")
    assert state(prepare(cfg)) == first
    assert read == 2 * [str(train), str(valid)]


@pytest.mark.parametrize(
    "damage", ["short", "no meta", "half meta", "no tokenizer", "bad tokenizer", "other tokenizer"]
)
def test_a_damaged_cache_is_built_again(cfg, caplog, damage: str) -> None:
    caplog.set_level(logging.INFO)
    first, folder = state(prepare(cfg)), folder_of(cfg)
    (tokenizer,) = (Path(cfg.cache_dir) / "tokenizers").iterdir()
    if damage == "short":
        os.truncate(folder / "valid.bin", 100)
    elif damage == "no meta":
        (folder / "meta.json").unlink()
    elif damage == "half meta":
        os.truncate(folder / "meta.json", 100)
    elif damage == "no tokenizer":
        tokenizer.unlink()
    elif damage == "bad tokenizer":
        os.truncate(tokenizer, 1000)
    else:
        Tokenizer.train(["other"], 300).save(tokenizer)
    caplog.clear()
    second = prepare(cfg)
    assert built(caplog)
    if damage == "other tokenizer":
        assert second.tokenizer.digest != first[0]
        assert [i["digest"] for i in second.inputs] == [i["digest"] for i in first[-1]]
        assert second.tokenizer.token_bytes[tokens(second.parts[0].train)].sum() == second.parts[0].train.n_bytes
    else:
        assert state(second) == first


def build_and_stop_half_way(cfg, half_way) -> None:
    """Build in small batches; at the third one, report and hang."""
    original, calls = Tokenizer.encode_batch, []

    def encode_batch(self, texts):
        calls.append(1)
        if len(calls) == 3:
            half_way.set()
            time.sleep(60)
        return original(self, texts)

    Tokenizer.encode_batch = encode_batch
    shards.BATCH_CHARS = 10_000
    prepare(cfg)


def test_a_build_that_was_killed_leaves_nothing_that_counts(cfg, tmp_path) -> None:
    half_way = PROCESSES.Event()
    process = PROCESSES.Process(target=build_and_stop_half_way, args=(cfg, half_way))
    process.start()
    assert half_way.wait(60)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = folder_of(cfg)
    (part,) = folder.parent.glob("*.part")
    assert (part / "train.bin").exists()
    assert not folder.exists()
    after = prepare(cfg)
    assert not part.exists()
    assert state(after) == state(prepare(dataclasses.replace(cfg, cache_dir=str(tmp_path / "clean"))))


def build_and_tell(cfg, together, told) -> None:
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("deepseek_exp").addHandler(handler)
    logging.getLogger("deepseek_exp").setLevel(logging.INFO)
    together.wait()
    data = prepare(cfg)
    told.put((sum(message.startswith("packed ") for message in messages), state(data)))


def test_of_several_processes_at_once_one_builds(cfg) -> None:
    cfg = dataclasses.replace(cfg, max_bytes=200_000)
    together, told = PROCESSES.Barrier(3), PROCESSES.Queue()
    processes = [PROCESSES.Process(target=build_and_tell, args=(cfg, together, told)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [told.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(n for n, _ in answers) == [0, 0, 1]
    assert answers[0][1] == answers[1][1] == answers[2][1] == state(prepare(cfg))


def test_the_first_of_two_machines_wins(cfg, tmp_path) -> None:
    first, folder = prepare(cfg), folder_of(cfg)
    part = tmp_path / "part"
    part.mkdir()
    shards.publish(part, folder)
    assert not part.exists()
    assert state(prepare(cfg)) == state(first)
    (folder / "meta.json").unlink()
    part.mkdir()
    with pytest.raises(OSError, match="not empty"):
        shards.publish(part, folder)
