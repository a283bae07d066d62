"""Prepare the tokens of a data section on disk: find them in the cache, or build them there."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek_exp.config import DataConfig, Source
from deepseek_exp.data import shards
from deepseek_exp.data.chat import contents
from deepseek_exp.data.corpus import Corpus
from deepseek_exp.data.shards import SPLITS, Shard, Shards, Survey
from deepseek_exp.data.template import Template
from deepseek_exp.data.tokenizer import Tokenizer
from deepseek_exp.disk import FOLDER, REMEDIES, expand
from deepseek_exp.errors import DataError, Problem

PROMPT_TOKENS = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One text of an experiment, packed.

    Attributes:
        name: its name in data.mixture; "" for the only part of any other source.
        weight: its share of the sequences is this / the sum of all weights.
        train: tokens for training.
        valid: tokens for validation.
    """

    name: str
    weight: float
    train: Shard
    valid: Shard


@dataclass(frozen=True)
class PreparedData:
    """Text that is ready for training.

    Attributes:
        tokenizer: the tokenizer, trained on the training text of all parts or read from data.tokenizer.
        parts: in the order of data.mixture; one, without a name, for every other source.
        unigram_bits: (vocab_size,) float64, cost in bits of each token under the token frequencies of the training
            text; the parts of a mixture are weighted.
        skipped: number of unreadable rows (data.on_bad_line=skip), by file.
        inputs: records for the experiment tracker, one per split of each part: name, context, digest, source,
            n_documents, n_bytes, n_tokens, and of instruction data n_supervised, the targets that count.
        template: the chat template of instruction data; None for text.
    """

    tokenizer: Tokenizer
    parts: tuple[Part, ...]
    unigram_bits: Tensor
    skipped: dict[str, int]
    inputs: list[dict[str, Any]]
    template: Template | None = None

    @property
    def part_names(self) -> list[str]:
        """Names of the parts of a mixture, in order; empty for every other source."""
        return [part.name for part in self.parts if part.name]

    @property
    def n_train_tokens(self) -> int:
        """Number of training tokens of all parts."""
        return sum(part.train.n_tokens for part in self.parts)

    @property
    def n_valid_tokens(self) -> int:
        """Number of validation tokens of all parts."""
        return sum(part.valid.n_tokens for part in self.parts)

    @property
    def token_bytes(self) -> Tensor:
        """Bytes of text that each token stands for, (vocab_size,) int64; what bits per byte are counted in.

        If the tokenizer changes text, it is float64: the bytes of the changed text times a factor, so that the tokens
        of the validation text add up to the bytes that it had before.
        """
        table = self.tokenizer.token_bytes
        shards = [part.valid for part in self.parts]
        kept = sum(shard.n_bytes if shard.n_token_bytes is None else shard.n_token_bytes for shard in shards)
        factor = sum(shard.n_bytes for shard in shards) / kept
        return table if factor == 1 else table.double() * factor  # (vocab_size,)

    def first_words(self) -> str:
        """Return the beginning of the first validation line as a prompt, at most 5 words or 40 characters."""
        shard = self.parts[0].valid
        ids = shard.open()[:PROMPT_TOKENS].tolist()
        if self.tokenizer.end_id in ids:
            ids = ids[: ids.index(self.tokenizer.end_id)]
        text = self.tokenizer.decode(ids).strip("\ufffd \t\r\n")  # the cut may split a character
        line = text.partition("\n")[0]
        return " ".join(line.split()[:5])[:40].rstrip()

    def digests(self) -> dict[str, str]:
        """Return the sha256 digests of the data by name. They depend on its content, not on its path.

        Names are `tokenizer`, `train` and `valid` (the text of a split), `train tokens` and `valid tokens` (its packed
        ids). For a mixture they are `train of <part>`, `train tokens of <part>` and so on.
        """
        found = {"tokenizer": self.tokenizer.digest}
        for part in self.parts:
            of = f" of {part.name}" if part.name else ""
            for split in SPLITS:
                shard = getattr(part, split)
                found |= {f"{split}{of}": shard.digest, f"{split} tokens{of}": shard.tokens_digest}
                if shard.rows is not None:
                    found[f"{split} supervised tokens{of}"] = shard.rows.mask_digest
        if self.template is not None:
            found["template"] = self.template.digest
        return found


def prepare(cfg: DataConfig) -> PreparedData:
    """Build the tokenizer and packed tokens of a data section, or find them in `cfg.cache_dir`.

    The cache is keyed by the settings, by path, size and mtime of every file, and by the content of data.tokenizer, so
    a second start reads no text. Several processes may call this at once: one builds and the others wait. Packed tokens
    whose digest differs from the recorded one are packed again.

    Raises:
        DataError: the text or tokenizer does not exist or cannot be read or used, the text is too short, or the cache
            cannot be written.
    """
    try:
        plan, (tokenizer, packed) = _find_or_build(cfg)
    except OSError as error:  # the cache; errors of reading text and tokenizers are converted where they are read
        raise DataError(_unusable_cache(cfg, error)) from error
    _check_lengths(plan, packed)
    for corpus in plan.corpora:
        if corpus.hint is not None:
            log.warning(corpus.hint)
    skipped: dict[str, int] = {}
    for shard in packed:
        skipped |= shard.skipped
    if skipped:
        by_file = ", ".join(f"{path}: {count}" for path, count in skipped.items())
        log.warning("skipped %d rows that could not be read (%s)", sum(skipped.values()), by_file)
    for corpus, p in zip(plan.corpora, packed, strict=True):
        _report_changes(corpus, p)
    weights = [part.weight for part in cfg.mixture.values()] or [1.0]
    parts = tuple(
        Part(corpus.name, weight, p.train, p.valid)
        for corpus, weight, p in zip(plan.corpora, weights, packed, strict=True)
    )
    inputs = [
        _input(c, split, getattr(p, split)) for c, p in zip(plan.corpora, packed, strict=True) for split in SPLITS
    ]
    template = plan.corpora[0].template if plan.corpora[0].is_chat else None
    return PreparedData(tokenizer, parts, _unigram_bits(weights, packed), skipped, inputs, template)


def _report_changes(corpus: Corpus, packed: Shards) -> None:
    """Log how much of a text the tokenizer's normalizer changes, which no token can restore."""
    for split in SPLITS:
        shard = getattr(packed, split)
        if shard.n_changed:
            log.warning(
                "the tokenizer changes %d of %d %s documents of %s (its normalizer): their tokens stand for %d of %d "
                "bytes, and a model trained on them writes text in that form. Bits per byte count the original bytes",
                shard.n_changed, shard.n_documents, split, corpus.source(split), shard.n_token_bytes, shard.n_bytes,
            )  # fmt: skip


def _find_or_build(cfg: DataConfig) -> tuple[_Plan, tuple[Tokenizer, list[Shards]]]:
    plan = _Plan.of(cfg)
    if plan.given is not None:  # it may be a checkpoint's, trained on the same text, whose tokens are already packed
        trained = plan.keyed(None)
        found = _cached(trained)
        if found is not None and found[0].digest == plan.given.digest:
            return trained, (plan.given, found[1])
    found = _cached(plan)
    if found is None:
        with _alone(plan.lock):
            found = _cached(plan, warn=True) or _build(plan)
    return plan, found


def _unusable_cache(cfg: DataConfig, error: OSError) -> Problem:
    where = f": {error.filename}" if error.filename else ""
    fix = REMEDIES.get(error.errno or 0, FOLDER)
    return Problem("data.cache_dir", cfg.cache_dir, f"cannot be used ({error.strerror}{where})", fix)


@dataclass(frozen=True)
class _Plan:
    """The cache entries of a data section, which are built if they do not exist.

    Attributes:
        cfg: the data section.
        given: an existing tokenizer to use instead of training one.
        corpora: the text of each part.
        fingerprints: fingerprint of each part's text.
        lock: lock file held while the tokenizer is trained and the parts are packed. All processes that write to one
            of the folders use the same file.
        folders: folder of each part's packed tokens.
    """

    cfg: DataConfig
    given: Tokenizer | None
    corpora: list[Corpus]
    fingerprints: list[str]
    lock: Path
    folders: list[Path]

    @classmethod
    def of(cls, cfg: DataConfig) -> _Plan:
        given, corpora = _given(cfg), Corpus.parts(cfg)
        prints = [corpus.fingerprint() for corpus in corpora]
        return cls(cfg, None, corpora, prints, Path(), []).keyed(given)

    def keyed(self, given: Tokenizer | None) -> _Plan:
        """Return the plan with the tokenizer `given`, or with one trained on the text if it is None."""
        prints = self.fingerprints
        # The cache key of the tokenizer.
        vocabulary = given.digest[:32] if given else prints[0] if len(prints) == 1 else _hash(*prints)
        top = expand(self.cfg.cache_dir).absolute() / "shards"
        folders = [top / (p if p == vocabulary else _hash(p, vocabulary)) for p in prints]
        return dataclasses.replace(self, given=given, lock=top / f"{vocabulary}.lock", folders=folders)


def _hash(*words: str) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:32]


def _given(cfg: DataConfig) -> Tokenizer | None:
    """Return the tokenizer that data.tokenizer names, or None."""
    return None if cfg.tokenizer is None else Tokenizer.named(cfg.tokenizer, cfg.vocab_size)


def _cached(plan: _Plan, *, warn: bool = False) -> tuple[Tokenizer, list[Shards]] | None:
    packed = [shards.load(folder, warn=warn) for folder in plan.folders]
    if any(p is None for p in packed) or len({(p.tokenizer, p.tokenizer_file) for p in packed}) > 1:
        return None
    try:
        tokenizer = plan.given or Tokenizer.load(_tokenizers(plan.cfg) / packed[0].tokenizer_file)
    except (FileNotFoundError, ValueError):
        return None
    return (tokenizer, packed) if tokenizer.digest == packed[0].tokenizer else None


def _build(plan: _Plan) -> tuple[Tokenizer, list[Shards]]:
    started = time.monotonic()
    log.info("reading %s, for the first time or since it changed", ", ".join(c.source("train") for c in plan.corpora))
    surveys = [shards.survey(corpus) for corpus in plan.corpora]
    for corpus, found in zip(plan.corpora, surveys, strict=True):
        _check_text(corpus, found)
    tokenizer, name = _tokenizer(plan, surveys)
    packed = []
    for corpus, found, folder in zip(plan.corpora, surveys, plan.folders, strict=True):
        old = shards.load(folder)
        fits = old is not None and (old.tokenizer, old.tokenizer_file) == (tokenizer.digest, name)
        packed.append(old if fits else shards.build(corpus, found, tokenizer, name, folder))
    _check_unchanged(plan)
    n_tokens, seconds = sum(p.train.n_tokens + p.valid.n_tokens for p in packed), time.monotonic() - started
    where = ", ".join(str(folder) for folder in plan.folders)
    log.info("packed %d tokens into %s in %.1f s", n_tokens, where, seconds)
    return tokenizer, packed


def _check_unchanged(plan: _Plan) -> None:
    """Raise an error if the text changed while it was packed."""
    changed = [
        corpus for corpus, before in zip(plan.corpora, plan.fingerprints, strict=True) if corpus.fingerprint() != before
    ]
    if changed:
        for folder in plan.folders:
            shutil.rmtree(folder)
        rule, fix = "names text that changed while it was read", "start again when the files are complete"
        raise DataError(*(Problem(corpus.key("path"), corpus.cfg.path, rule, fix) for corpus in changed))


def _tokenizer(plan: _Plan, surveys: list[Survey]) -> tuple[Tokenizer, str]:
    """Find the tokenizer in the cache, or train it. Its file name depends only on the training text.

    An existing tokenizer is copied into the cache too, so that all packed tokens refer to theirs in the same way.
    """
    if plan.given:
        path = _tokenizers(plan.cfg) / f"{plan.given.digest[:32]}.json"
        plan.given.save(path)
        return plan.given, path.name
    vocab_size = plan.cfg.vocab_size
    key = _hash(*(found.digests["train"] for found in surveys), str(vocab_size))
    path = _tokenizers(plan.cfg) / f"{key}.json"
    try:
        return Tokenizer.load(path), path.name
    except (FileNotFoundError, ValueError):
        n_train, n_all = (sum(sum(f.n_bytes[s] for s in which) for f in surveys) for which in (("train",), SPLITS))
        log.info("training a tokenizer of %d entries on %.1f MB", vocab_size, n_train / 1e6)
        documents = itertools.chain.from_iterable(corpus.documents(Counter()) for corpus in plan.corpora)
        documents = shards.reported(documents, "reading for the tokenizer", n_all)
        texts = (text for split, text in documents if split == "train")
        tokenizer = Tokenizer.train(map(contents, texts) if plan.corpora[0].is_chat else texts, vocab_size)
        tokenizer.save(path)
        return tokenizer, path.name


def _unigram_bits(weights: list[float], packed: list[Shards]) -> Tensor:
    """Return the bits of the parts' token frequencies mixed by weight: -log2(sum of share * 2^-bits)."""
    if len(packed) == 1:
        return torch.from_numpy(packed[0].unigram_bits)
    frequencies = sum(w / sum(weights) * np.exp2(-p.unigram_bits) for w, p in zip(weights, packed, strict=True))
    return torch.from_numpy(-np.log2(frequencies))  # (vocab_size,)


def _tokenizers(cfg: DataConfig) -> Path:
    return expand(cfg.cache_dir) / "tokenizers"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold an exclusive lock among the processes of this machine. It is released however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that builds %s", path.with_suffix(""))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_text(corpus: Corpus, found: Survey) -> None:
    """Raise an error if a corpus has no training or no validation text, before anything is trained."""
    cfg, path, valid_path = corpus.cfg, corpus.key("path"), corpus.key("valid_path")
    if not found.n_bytes["train"]:
        if cfg.source in (Source.text, Source.chat):
            raise DataError(Problem(path, cfg.path, "holds no text to train on", "point it at files with text"))
        raise DataError(Problem("data.max_bytes", cfg.max_bytes, "leaves no text to train on", "raise data.max_bytes"))
    if not found.n_bytes["valid"]:
        if cfg.valid_path is not None:
            fix = "point it at files with text"
            raise DataError(Problem(valid_path, cfg.valid_path, "holds no text to validate on", fix))
        of = f" of {corpus.name}" if corpus.name else ""
        rule = f"holds out nothing of {found.n_documents['train']} documents{of} to validate on"
        fix = f"set {valid_path} to validation text, or raise data.valid_fraction"
        raise DataError(Problem("data.valid_fraction", cfg.valid_fraction, rule, fix))


def _check_lengths(plan: _Plan, packed: list[Shards]) -> None:
    seq_len = plan.cfg.seq_len
    least, problems = seq_len + 1, []
    if plan.corpora[0].is_chat:  # rows are padded
        return
    for corpus, p in zip(plan.corpora, packed, strict=True):
        for split, shard in (("train", p.train), ("valid", p.valid)):
            if shard.n_tokens < least:
                text = f"{split} text" + (f" of {corpus.name}" if corpus.name else "")
                rule = f"needs {least} tokens of {text} and there are {shard.n_tokens}"
                is_held_out = split == "valid" and not corpus.valid_files
                more = ", raise data.valid_fraction" * is_held_out
                problems.append(Problem("data.seq_len", seq_len, rule, f"lower data.seq_len{more}, or add more {text}"))
    if problems:
        raise DataError(*problems)


def _input(corpus: Corpus, split: str, shard: Shard) -> dict[str, Any]:
    source = corpus.source(split)
    file = Path(source).name if corpus.cfg.source in (Source.text, Source.chat) else corpus.cfg.source.value
    supervised = {} if shard.rows is None else {"n_supervised": shard.rows.n_supervised}
    return {
        "name": corpus.name or file,
        "context": split,
        "digest": shard.digest,
        "source": source,
        "n_documents": shard.n_documents,
        "n_bytes": shard.n_bytes,
        "n_tokens": shard.n_tokens,
        **supervised,
    }
