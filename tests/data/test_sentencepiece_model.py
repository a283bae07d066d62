"""SentencePiece's own model files, compared with the package that defines them."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from deepseek_exp.data.tokenizer import Tokenizer
from deepseek_exp.errors import DataError
from tests.data.tokenizer_kinds import sentencepiece_model, wild

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

SYMBOLS = ["<x>", "<xy>"]
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no space in front": {"add_dummy_prefix": False, "user_defined_symbols": SYMBOLS},
    "symbols": {"user_defined_symbols": SYMBOLS},
    "extra spaces removed": {"remove_extra_whitespaces": True, "user_defined_symbols": SYMBOLS},
    "normalized": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
}


def written(folder: Path, kind: str, **options: Any) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(
        sentencepiece_model(kind, **{k: ",".join(v) if isinstance(v, list) else v for k, v in options.items()})
    )
    return path


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_same_tokens_as_the_package(kind: str, option: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind, **OPTIONS[option])
    found, theirs = Tokenizer.given(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert found.end_id == theirs.eos_id() and found.vocab_size == theirs.vocab_size()
    texts = [text + rest for text, rest in zip(wild(2, 150), ["", "<x>", "<xy> a", " ", "  b"] * 30, strict=True)]
    if option == "normalized":  # the library normalizes a character with its combining marks as one
        texts = [text for text in texts if not any(unicodedata.category(c)[0] == "M" or c in "ᄒ\u200d" for c in text)]
    assert len(texts) > 10
    for text in texts:
        ids = found.encode(text)
        assert ids == theirs.encode(text)
        assert found.decode(ids) == found.normalize(text)
        assert found.token_bytes[[*ids, found.end_id]].sum() == len(found.normalize(text).encode()) - (not ids)


def test_a_model_without_byte_fallback_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "unigram", byte_fallback=False)
    with pytest.raises(
        ValueError, match=r"is a SentencePiece model without byte fallback, so that .* would become <unk>"
    ):
        Tokenizer.given(path)


REFUSED = {
    "of the type char, and unigram and bpe are read": ("char", {}),
    "of the type word, and unigram and bpe are read": ("word", {}),
    "puts the space behind a word": ("bpe", {"treat_whitespace_as_suffix": True}),
    r"that encodes 'a\\n\\n\\tb\\r\\nc' as the tokenizers library cannot": (
        "bpe",
        {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["\n\n"]},
    ),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_models_that_cannot_be_converted(rule: str, tmp_path: Path) -> None:
    kind, options = REFUSED[rule]
    with pytest.raises(ValueError, match=rule):
        Tokenizer.given(written(tmp_path, kind, **options))


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.model"
    path.write_bytes(b"\xff" * 99)
    with pytest.raises(DataError, match=r"data.tokenizer='.*a.model' is no SentencePiece model \(.*Fix: use a "):
        Tokenizer.named(str(path), 500)
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        Tokenizer.named(str(tmp_path / "none.model"), 500)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        DataError, match=r"and the package sentencepiece, .* is not installed \(pip install sentencepiece"
    ):
        Tokenizer.named(str(path), 500)
