"""Packed tokens of existing tokenizers: beginnings and ends of documents, and bytes of the original text."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_exp.config import DataConfig
from deepseek_exp.data import prepare
from deepseek_exp.data.corpus import Corpus
from tests.data.tokenizer_kinds import KINDS, wild, with_template, write

DOCUMENTS = [
    "the cat sat on the mat. " * 20,
    "caf\u0065\u0301 au lait, " * 30,
    " def f(x):\n    return x" * 20,
    *wild(5, 40),
]


@pytest.fixture
def cfg(text_cfg: Callable[..., DataConfig], tmp_path: Path) -> DataConfig:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return text_cfg(texts, valid_fraction=0.3, vocab_size=600)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_the_original_text(
    kind: str, cfg: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(kind, tmp_path / "theirs")
    with caplog.at_level(logging.WARNING):
        data = prepare(dataclasses.replace(cfg, tokenizer=str(path)))
    (part,) = data.parts
    table = data.token_bytes
    total = table[part.valid.open().astype("int64")].sum()
    assert float(total) == pytest.approx(part.valid.n_bytes, rel=1e-12)
    changed = {split: shard.n_changed for split, shard in (("train", part.train), ("valid", part.valid))}
    if data.tokenizer.changes_text:
        documents = list(Corpus.parts(cfg)[0].documents(Counter()))
        assert changed == {s: sum(KINDS[kind][1](text) != text for of, text in documents if of == s) for s in changed}
    else:
        assert not any(changed.values()) and not table.is_floating_point()
    for split, n in changed.items():
        said = [r.getMessage() for r in caplog.records if f"{split} documents" in r.getMessage()]
        assert len(said) == (n > 0) and all(f"the tokenizer changes {n} of " in text for text in said)


def test_a_document_begins_and_ends(cfg: DataConfig, tmp_path: Path) -> None:
    path = write("Llama 2", tmp_path / "theirs", chat_template="{{ x }}")
    plain = prepare(dataclasses.replace(cfg, tokenizer=str(path)))
    path.write_text(with_template("Llama 2", "<s>"), encoding="utf-8")
    cfg = dataclasses.replace(cfg, tokenizer=str(path))
    for _ in range(2):  # built, then found
        data = prepare(cfg)
        assert data.tokenizer.chat_template == "{{ x }}"
        (part,), (before,) = data.parts, plain.parts
        ids = part.train.open().tolist()
        assert ids[0] == 1 and ids.count(1) == part.train.n_documents == ids.count(2)
        assert all(second == 1 for first, second in itertools.pairwise(ids) if first == 2)
        assert [i for i in ids if i != 1] == before.train.open().tolist()
        assert data.digests()["train tokens"] != plain.digests()["train tokens"]


def test_tokens_of_an_earlier_version_are_counted_as_they_were(cfg: DataConfig, tmp_path: Path) -> None:
    data = prepare(dataclasses.replace(cfg, tokenizer=str(write("BPE, Metaspace, NFC", tmp_path / "theirs"))))
    (part,) = data.parts
    old = dataclasses.replace(part, valid=dataclasses.replace(part.valid, n_token_bytes=None))
    assert dataclasses.replace(data, parts=(old,)).token_bytes.equal(data.tokenizer.token_bytes)
