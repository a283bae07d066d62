"""Byte-level BPE (Sennrich et al. 2016; on bytes: GPT-2, section 2.2), trained offline on the text or given."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
# what ends a document in a file of others: the first of these that is a special token there
ENDS = (END, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>")
# comes back unchanged from a tokenizer that neither normalizes text nor adds to it
PROBE = "A b  c\t\r\n\n\x00 don't 1234 é e\u0301 ﬁ Ⅳ 大家。\u3000🙂 x"
PIECE_CHARS = 1 << 16


class Tokenizer:
    """Text to token ids and back.

    All 256 bytes are in the vocabulary, so any text comes back unchanged. The end of a document is a special token,
    the first of `ENDS` that there is; no text produces it, not even one that contains the words `<|endoftext|>`.

    Attributes:
        vocab_size: entries of the vocabulary, or more where ids were left out; ids are 0 .. vocab_size - 1.
        end_id: id of the end of a document.
        json: the tokenizer in the tokenizers library's own format.
        digest: sha256 of `json`, in hexadecimal.
    """

    def __init__(self, json_text: str) -> None:
        """Use the JSON of a tokenizer.

        Raises:
            ValueError: it is none, or not one of this kind; the text goes on after "the file" or a file's name.
        """
        self.json = json_text
        self._bpe = _parse(json_text)
        special = {t.content: i for i, t in self._bpe.get_added_tokens_decoder().items() if t.special}
        found = [special[name] for name in ENDS if name in special]
        if not found:
            raise ValueError(f"has no special token {' or '.join(ENDS)}")
        self.end_id = found[0]
        self._bpe.encode_special_tokens = True  # written like a special token, yet text; the JSON does not keep this
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self.vocab_size = 1 + max(self._bpe.get_vocab().values())
        self.digest = hashlib.sha256(json_text.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from texts; the same texts give the same tokenizer.

        Args:
            texts: training documents.
            vocab_size: entries at most, bytes and end of document included; a pair is merged when seen twice, so a
                small corpus gives fewer.
        """
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe.to_str())

    @classmethod
    def given(cls, path: Path) -> Tokenizer:
        """Take a tokenizer that others trained; where its file has none of `ENDS`, `END` is added as its last entry.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a byte-level BPE, or does not give text back unchanged.
        """
        bpe = _parse(path.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(bpe.model, models.BPE) or bpe.model.dropout:
            raise ValueError("is not a BPE that always encodes a text in the same way")
        missing = set(pre_tokenizers.ByteLevel.alphabet()) - bpe.get_vocab().keys()
        if missing:
            raise ValueError(f"is not a byte-level BPE: {len(missing)} of the 256 bytes have no entry")
        special = {token.content for token in bpe.get_added_tokens_decoder().values() if token.special}
        if special.isdisjoint(ENDS):
            bpe.add_special_tokens([END])
        ids = list(bpe.get_vocab().values())
        if len(set(ids)) < len(ids):  # the library numbers what is added by how many entries there are
            raise ValueError(f"leaves ids out, so that {END} cannot be added, and has no other end of a document")
        tokenizer = cls(bpe.to_str())
        if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
            raise ValueError("does not give every text back unchanged (it normalizes text, or adds to it)")
        return tokenizer

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged, or a tokenizer of another kind.
        """
        return cls(path.read_text(encoding="utf-8"))

    def save(self, path: Path) -> None:
        """Write one JSON file in the format of the tokenizers library; it is whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("w", encoding="utf-8") as file:
            file.write(self.json)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids, on all cores."""
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text; bytes that are no UTF-8 become U+FFFD, the end of a document nothing."""
        return self._bpe.decode(ids)

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """How many bytes of text each id stands for; 0 for special tokens, which text never holds.

        Returns:
            int64 tensor (vocab_size,).
        """
        # one character stands for one byte
        sizes = [len(self._bpe.id_to_token(i) or "") for i in range(self.vocab_size)]
        for i, token in self._bpe.get_added_tokens_decoder().items():  # these are written as text
            sizes[i] = 0 if token.special else len(token.content.encode())
        return torch.tensor(sizes)  # (vocab_size,)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        """Travel between processes as JSON."""
        return Tokenizer, (self.json,)


def _parse(json_text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json_text)
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"is not the JSON of a tokenizer ({error})") from error


def pieces(text: str) -> Iterator[str]:
    """Cut a long text into pieces that encode to the same tokens as the whole, to bound memory.

    A line break after a letter or a digit always begins a new word of the pre-tokenizer (in GPT-2's pattern, and in
    later ones, where a word of punctuation takes line breaks along), and no token crosses words; so the text is cut
    there, about every 65536 characters.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = text.find("\n", start + PIECE_CHARS)
        while cut > 0 and not text[cut - 1].isalnum():
            cut = text.find("\n", cut + 1)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]
