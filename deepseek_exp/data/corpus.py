"""The documents of an experiment, split into train and valid, in an order that never changes.

Split: with a validation path, its documents are valid and all others train. Without one, a document is valid when
hash(document) / 2^64 < valid_fraction, so that adding documents moves none; the hash is of its text, for the standard
library of its relative path. Fewer than `FEW` documents of text cannot be split that way: the last lines of each are
held out instead.

Limit: max_bytes is shared between the splits (valid gets valid_fraction of it); each takes documents in order until
its share is full, the last one cut at a character border.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deepseek_exp.config import DataConfig, Source
from deepseek_exp.data.readers import Reader, find_files
from deepseek_exp.errors import DataError, Problem

FORMAT = 2  # to be raised when the same text and settings give other tokens, or meta.json other keys
FEW = 100
MIN_TAIL_CHARS = 400
NOT_TEXT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

Document = tuple[str, str]  # (split: "train" or "valid", text)


def library_files(root: Path) -> list[Path]:
    """List the Python sources below a folder, without installed packages and tests, sorted by relative path."""
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_TEXT]
        found += [Path(parent, name) for name in names if name.endswith(".py")]
    found = [path for path in found if path.is_file()]  # a link may lead nowhere
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def sums() -> Iterator[str]:
    r"""Yield documents of sums without end, such as "7 + 5 = 12\n40 + 2 = 42\n"; the same ones each time."""
    rng = random.Random(0)
    while True:
        pairs = [(int(100 * rng.random()), int(100 * rng.random())) for _ in range(20)]
        yield "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)


@dataclass(frozen=True)
class Corpus:
    """What `cfg` names as text.

    Attributes:
        cfg: the data section.
        root: folder of the standard library (source=stdlib), else None.
        files: files of the text that is split (source=synthetic: none).
        valid_files: files of the validation text (data.valid_path), else none.
        name: of the part of a mixture; "" for every other source.
    """

    cfg: DataConfig
    root: Path | None
    files: list[Path]
    valid_files: list[Path]
    name: str = ""

    @classmethod
    def parts(cls, cfg: DataConfig) -> list[Corpus]:
        """Find the files of every part of a mixture, in its order; any other source is one part without a name.

        Raises:
            DataError: as `of` does.
        """
        if cfg.source is not Source.mixture:
            return [cls.of(cfg)]
        alone = dataclasses.replace(cfg, source=Source.text, mixture={})
        return [
            cls.of(dataclasses.replace(alone, path=part.path, valid_path=part.valid_path), name)
            for name, part in cfg.mixture.items()
        ]

    @classmethod
    def of(cls, cfg: DataConfig, name: str = "") -> Corpus:
        """Find the files; nothing is read yet.

        Args:
            cfg: the data section; that of a part names the part's text as its own.
            name: of the part of a mixture.

        Raises:
            DataError: no files, a missing setting, or files that are both for training and for validation.
        """
        if cfg.source is Source.stdlib:
            root = Path(sysconfig.get_paths()["stdlib"])
            return cls(cfg, root, library_files(root), [])
        if cfg.source is Source.synthetic:
            if cfg.max_bytes is None:
                fix = "set data.max_bytes, such as 300000"
                raise DataError(Problem("data.max_bytes", None, "leaves data.source=synthetic without an end", fix))
            return cls(cfg, None, [], [])
        found = cls(cfg, None, [], [], name)
        path, valid_path = found.key("path"), found.key("valid_path")
        if cfg.path is None:
            fix = f"set {path} to a file, folder or glob"
            raise DataError(Problem(path, None, "names no text for data.source=text", fix))
        files = find_files(path, cfg.path)
        valid_files = find_files(valid_path, cfg.valid_path) if cfg.valid_path is not None else []
        shared = sorted(set(files) & set(valid_files))
        if shared:
            rule = f"names {len(shared)} file(s) that {path} names too ({shared[0]})"
            raise DataError(Problem(valid_path, cfg.valid_path, rule, f"leave validation text out of {path}"))
        return dataclasses.replace(found, files=files, valid_files=valid_files)

    def key(self, leaf: str) -> str:
        """Give the configuration key of this text's path or valid_path."""
        return f"data.mixture.{self.name}.{leaf}" if self.name else f"data.{leaf}"

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """Yield each document with its split, within max_bytes.

        Args:
            skipped: count of rows that could not be read, by file; added to.

        Raises:
            DataError: a row or a file cannot be read.
        """
        shares = self._shares()
        if self.valid_files:
            train = (("train", text) for text in self._texts(self.key("path"), self.files, skipped))
            valid = (("valid", text) for text in self._texts(self.key("valid_path"), self.valid_files, skipped))
            yield from _within(train, {"train": shares["train"]})
            yield from _within(valid, {"valid": shares["valid"]})
        else:
            yield from _within(self._split(skipped), shares)

    def source(self, split: str) -> str:
        """Say where the text of a split comes from, for the record."""
        if self.cfg.source is Source.text:
            return str(self.cfg.valid_path if split == "valid" and self.valid_files else self.cfg.path)
        return str(self.root) if self.root else "synthetic"

    def fingerprint(self) -> str:
        """Digest all that decides about the tokens: settings, and path, size and time of change of every file.

        Returns:
            32 hexadecimal digits.
        """
        cfg = self.cfg
        settings = [cfg.source.value, cfg.valid_fraction, cfg.max_bytes, cfg.vocab_size, FORMAT]
        if cfg.source is Source.text:
            settings += [cfg.text_key, cfg.on_bad_line.value]
        stats = [
            [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
            for files in (self.files, self.valid_files)
        ]
        return hashlib.sha256(json.dumps([settings, stats]).encode()).hexdigest()[:32]

    def _shares(self) -> dict[str, float]:
        """Bytes that each split may take."""
        if self.cfg.max_bytes is None:
            return {"train": math.inf, "valid": math.inf}
        valid = int(self.cfg.max_bytes * self.cfg.valid_fraction)
        return {"train": self.cfg.max_bytes - valid, "valid": valid}

    def _texts(self, key: str, files: list[Path], skipped: Counter[str]) -> Iterator[str]:
        reader = Reader(key, self.cfg.text_key, self.cfg.on_bad_line, skipped)
        for path in files:
            yield from reader.documents(path)

    def _split(self, skipped: Counter[str]) -> Iterator[Document]:
        fraction = self.cfg.valid_fraction
        if self.root is not None:
            yield from _library(self.root, self.files, fraction)
            return
        texts = sums() if self.cfg.source is Source.synthetic else self._texts(self.key("path"), self.files, skipped)
        if self.cfg.source is Source.text and self._are_few:
            for text in texts:
                yield from _head_and_tail(text, fraction)
        else:
            for text in texts:
                yield _side(text, fraction), text

    @cached_property
    def _are_few(self) -> bool:
        """True when there are not enough documents to hold whole ones out; reads `FEW` documents at most."""
        texts = self._texts(self.key("path"), self.files, Counter())
        return sum(1 for _ in itertools.islice(texts, FEW)) < FEW


def _library(root: Path, files: list[Path], valid_fraction: float) -> Iterator[Document]:
    for path in files:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield _side(path.relative_to(root).as_posix(), valid_fraction), text


def _side(name: str, valid_fraction: float) -> str:
    """Choose the split by a stable hash, uniform over [0, 1)."""
    unit = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return "valid" if unit < valid_fraction else "train"


def _head_and_tail(text: str, valid_fraction: float) -> Iterator[Document]:
    """Cut at the first line border of the last `valid_fraction` of the text; without one, all of it is train."""
    cut = text.find("\n", int(len(text) * (1 - valid_fraction))) + 1
    if len(text) < MIN_TAIL_CHARS or cut == 0 or not text[cut:].strip():
        yield "train", text
    else:
        yield "train", text[:cut]
        yield "valid", text[cut:]


def _within(documents: Iterator[Document], shares: dict[str, float]) -> Iterator[Document]:
    """Pass documents on until each split has had its share of bytes."""
    left = dict(shares)
    for split, text in documents:
        size = len(text.encode())
        if size > left[split]:
            text = text.encode()[: int(left[split])].decode(errors="ignore")
        left[split] -= min(size, left[split])
        if text.strip():
            yield split, text
        if not any(left.values()):
            return
