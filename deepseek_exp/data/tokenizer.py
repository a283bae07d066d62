"""Byte-level BPE, trained offline on the training text (Sennrich et al. 2016; on bytes: GPT-2, section 2.2)."""

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
PIECE_CHARS = 1 << 16


class Tokenizer:
    """Text to token ids and back.

    All 256 bytes are in the vocabulary, so any text comes back unchanged. Id 0 is the end of a document; no text
    produces it, not even one that contains the words `<|endoftext|>`.

    Attributes:
        vocab_size: entries of the vocabulary; ids are 0 .. vocab_size - 1.
        end_id: id of the end of a document.
        json: the tokenizer in the tokenizers library's own format.
        digest: sha256 of `json`, in hexadecimal.
    """

    end_id = 0

    def __init__(self, json_text: str) -> None:
        self.json = json_text
        try:
            self._bpe = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"not the JSON of a tokenizer ({error})") from error
        if self._bpe.token_to_id(END) != self.end_id:
            raise ValueError(f"the tokenizer's id {self.end_id} is not {END}")
        self._bpe.encode_special_tokens = True  # written like a special token, yet text; the JSON does not keep this
        self.vocab_size = self._bpe.get_vocab_size()
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
        return self._bpe.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn many texts into token ids, on all cores."""
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text; bytes that are no UTF-8 become U+FFFD, the end of a document nothing."""
        return self._bpe.decode(ids)

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """How many bytes of text each id stands for; 0 for the end of a document.

        Returns:
            int64 tensor (vocab_size,).
        """
        sizes = [len(self._bpe.id_to_token(i)) for i in range(self.vocab_size)]  # one character stands for one byte
        sizes[self.end_id] = 0
        return torch.tensor(sizes)  # (vocab_size,)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        """Travel between processes as JSON."""
        return Tokenizer, (self.json,)


def pieces(text: str) -> Iterator[str]:
    """Cut a long text into pieces that encode to the same tokens as the whole, to bound memory.

    A line break after a visible character always begins a new word of the pre-tokenizer (GPT-2's pattern), and no
    token crosses words; so the text is cut there, about every 65536 characters.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = text.find("\n", start + PIECE_CHARS)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.find("\n", cut + 1)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]
