"""From the data section to tokens on disk: found in the cache, or built into it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_exp.config import DataConfig, Source
from deepseek_exp.data import shards
from deepseek_exp.data.corpus import Corpus
from deepseek_exp.data.shards import Shard, Shards, Survey
from deepseek_exp.data.tokenizer import Tokenizer
from deepseek_exp.errors import DataError, Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """Text, ready to train on.

    Attributes:
        tokenizer: trained on the training text.
        train: tokens to train on.
        valid: tokens to validate on.
        unigram_bits: (vocab_size,) float64, bits that each token costs a model that knows only how often it is in the
            training text.
        skipped: rows that could not be read (data.on_bad_line=skip), by file.
        inputs: what an experiment tracker records of each split: name, context, digest, source, n_documents, n_bytes,
            n_tokens.
    """

    tokenizer: Tokenizer
    train: Shard
    valid: Shard
    unigram_bits: Tensor
    skipped: dict[str, int]
    inputs: list[dict[str, Any]]


def prepare(cfg: DataConfig) -> PreparedData:
    """Make the tokenizer and the packed tokens of a data section, or find them in `cfg.cache_dir`.

    The cache is keyed by the settings and by path, size and time of change of every file, so a second start reads no
    text. Several processes may call this at once: one builds, the others wait for it.

    Raises:
        DataError: there is no such text, it cannot be read, or it is too short.
    """
    corpus = Corpus.of(cfg)
    folder = Path(cfg.cache_dir).absolute() / "shards" / corpus.fingerprint()
    found = _cached(cfg, folder)
    if found is None:
        with _alone(folder):
            found = _cached(cfg, folder) or _build(corpus, folder)
    tokenizer, packed = found
    _check_lengths(cfg, packed)
    if packed.skipped:
        by_file = ", ".join(f"{path}: {count}" for path, count in packed.skipped.items())
        log.warning("skipped %d rows that could not be read (%s)", sum(packed.skipped.values()), by_file)
    inputs = [_input(corpus, "train", packed.train), _input(corpus, "valid", packed.valid)]
    bits = torch.from_numpy(packed.unigram_bits)
    return PreparedData(tokenizer, packed.train, packed.valid, bits, packed.skipped, inputs)


def _cached(cfg: DataConfig, folder: Path) -> tuple[Tokenizer, Shards] | None:
    packed = shards.load(folder)
    if packed is None:
        return None
    try:
        tokenizer = Tokenizer.load(_tokenizers(cfg) / packed.tokenizer_file)
    except (FileNotFoundError, ValueError):
        return None
    return (tokenizer, packed) if tokenizer.digest == packed.tokenizer else None


def _build(corpus: Corpus, folder: Path) -> tuple[Tokenizer, Shards]:
    started, before = time.monotonic(), corpus.fingerprint()
    log.info("reading %s, for the first time or since it changed", corpus.source("train"))
    found = shards.survey(corpus)
    _check_text(corpus.cfg, found)
    tokenizer, name = _tokenizer(corpus, found)
    packed = shards.build(corpus, found, tokenizer, name, folder)
    if corpus.fingerprint() != before:
        shutil.rmtree(folder)
        rule = "names text that changed while it was read"
        raise DataError(Problem("data.path", corpus.cfg.path, rule, "start again when the files are complete"))
    n_tokens, seconds = packed.train.n_tokens + packed.valid.n_tokens, time.monotonic() - started
    log.info("packed %d tokens into %s in %.1f s", n_tokens, folder, seconds)
    return tokenizer, packed


def _tokenizer(corpus: Corpus, found: Survey) -> tuple[Tokenizer, str]:
    """Find the tokenizer of this training text in the cache or train it; its file name depends on nothing else."""
    vocab_size = corpus.cfg.vocab_size
    key = hashlib.sha256(f"{found.digests['train']} {vocab_size}".encode()).hexdigest()
    path = _tokenizers(corpus.cfg) / f"{key[:32]}.json"
    try:
        return Tokenizer.load(path), path.name
    except (FileNotFoundError, ValueError):
        log.info("training a tokenizer of %d entries on %.1f MB", vocab_size, found.n_bytes["train"] / 1e6)
        documents = shards.reported(
            corpus.documents(Counter()), "reading for the tokenizer", sum(found.n_bytes.values())
        )
        tokenizer = Tokenizer.train((text for split, text in documents if split == "train"), vocab_size)
        tokenizer.save(path)
        return tokenizer, path.name


def _tokenizers(cfg: DataConfig) -> Path:
    return Path(cfg.cache_dir) / "tokenizers"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out; the lock ends with the process, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that builds %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_text(cfg: DataConfig, found: Survey) -> None:
    """Refuse a corpus without text to train on or to validate on, before anything is trained."""
    if not found.n_bytes["train"]:
        if cfg.source is Source.text:
            raise DataError(Problem("data.path", cfg.path, "holds no text to train on", "point it at files with text"))
        raise DataError(Problem("data.max_bytes", cfg.max_bytes, "leaves no text to train on", "raise data.max_bytes"))
    if not found.n_bytes["valid"]:
        if cfg.valid_path is not None:
            fix = "point it at files with text"
            raise DataError(Problem("data.valid_path", cfg.valid_path, "holds no text to validate on", fix))
        rule = f"holds out nothing of {found.n_documents['train']} documents to validate on"
        fix = "set data.valid_path to validation text, or raise data.valid_fraction"
        raise DataError(Problem("data.valid_fraction", cfg.valid_fraction, rule, fix))


def _check_lengths(cfg: DataConfig, packed: Shards) -> None:
    least = cfg.seq_len + 1
    problems = [
        Problem(
            "data.seq_len",
            cfg.seq_len,
            f"needs {least} tokens of {split} text and there are {shard.n_tokens}",
            f"lower data.seq_len, or give more {split} text",
        )
        for split, shard in (("train", packed.train), ("valid", packed.valid))
        if shard.n_tokens < least
    ]
    if problems:
        raise DataError(*problems)


def _input(corpus: Corpus, split: str, shard: Shard) -> dict[str, Any]:
    source = corpus.source(split)
    return {
        "name": Path(source).name if corpus.cfg.source is Source.text else corpus.cfg.source.value,
        "context": split,
        "digest": shard.digest,
        "source": source,
        "n_documents": shard.n_documents,
        "n_bytes": shard.n_bytes,
        "n_tokens": shard.n_tokens,
    }
