"""Tokens of a corpus, packed once into one memory-mapped file per split.

A folder `<fingerprint>` holds train.bin and valid.bin (flat token ids, <|endoftext|> after each document),
unigram_bits.npy and meta.json; of instruction data also the files of chat.py. It is built in an adjacent folder, synced
and renamed, so it is complete or absent.

meta.json has the sha256 of the other files and of itself. Token files may be large, so their digest is only recomputed
if size, times or inode differ from those at the last verification (verified.json).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from deepseek_exp.data.chat import RowFiles, RowWriter, encoded
from deepseek_exp.data.corpus import Corpus, Document
from deepseek_exp.data.tokenizer import Tokenizer

SPLITS = ("train", "valid")
UNIGRAM = "unigram_bits.npy"
VERIFIED = "verified.json"
BATCH_CHARS = 1 << 20
REPORT_SECONDS = 5.0
BIG = 1 << 30  # bytes; verifying them takes about a second

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """The packed tokens of one split.

    Attributes:
        path: file of token ids.
        dtype: numpy type of an id.
        n_tokens: number of ids in the file, including beginnings and ends of documents.
        n_documents: number of documents.
        n_bytes: size of the text in UTF-8, in bytes.
        digest: sha256 of the text, in hexadecimal.
        tokens_digest: sha256 of the file of token ids.
        n_token_bytes: the bytes that the tokens stand for, which are fewer or more if the tokenizer changes text; None
            if packed by a version that did not count them.
        n_changed: number of documents that the tokenizer changes.
        rows: of instruction data, the files of its rows; None for text.
    """

    path: Path
    dtype: str
    n_tokens: int
    n_documents: int
    n_bytes: int
    digest: str
    tokens_digest: str
    n_token_bytes: int | None = None
    n_changed: int = 0
    rows: RowFiles | None = None

    def open(self) -> np.memmap:
        """Return a read-only memory map of the ids, shape (n_tokens,)."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.n_tokens,))

    def open_mask(self) -> np.ndarray:
        """Return a read-only memory map of whether each id is a target that counts, shape (n_tokens,), uint8."""
        return _mapped(self.path.with_suffix(".mask.bin"), np.uint8)

    def open_ends(self) -> np.ndarray:
        """Return a read-only memory map of where each row ends, shape (n_documents,), int64."""
        return _mapped(self.path.with_suffix(".ends.bin"), np.int64)

    @property
    def files(self) -> dict[Path, str]:
        """The files with their sha256."""
        if self.rows is None:
            return {self.path: self.tokens_digest}
        mask, ends = self.path.with_suffix(".mask.bin"), self.path.with_suffix(".ends.bin")
        return {self.path: self.tokens_digest, mask: self.rows.mask_digest, ends: self.rows.ends_digest}


def _mapped(path: Path, dtype: type[np.generic]) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


@dataclass(frozen=True)
class Shards:
    """Both splits, with the statistics collected while they were built.

    Attributes:
        train: tokens for training.
        valid: tokens for validation.
        tokenizer: sha256 of the tokenizer that encoded them.
        tokenizer_file: name of its file.
        unigram_bits: (vocab_size,) float64, cost in bits of each token under the frequencies of the training tokens.
        skipped: number of unreadable rows, by file.
    """

    train: Shard
    valid: Shard
    tokenizer: str
    tokenizer_file: str
    unigram_bits: np.ndarray
    skipped: dict[str, int]


@dataclass(frozen=True)
class Survey:
    """Result of a first pass over a corpus: documents, bytes and sha256 by split, skipped rows by file."""

    n_documents: Counter[str]
    n_bytes: Counter[str]
    digests: dict[str, str]
    skipped: dict[str, int]


def survey(corpus: Corpus) -> Survey:
    """Read a corpus once and return its statistics.

    The digest of a split is over (size as 8 bytes, UTF-8 text) of each document.
    """
    n_documents, n_bytes, skipped = Counter(), Counter(), Counter()
    hashes = {split: hashlib.sha256() for split in SPLITS}
    for split, text in corpus.documents(skipped):
        data = text.encode()
        n_documents[split] += 1
        n_bytes[split] += len(data)
        hashes[split].update(len(data).to_bytes(8))
        hashes[split].update(data)
    return Survey(n_documents, n_bytes, {split: h.hexdigest() for split, h in hashes.items()}, dict(skipped))


class _DamagedError(Exception):
    """A folder does not hold what was packed into it; the message states what is wrong."""


def load(folder: Path, *, warn: bool = False) -> Shards | None:
    """Return the shards that `build` wrote, or None if they are missing or damaged.

    Args:
        folder: folder of the packed tokens.
        warn: log what is damaged.
    """
    try:
        return _load(folder)
    except FileNotFoundError as error:
        damage = f"{Path(error.filename).name} is missing" if folder.exists() else None
    except _DamagedError as error:
        damage = str(error)
    if warn and damage is not None:
        log.warning("%s is damaged (%s), so the text is packed again", folder, damage)
    return None


def _load(folder: Path) -> Shards:
    meta = _read_meta(folder)
    packed = {split: _shard(folder / f"{split}.bin", meta.pop(split)) for split in SPLITS}
    _check_tokens(folder, packed)
    unigram = (folder / UNIGRAM).read_bytes()
    if hashlib.sha256(unigram).hexdigest() != meta.pop("unigram_digest"):
        raise _DamagedError(f"{UNIGRAM} is not what was written")
    return Shards(**packed, **meta, unigram_bits=np.load(io.BytesIO(unigram)))


def _shard(path: Path, saved: dict[str, Any]) -> Shard:
    rows = saved.pop("rows", None)
    return Shard(path, **saved, rows=None if rows is None else RowFiles(**rows))


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _DamagedError("meta.json is not valid JSON") from error
    if not isinstance(meta, dict) or meta.pop("meta_digest", None) != _json_digest(meta):
        raise _DamagedError("meta.json is not what was written")
    return meta


def _json_digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _check_tokens(folder: Path, packed: dict[str, Shard]) -> None:
    """Compare the token files with their digests, unless they are unchanged since the last comparison."""
    stamps = _stamps(packed)
    if _read_stamps(folder) == stamps:
        return
    size = sum(stamp[0] for stamp in stamps.values())
    if size >= BIG:
        log.info("verifying %.1f GB of packed tokens", size / 1e9)
    for path, digest in (entry for shard in packed.values() for entry in shard.files.items()):
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise _DamagedError(f"{path.name} is not what was packed")
    with contextlib.suppress(OSError):  # a read-only folder is verified at each start
        _write_stamps(folder, stamps)


def _stamps(packed: dict[str, Shard]) -> dict[str, list[int]]:
    """Return the stamps of all files, by name without the suffix."""
    return {path.stem: _stamp(path) for shard in packed.values() for path in shard.files}


def _stamp(path: Path) -> list[int]:
    """Return the attributes that change if a file is written or replaced: size, times in nanoseconds, inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_stamps(folder: Path) -> Any:
    try:
        return json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _write_stamps(folder: Path, stamps: dict[str, list[int]]) -> None:
    part = folder / f"{VERIFIED}.{socket.gethostname()}.{os.getpid()}.part"
    part.write_text(json.dumps(stamps), encoding="utf-8")
    part.replace(folder / VERIFIED)


def build(corpus: Corpus, found: Survey, tokenizer: Tokenizer, tokenizer_file: str, folder: Path) -> Shards:
    """Pack a corpus into a folder, with one batch of documents in memory at a time.

    Only one process of a machine may build a folder at a time. If another machine finishes the same folder first, its
    result is kept.

    Args:
        corpus: the documents.
        found: its survey.
        tokenizer: the tokenizer that encodes them.
        tokenizer_file: name of the tokenizer's file, stored in meta.json.
        folder: destination folder.
    """
    part = folder.with_name(f"{folder.name}.{socket.gethostname()}.part")
    for leftover in (part, folder):  # from a killed build, or damaged
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _fill(part, corpus, found, tokenizer, tokenizer_file)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # especially if the disk is full
        raise
    publish(part, folder)
    return load(folder)


def _fill(part: Path, corpus: Corpus, found: Survey, tokenizer: Tokenizer, tokenizer_file: str) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    documents = reported(corpus.documents(Counter()), "packing tokens", sum(found.n_bytes.values()))
    if corpus.is_chat:
        counts, digests, more = _write_rows(documents, corpus, tokenizer, dtype, part)
    else:
        counts, digests, more = _write_tokens(documents, tokenizer, dtype, part)
    meta: dict[str, Any] = {
        split: {
            "dtype": dtype.name,
            "n_tokens": int(counts[split].sum()),
            "n_documents": found.n_documents[split],
            "n_bytes": found.n_bytes[split],
            "digest": found.digests[split],
            "tokens_digest": digests[split],
            **more[split],
        }
        for split in SPLITS
    }
    meta["tokenizer"] = tokenizer.digest
    meta["tokenizer_file"] = tokenizer_file
    meta["skipped"] = found.skipped
    with (part / UNIGRAM).open("w+b") as file:
        np.save(file, unigram_bits(counts["train"]))
        _sync(file)
        file.seek(0)
        meta["unigram_digest"] = hashlib.file_digest(file, "sha256").hexdigest()
    meta["meta_digest"] = _json_digest(meta)
    with (part / "meta.json").open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=2)
        _sync(file)
    _write_stamps(part, {path.stem: _stamp(path) for path in sorted(part.glob("*.bin"))})


def publish(part: Path, folder: Path) -> None:
    """Rename a finished folder to its final name. If a complete one exists already, keep it and delete ours."""
    try:
        part.rename(folder)
    except OSError:
        if load(folder) is None:
            raise
        shutil.rmtree(part)
    parent = os.open(folder.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def unigram_bits(counts: np.ndarray) -> np.ndarray:
    """Return the cost of each token under a unigram model: -log2((count + 1) / (total + vocab_size)).

    Args:
        counts: (vocab_size,) number of occurrences of each id in the training tokens, including ends of documents.

    Returns:
        (vocab_size,) float64, bits.
    """
    return np.log2(counts.sum() + len(counts)) - np.log2(counts + 1)


def reported(documents: Iterable[Document], what: str, total_bytes: int) -> Iterator[Document]:
    """Yield the documents, logging progress every few seconds."""
    done, last = 0, time.monotonic()
    for split, text in documents:
        yield split, text
        done += len(text.encode())
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            log.info("%s: %.1f of %.1f MB", what, done / 1e6, total_bytes / 1e6)


def _write_tokens(
    documents: Iterable[Document], tokenizer: Tokenizer, dtype: np.dtype, folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, dict[str, int]]]:
    """Write the <split>.bin files.

    Returns:
        By split: the counts of ids, each (vocab_size,), the sha256 of the file, and n_token_bytes and n_changed.
    """
    changed: Counter[str] = Counter()
    documents = _counting_changes(documents, tokenizer, changed)
    counts = {split: np.zeros(tokenizer.vocab_size, dtype=np.int64) for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    with (folder / "train.bin").open("wb") as train, (folder / "valid.bin").open("wb") as valid:
        files = {"train": train, "valid": valid}
        for batch in _batches(documents, tokenizer):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            ids: dict[str, list[int]] = {split: [] for split in SPLITS}
            for piece, tokens in zip(batch, encoded, strict=True):
                start, end = tokenizer.start if piece.begins else [], [tokenizer.end_id] if piece.ends else []
                ids[piece.split] += [*start, *tokens, *end]
            for split in SPLITS:
                array = np.array(ids[split], dtype=dtype)
                files[split].write(array.tobytes())
                hashes[split].update(array.tobytes())
                counts[split] += np.bincount(array, minlength=tokenizer.vocab_size)
        for file in files.values():
            _sync(file)
    n_bytes = {split: int((counts[split] * tokenizer.token_bytes.numpy()).sum()) for split in SPLITS}
    changes = {split: {"n_token_bytes": n_bytes[split], "n_changed": changed[split]} for split in SPLITS}
    return counts, {split: h.hexdigest() for split, h in hashes.items()}, changes


def _write_rows(
    documents: Iterable[Document], corpus: Corpus, tokenizer: Tokenizer, dtype: np.dtype, folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, dict[str, Any]]]:
    """Write the files of instruction data.

    Returns:
        By split: the counts of ids, each (vocab_size,), the sha256 of their file, and rows.
    """
    writers = {split: RowWriter(folder, split, dtype, tokenizer.vocab_size) for split in SPLITS}
    for split, rows in encoded(documents, corpus.cfg, corpus.template, tokenizer):
        writers[split].add(rows)
    for writer in writers.values():
        for file in writer.files:
            with file:
                _sync(file)
    return (
        {split: writer.counts for split, writer in writers.items()},
        {split: writer.ids_digest for split, writer in writers.items()},
        {split: {"rows": asdict(writer.row_files)} for split, writer in writers.items()},
    )


class _Piece(NamedTuple):
    """A part of a document, and whether it is the first and the last one."""

    split: str
    text: str
    begins: bool
    ends: bool


def _counting_changes(documents: Iterable[Document], tokenizer: Tokenizer, changed: Counter[str]) -> Iterator[Document]:
    """Yield the documents, counting by split those that the tokenizer's tokens do not restore."""
    for split, text in documents:
        changed[split] += tokenizer.changes_text and tokenizer.normalize(text) != text
        yield split, text


def _batches(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[list[_Piece]]:
    """Yield batches of about a megabyte of pieces of documents."""
    batch, size = [], 0
    for split, text in documents:
        todo = list(tokenizer.pieces(text))
        for number, piece in enumerate(todo, start=1):
            batch.append(_Piece(split, piece, number == 1, number == len(todo)))
            size += len(piece)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    yield batch


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
