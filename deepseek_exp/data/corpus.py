"""The documents of an experiment, split into train and valid, in a fixed order.

Split: if there is a validation path, its documents are valid and all others are train. Otherwise a document is valid if
hash(document) / 2^64 < valid_fraction, so adding documents moves no others. The hash is of its text, or of its relative
path for the standard library. Fewer than `FEW` documents of text cannot be split that way: the last lines of each are
held out instead, or the last words if no document has lines. If that holds nothing out, the documents with the lowest
hashes are valid: valid_fraction of them, at least one. Of a single document, the last words are held out.

Limit: max_bytes is divided between the splits (valid gets valid_fraction of it). Each split takes documents in order
until its share is full; the last document is cut at a character boundary.

Conversations (source=chat) are documents that are never cut, neither to hold out their ends nor by the limit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
import json
import math
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from deepseek_exp.config import DataConfig, OnBadLine, Source
from deepseek_exp.config.text_files import find_files, shown, unreadable_error
from deepseek_exp.data.chat import ChatReader
from deepseek_exp.data.readers import Reader
from deepseek_exp.data.template import Template
from deepseek_exp.disk import expand
from deepseek_exp.errors import DataError, Problem

FORMAT = 2  # increase if the same text and settings produce different tokens, or if the keys of meta.json change
FEW = 100
MIN_TAIL_CHARS = 400
FOR_VALIDATION = re.compile(r"(?i)(?<![a-z])(valid|validation|val|dev|test|eval)(?![a-z])")
WORD_CHARS = 100  # characters searched for the end of a word; text without spaces is cut anywhere
SUM_BYTES = 260  # approximate size of a document of `sums`
NOT_TEXT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

Document = tuple[str, str]  # (split: "train" or "valid", text)
Way = Callable[[int, str], Iterable[Document]]  # (number, text) of a document -> its train and valid parts


def library_files(root: Path) -> list[Path]:
    """Return the Python sources below a folder, without installed packages and tests, sorted by relative path."""
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_TEXT]
        found += [Path(parent, name) for name in names if name.endswith(".py")]
    found = [path for path in found if path.is_file()]  # skips dangling links
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def sums() -> Iterator[str]:
    r"""Yield an endless, deterministic sequence of documents of sums such as "7 + 5 = 12\n40 + 2 = 42\n"."""
    rng = random.Random(0)
    while True:
        pairs = [(int(100 * rng.random()), int(100 * rng.random())) for _ in range(20)]
        yield "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)


@dataclass(frozen=True)
class Corpus:
    """The text that `cfg` names.

    Attributes:
        cfg: the data section.
        root: folder of the standard library (source=stdlib), else None.
        files: files of the text to split; empty for source=synthetic.
        valid_files: files of the validation text (data.valid_path); empty if there is none.
        name: name of the part of a mixture; "" for every other source.
        unreadable: folders and links that cannot be read (data.on_bad_line=skip); `documents` counts them as skipped.
    """

    cfg: DataConfig
    root: Path | None
    files: list[Path]
    valid_files: list[Path]
    name: str = ""
    unreadable: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def parts(cls, cfg: DataConfig) -> list[Corpus]:
        """Find the files of every part of a mixture, in order. Any other source is one part without a name.

        Raises:
            DataError: see `of`.
        """
        is_chat = cfg.source is Source.chat
        if cfg.source is not Source.mixture and not (is_chat and cfg.mixture):
            return [cls.of(cfg)]
        alone = dataclasses.replace(cfg, source=Source.chat if is_chat else Source.text, mixture={})
        return [
            cls.of(dataclasses.replace(alone, path=part.path, valid_path=part.valid_path), name)
            for name, part in cfg.mixture.items()
        ]

    @classmethod
    def of(cls, cfg: DataConfig, name: str = "") -> Corpus:
        """Find the files without reading them.

        Args:
            cfg: the data section; for a part of a mixture, with the part's path and valid_path.
            name: name of the part of a mixture.

        Raises:
            DataError: no files, a missing setting, or files used for both training and validation.
        """
        if cfg.source is Source.stdlib:
            root = Path(sysconfig.get_paths()["stdlib"])
            return cls(cfg, root, library_files(root), [])
        if cfg.source is Source.synthetic:
            if cfg.max_bytes is None:
                fix = "set data.max_bytes, such as 300000"
                raise DataError(Problem("data.max_bytes", None, "leaves data.source=synthetic without an end", fix))
            _check_sums(cfg)
            return cls(cfg, None, [], [])
        found = cls(cfg, None, [], [], name)
        path, valid_path = found.key("path"), found.key("valid_path")
        if cfg.path is None:
            fix = f"set {path} to a file, folder or glob"
            raise DataError(Problem(path, None, f"names no text for data.source={cfg.source.value}", fix))
        unreadable: list[str] | None = [] if cfg.on_bad_line is OnBadLine.skip else None
        files = find_files(path, cfg.path, unreadable)
        valid_files = find_files(valid_path, cfg.valid_path, unreadable) if cfg.valid_path is not None else []
        shared = sorted(set(files) & set(valid_files))
        if shared:
            rule = f"names {len(shared)} file(s) that {path} names too ({shared[0]})"
            raise DataError(Problem(valid_path, cfg.valid_path, rule, f"leave validation text out of {path}"))
        return dataclasses.replace(found, files=files, valid_files=valid_files, unreadable=unreadable or [])

    def key(self, leaf: str) -> str:
        """Return the configuration key of this text's path or valid_path."""
        return f"data.mixture.{self.name}.{leaf}" if self.name else f"data.{leaf}"

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """Yield each document with its split, within max_bytes.

        Args:
            skipped: number of unreadable rows by file; updated in place.

        Raises:
            DataError: a row or a file cannot be read.
        """
        shares = self._shares()
        skipped.update(dict.fromkeys(map(shown, self.unreadable), 1))
        if self.valid_files:
            train = (("train", text) for text in self._texts(self.key("path"), self.files, skipped))
            valid = (("valid", text) for text in self._texts(self.key("valid_path"), self.valid_files, skipped))
            yield from _within(train, {"train": shares["train"]}, whole=self.is_chat)
            yield from _within(valid, {"valid": shares["valid"]}, whole=self.is_chat)
        else:
            yield from _within(self._split(skipped), shares, whole=self.is_chat)

    def source(self, split: str) -> str:
        """Return where the text of a split comes from, for the tracker."""
        if self.cfg.source in (Source.text, Source.chat):
            return str(self.cfg.valid_path if split == "valid" and self.valid_files else self.cfg.path)
        return str(self.root) if self.root else "synthetic"

    def fingerprint(self) -> str:
        """Return a digest of everything that determines the tokens: settings, and each file's path, size and mtime.

        Returns:
            32 hexadecimal digits.
        """
        cfg = self.cfg
        settings = [cfg.source.value, cfg.valid_fraction, cfg.max_bytes, cfg.vocab_size, FORMAT]
        if cfg.source is Source.text:
            settings += [cfg.text_key, cfg.on_bad_line.value]
        if self.is_chat:
            settings += [cfg.prompt_key, cfg.response_key, cfg.on_bad_line.value, cfg.on_empty_mask.value]
            settings += [sorted(cfg.train_on), self.template.digest]
        keys = self.key("path"), self.key("valid_path")
        stats = [
            [self._stats(key, path) for path in files]
            for key, files in zip(keys, (self.files, self.valid_files), strict=True)
        ]
        return hashlib.sha256(json.dumps([settings, stats]).encode()).hexdigest()[:32]

    @property
    def is_chat(self) -> bool:
        """Whether documents are conversations, which are never cut."""
        return self.cfg.source is Source.chat

    @cached_property
    def template(self) -> Template:
        """The chat template, if documents are conversations."""
        return Template.of(self.cfg)

    @property
    def hint(self) -> str | None:
        """A warning if the training text includes files whose names suggest validation or test data, else None."""
        if self.valid_files or self.cfg.path is None:
            return None
        top = expand(self.cfg.path).resolve()
        named = [
            p for p in self.files if FOR_VALIDATION.search(os.path.relpath(p, top) if top in p.parents else p.name)
        ]
        if not named or len(named) == len(self.files):
            return None
        path, valid_path = self.key("path"), self.key("valid_path")
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        return (
            f"{path}={self.cfg.path} trains on {shown(named[0])}{more}, whose name says that it is for validation or "
            f"tests. To validate on it, leave it out of {path} and set {valid_path}"
        )

    def _stats(self, key: str, path: Path) -> tuple[str, int, int]:
        try:
            stat = path.stat()
        except OSError as error:
            raise unreadable_error("data.source" if self.root else key, path, error) from error
        return str(path), stat.st_size, stat.st_mtime_ns

    def _shares(self) -> dict[str, float]:
        """Return the maximum number of bytes of each split."""
        if self.cfg.max_bytes is None:
            return {"train": math.inf, "valid": math.inf}
        valid = int(self.cfg.max_bytes * self.cfg.valid_fraction)
        return {"train": self.cfg.max_bytes - valid, "valid": valid}

    def _texts(self, key: str, files: list[Path], skipped: Counter[str]) -> Iterator[str]:
        document_of = ChatReader(self.cfg, self.template).document if self.is_chat else None
        reader = Reader(key, self.cfg.text_key, self.cfg.on_bad_line, skipped, document_of)
        for path in files:
            yield from reader.documents(path)

    def _split(self, skipped: Counter[str]) -> Iterator[Document]:
        fraction = self.cfg.valid_fraction
        if self.root is not None:
            yield from _library(self.root, self.files, fraction)
            return
        if self.cfg.source is Source.synthetic:
            for text in sums():
                yield _side(text, fraction), text
            return
        for number, text in enumerate(self._texts(self.key("path"), self.files, skipped)):
            yield from self._way(number, text)

    @cached_property
    def _way(self) -> Way:
        """How documents are split: the first method that holds out anything, even of only one document."""
        fraction, texts = self.cfg.valid_fraction, partial(self._texts, self.key("path"), self.files)
        ways: list[Way] = [partial(_by_hash, fraction)]
        if not self.is_chat and sum(1 for _ in itertools.islice(texts(Counter()), FEW)) < FEW:
            ways = [partial(_cut, border, MIN_TAIL_CHARS, fraction) for border in (_line_border, _word_border)]
        for way in ways:
            if any(split == "valid" for text in texts(Counter()) for split, _ in way(0, text)):
                return way
        return _lowest_hashes(texts(Counter()), fraction, whole=self.is_chat)


def _library(root: Path, files: list[Path], valid_fraction: float) -> Iterator[Document]:
    for path in files:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise unreadable_error("data.source", path, error) from error
        if text.strip():
            yield _side(path.relative_to(root).as_posix(), valid_fraction), text


def _check_sums(cfg: DataConfig) -> None:
    """Raise an error for a split so small that almost endless documents would be generated until one falls into it."""
    valid = int(cfg.max_bytes * cfg.valid_fraction)
    small = min(valid, cfg.max_bytes - valid)
    if 0 < small < SUM_BYTES:
        split = "validate" if small == valid else "train"
        rule = f"leaves {small} bytes of data.max_bytes={cfg.max_bytes} to {split} on, less than a document of sums"
        fix = f"use a share of {SUM_BYTES} bytes or more, or raise data.max_bytes"
        raise DataError(Problem("data.valid_fraction", cfg.valid_fraction, rule, fix))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def _side(name: str, valid_fraction: float) -> str:
    """Return the split, chosen by a stable hash that is uniform over [0, 1)."""
    return "valid" if _hash(name) / 2**64 < valid_fraction else "train"


def _by_hash(valid_fraction: float, _: int, text: str) -> list[Document]:
    return [(_side(text, valid_fraction), text)]


def _cut(border: Callable[[str, int], int], min_chars: int, valid_fraction: float, _: int, text: str) -> list[Document]:
    """Cut the text at the first border in its last `valid_fraction`. If there is none, all of it is train."""
    cut = border(text, int(len(text) * (1 - valid_fraction)))
    if len(text) < min_chars or cut == 0 or not text[cut:].strip():
        return [("train", text)]
    return [("train", text[:cut]), ("valid", text[cut:])]


def _line_border(text: str, place: int) -> int:
    return text.find("\n", place) + 1


def _word_border(text: str, place: int) -> int:
    """Return the end of the first whitespace after `place`, or `place` if the text has no words."""
    place = max(1, min(place, len(text) - 1))
    found = re.compile(r"\s+").search(text, place, place + WORD_CHARS)
    return found.end() if found is not None and found.end() < len(text) else place


def _lowest_hashes(texts: Iterator[str], valid_fraction: float, *, whole: bool) -> Way:
    """Return the method that holds out complete documents, or the end of the only document unless it stays whole."""
    n = 0

    def hashes() -> Iterator[tuple[int, int]]:
        nonlocal n
        for n, text in enumerate(texts, start=1):
            yield _hash(text), n - 1

    lowest = heapq.nsmallest(FEW, hashes())
    if n < 2 and not whole:
        return partial(_cut, _word_border, 0, valid_fraction)
    held_out = {number for _, number in lowest[: min(max(0, n - 1), max(1, round(n * valid_fraction)))]}
    return lambda number, text: [("valid" if number in held_out else "train", text)]


def _within(documents: Iterator[Document], shares: dict[str, float], *, whole: bool) -> Iterator[Document]:
    """Yield documents until each split has reached its number of bytes; the last is cut, or left out if it is whole."""
    left = dict(shares)
    for split, text in documents:
        size = len(text.encode())
        if size > left[split]:
            text = "" if whole else text.encode()[: int(left[split])].decode(errors="ignore")
        left[split] -= min(size, left[split])
        if text.strip():
            yield split, text
        if not any(left.values()):
            return
