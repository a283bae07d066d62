"""How a tokenizer changes text, and how many bytes of it each vocabulary entry represents.

A tokenizer can encode every text in one of two ways. Byte-level (GPT-2, section 2.2): each character of an entry
represents one byte. Byte fallback (SentencePiece, Kudo and Richardson 2018; Llama 2, Gemma): an entry is text in which
U+2581 represents a space, and a character without an entry becomes one token such as `<0xE9>` for each of its bytes.
The model on top (BPE, Unigram, WordPiece) does not matter here.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
BYTE_NAMES = "<(?=0x[0-9A-F]{2}>)"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# Characters that a normalizer must keep, up to white space and the choice of a Unicode normal form.
KEPT = "".join(map(chr, range(33, 127))) + "éÅñßĳſﬁⅣ²２ｶ世家한Жعש🙂"
# A line break after a letter or digit, before each class of characters that pre-tokenizers distinguish.
LINE_BREAKS = ["a\nb", "a\n b", "7\n7", "é\n\n", "a\n!", "世\n\t", "a\r\nb", "a\n世"]


class Form:
    """How a tokenizer transforms text before encoding and after decoding.

    Attributes:
        model_type: BPE, Unigram, WordPiece or WordLevel.
        byte_level: each character of an entry represents one byte; otherwise the tokenizer has byte fallback.
        puts_space: it prepends a space to a text, so that the tokens of a text represent one byte more.
        strips_space: decoding removes this space again.
        changes_text: text may not come back as it was: because of a normalizer, or since U+2581 becomes a space.
        cuttable: a line break after a letter or digit always begins a new word, and text may be cut there.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, tree: dict[str, Any]) -> None:
        """Determine the form of a tokenizer.

        Args:
            tokenizer: the tokenizer.
            tree: its JSON.
        """
        self._tokenizer = tokenizer
        self._model, vocab = tree["model"], tokenizer.get_vocab()
        self.model_type = str(self._model["type"])
        has_fallback = self._model.get("byte_fallback") and all(name in vocab for name in BYTES)
        self._missing = len(set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys())
        self._maps_bytes = "ByteLevel" in _types(tree["pre_tokenizer"])
        self.byte_level = self._maps_bytes or not has_fallback
        self._prefix = self._model.get("continuing_subword_prefix") or ""
        first = tokenizer.encode("a", add_special_tokens=False)
        self.puts_space = sum(map(self.n_bytes, first.tokens)) == 2
        self.strips_space = not tokenizer.decode(first.ids).startswith(" ")
        self.changes_text = not self.byte_level or self.puts_space or tokenizer.normalizer is not None
        plain = all(_type(step) in UNICODE_FORMS for step in _steps(tokenizer.normalizer)) and not self.puts_space
        self.cuttable = self.byte_level and plain and all(map(self._begins_word, LINE_BREAKS))

    def check(self) -> None:
        """Check that every text can be encoded, always in the same way, and that a normalizer keeps its characters.

        Raises:
            ValueError: it is not so; the message continues a sentence that starts with the file's name.
        """
        if any(self._model.get(name) for name in ("dropout", "alpha", "nbest_size")):
            raise ValueError("does not always encode a text in the same way: it samples how words are split")
        if self.byte_level and (self._missing or not self._maps_bytes):
            rule = f"is a {self.model_type} that does not encode every text: it has no complete byte fallback, and"
            if self._maps_bytes:
                raise ValueError(f"{rule} {self._missing} of the 256 bytes have no entry")
            raise ValueError(f"{rule} it is not on bytes, so that characters without an entry would be lost")
        for char in KEPT:
            text = char
            for normalizer in _steps(self._tokenizer.normalizer):
                text = normalizer.normalize_str(text)
                if _core(text) != _core(char):
                    rule = f"changes text by its normalizer {_type(normalizer)}: {char!r} becomes {text!r}"
                    raise ValueError(f"{rule}; Unicode normal forms and changes of white space are understood")

    def normalize(self, text: str) -> str:
        """Return the text that the tokens of a text decode to."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        if not self.byte_level:
            text = text.replace(SPACE, " ")
        return text.removeprefix(" ") if self.puts_space else text

    def n_bytes(self, token: str) -> int:
        """Return the number of bytes of normalized text that a vocabulary entry represents."""
        token = token.removeprefix(self._prefix) if self._prefix else token
        if self.byte_level:
            return len(token)
        return 1 if BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())

    def n_bytes_added(self, token: str) -> int:
        """Return the number of bytes of normalized text that an added token represents, whose entry is plain text."""
        return len((token if self.byte_level else token.replace(SPACE, " ")).encode())

    def _begins_word(self, text: str) -> bool:
        if self._tokenizer.pre_tokenizer is None:
            return False
        words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        at = re.search(r"[\r\n]", text)
        return at is not None and any(start == at.start() for _, (start, _) in words)


def keep_names_out_of_text(tokenizer: tokenizers.Tokenizer) -> None:
    """Make a tokenizer encode the literal name of a special token or byte, such as `<0x41>`, as plain text.

    Unigram matches these entries like any other, and BPE with ignore_merges matches one that is a word; SentencePiece
    does not. So a text that has such a name is split after its first character. Other BPE never builds these entries,
    since no merge leads to them, and is left as it is.
    """
    tree = json.loads(tokenizer.model.__getstate__())
    fallback = bool(tree.get("byte_fallback"))
    if tree["type"] != "Unigram" and not (fallback and tree.get("ignore_merges")):
        return
    names = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    if tree.get("unk_id") is not None:
        names.add(tree["vocab"][tree["unk_id"]][0])
    patterns = [BYTE_NAMES] * fallback
    patterns += [f"{re.escape(n[0])}(?={re.escape(n[1:])})" for n in sorted(names) if len(n) > 1]
    split = pre_tokenizers.Split(tokenizers.Regex("|".join(patterns)), "isolated")
    before = tokenizer.pre_tokenizer
    if before is None:
        tokenizer.pre_tokenizer = split
    elif split.__getstate__() not in before.__getstate__():  # it is there if the file was written here
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([before, split])


def _core(text: str) -> str:
    """Return a text in a Unicode normal form without white space, control characters and U+2581."""
    text = unicodedata.normalize("NFKC", text)
    return "".join(c for c in text if c != SPACE and unicodedata.category(c)[0] not in "ZC")


def _steps(normalizer: Any) -> Iterator[Any]:
    """Yield the parts of a normalizer, with sequences flattened."""
    if isinstance(normalizer, normalizers.Sequence):
        for i in range(len(normalizer)):
            yield from _steps(normalizer[i])
    elif normalizer is not None:
        yield normalizer


def _type(component: Any) -> str:
    return str(json.loads(component.__getstate__())["type"])


def _types(node: Any) -> set[str]:
    """Return the types of all parts in the JSON of a component."""
    if isinstance(node, dict):
        return {str(node.get("type"))}.union(*(_types(inner) for inner in node.values() if isinstance(inner, list)))
    return set().union(*map(_types, node)) if isinstance(node, list) else set()
