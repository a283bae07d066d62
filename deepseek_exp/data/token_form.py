"""The two supported forms of BPE tokenizers: byte-level, and SentencePiece with byte fallback.

Byte-level (GPT-2, section 2.2): each character of a token represents one byte. SentencePiece (Kudo and Richardson 2018;
Llama 2, Mistral): a token is text in which U+2581 represents a space, a space is prepended to the text, and a character
without a token becomes one token such as `<0xE9>` for each of its bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# Normalizers and pre-tokenizers that only affect where SentencePiece puts its spaces.
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
DECODERS = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
DECODERS += [{"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
# A line break after a letter or digit, before each class of characters that pre-tokenizers distinguish.
LINE_BREAKS = ["a\nb", "a\n b", "7\n7", "é\n\n", "a\n!", "世\n\t", "a\r\nb", "a\n世"]


class Form:
    """How a tokenizer transforms text before encoding and after decoding.

    Attributes:
        sentencepiece: whether it has the SentencePiece form.
        puts_space: SentencePiece prepends a space if the text does not begin with one; adds one byte per document.
        cuttable: a line break after a letter or digit always begins a new word.
    """

    def __init__(self, bpe: tokenizers.Tokenizer) -> None:
        """Determine the form of a tokenizer."""
        self._bpe = bpe
        self._normalizers = list(_parts(bpe.normalizer, "normalizers"))
        self._words = list(_parts(bpe.pre_tokenizer, "pretokenizers"))
        self._decoders = list(_parts(bpe.decoder, "decoders"))
        self.sentencepiece = bool(getattr(bpe.model, "byte_fallback", False))
        self.puts_space = any(w["type"] == "Metaspace" and w["prepend_scheme"] != "never" for w in self._words)
        self.cuttable = not self.sentencepiece and all(map(self._begins_word, LINE_BREAKS))

    def check(self) -> None:
        """Check that the form is one of the two supported ones.

        Raises:
            ValueError: it is not; the message continues a sentence that starts with the file's name.
        """
        vocab = self._bpe.get_vocab()
        if not self.sentencepiece:
            missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()
            if missing:
                rule = f"is not a byte-level BPE: {len(missing)} of the 256 bytes have no entry"
                raise ValueError(f"{rule}, and it has no byte fallback")
            known: list[Any] = [{"type": name} for name in UNICODE_FORMS]
        else:
            missing = {f"<0x{byte:02X}>" for byte in range(256)} - vocab.keys()
            if missing:
                raise ValueError(f"has byte fallback and no entry for {len(missing)} of the 256 bytes")
            known = [{"type": name} for name in UNICODE_FORMS] + [PREPEND, REPLACE]
            if self._decoders not in (DECODERS, [*DECODERS, STRIP]):
                raise ValueError("has byte fallback and a decoder that is not the one of Llama 2 and Mistral")
            if any(w["type"] != "Metaspace" or w["replacement"] != SPACE for w in self._words):
                raise ValueError("has byte fallback and a pre-tokenizer other than Metaspace")
        for normalizer in self._normalizers:
            if normalizer not in known:
                rule = f"changes text by its normalizer {normalizer['type']}"
                raise ValueError(f"{rule}; the Unicode normal forms {', '.join(UNICODE_FORMS)} are understood")

    def normalize(self, text: str) -> str:
        """Return the text that the tokens of a text decode to."""
        if self._bpe.normalizer is not None:
            text = self._bpe.normalizer.normalize_str(text)
        if not self.sentencepiece:
            return text
        text = text.replace(SPACE, " ")
        if text and self.puts_space and not text.startswith(" "):
            text = " " + text
        return text.removeprefix(" ") if STRIP in self._decoders else text

    def n_bytes(self, token: str) -> int:
        """Return the number of bytes of normalized text that a vocabulary entry represents."""
        if not self.sentencepiece:
            return len(token)  # one character per byte
        return 1 if BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())

    def _begins_word(self, text: str) -> bool:
        if self._bpe.pre_tokenizer is None:
            return False
        words = self._bpe.pre_tokenizer.pre_tokenize_str(text)
        at = re.search(r"[\r\n]", text)
        return at is not None and any(start == at.start() for _, (start, _) in words)


def _parts(component: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON of the parts of a normalizer, pre-tokenizer or decoder, with sequences flattened."""

    def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if node["type"] == "Sequence":
            for inner in node[name]:
                yield from walk(inner)
        else:
            yield node

    if component is not None:
        yield from walk(json.loads(component.__getstate__()))
