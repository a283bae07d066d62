"""BPE tokenizers (Sennrich et al. 2016): a byte-level one trained offline on the text, or an existing one."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepseek_exp.data.token_form import Form
from deepseek_exp.disk import expand
from deepseek_exp.errors import DataError, Problem

END = "<|endoftext|>"
# End-of-document tokens of existing tokenizers. The first one that is a special token is used.
ENDS = (END, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>")
# Probe texts that reveal a tokenizer whose changes to text differ from `Form.normalize`.
PROBES = [
    "A b  c\t\r\n\n\x00 don't 1234 é e\u0301 ﬁ Ⅳ 大家。\u3000🙂 x",
    "",
    "a",
    " a",
    "  a",
    "x ",
    "\n",
    "▁a ▁",
    "<0x41>",
    "éé\ufffd",
]
PIECE_CHARS = 1 << 16


class Tokenizer:
    """Converts text to token ids and back.

    All 256 bytes are in the vocabulary, so any text can be encoded. A tokenizer that is trained here restores it
    unchanged. An existing one may normalize text to a Unicode normal form; one with the SentencePiece form also treats
    U+2581 as a space and prepends a space to a document (see token_form.py). The end of a document is a special token,
    the first one of `ENDS` in the vocabulary. No text encodes to it, not even the literal `<|endoftext|>`.

    Attributes:
        vocab_size: the largest id + 1, which exceeds the number of entries if ids are skipped.
        end_id: id of the end of a document.
        json: the tokenizer in the tokenizers library's own format.
        digest: sha256 of `json`, in hexadecimal.
    """

    def __init__(self, json_text: str) -> None:
        """Create the tokenizer from its JSON.

        Raises:
            ValueError: it is no supported tokenizer; the message continues a sentence that starts with the file name.
        """
        self.json = json_text
        self._bpe = _parse(json_text)
        self._form = Form(self._bpe)
        special = {t.content: i for i, t in self._bpe.get_added_tokens_decoder().items() if t.special}
        self._special = frozenset(special.values())
        found = [special[name] for name in ENDS if name in special]
        if not found:
            raise ValueError(f"has no special token {' or '.join(ENDS)}")
        self.end_id = found[0]
        self._bpe.encode_special_tokens = True  # encode their literals as plain text; the JSON does not store this
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self.vocab_size = 1 + max(self._bpe.get_vocab().values())
        self.digest = hashlib.sha256(json_text.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a tokenizer on the texts. Deterministic.

        Args:
            texts: training documents.
            vocab_size: maximum number of entries, including bytes and end of document. A pair must occur twice to be
                merged, so a small corpus yields fewer entries.
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
        _in_background(lambda: bpe.train_from_iterator(texts, trainer))
        return cls(bpe.to_str())

    @classmethod
    def given(cls, path: Path) -> Tokenizer:
        """Load an existing tokenizer. If its file has none of `ENDS`, `END` is added as the last entry.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a byte-level BPE or one with byte fallback, or it changes text in an unsupported way.
        """
        bpe = _parse(_read(path, errors="replace"))
        if not isinstance(bpe.model, models.BPE) or bpe.model.dropout:
            raise ValueError("is not a BPE that always encodes a text in the same way")
        Form(bpe).check()
        special = {token.content for token in bpe.get_added_tokens_decoder().values() if token.special}
        if special.isdisjoint(ENDS):
            bpe.add_special_tokens([END])
        ids = list(bpe.get_vocab().values())
        if len(set(ids)) < len(ids):  # the library uses the number of entries as the id of an added token
            raise ValueError(f"leaves ids out, so that {END} cannot be added, and has no other end of a document")
        tokenizer = cls(bpe.to_str())
        tokenizer._probe()
        return tokenizer

    @classmethod
    def named(cls, name: str, n_entries: int) -> Tokenizer:
        """Load the tokenizer that `data.tokenizer` names.

        Args:
            name: path of its file.
            n_entries: maximum number of entries.

        Raises:
            DataError: the file does not exist, is not a supported tokenizer, or has more entries.
        """
        fix = (
            "use the tokenizer.json of a BPE on bytes or with byte fallback; data.tokenizer=null trains one on the text"
        )
        fix += ", except with init_from, where it takes the checkpoint's"
        try:
            tokenizer = cls.given(expand(name))
        except OSError as error:
            rule = f"cannot be read ({error.strerror or error})"
            raise DataError(Problem("data.tokenizer", name, rule, fix)) from error
        except ValueError as error:
            raise DataError(Problem("data.tokenizer", name, str(error), fix)) from error
        if tokenizer.vocab_size > n_entries:
            rule = f"has {tokenizer.vocab_size} entries and data.vocab_size is {n_entries}"
            fix = f"set model.vocab_size={tokenizer.vocab_size} or more (data.vocab_size follows it unless it is set), "
            fix += "or with init_from use the tokenizer that the checkpoint was trained with"
            raise DataError(Problem("data.tokenizer", name, rule, fix))
        return tokenizer

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load a tokenizer that `save` wrote.

        Raises:
            ValueError: the file is damaged or is not a supported tokenizer.
        """
        return cls(_read(path))

    def save(self, path: Path) -> None:
        """Write one JSON file in the format of the tokenizers library, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("w", encoding="utf-8") as file:
            file.write(self.json)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of many texts, using all cores."""
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Invalid UTF-8 becomes U+FFFD; the end of a document is omitted."""
        return self._bpe.decode(ids)

    def continuation(self, before: Sequence[int], new: Sequence[int]) -> str:
        """Return the text of ids that follow others.

        The text of a token can depend on those before it: SentencePiece omits the first space of a text.
        """
        head = self.decode(before)
        return self.decode([*before, *new])[len(head) :]

    def normalize(self, text: str) -> str:
        """Return the text that the tokens of a text decode to."""
        return self._form.normalize(text)

    def pieces(self, text: str) -> Iterator[str]:
        """Yield pieces of a long text that encode to the same tokens as the entire text, to bound memory.

        The text is not cut if words of the tokenizer may cross the line breaks at which `pieces` cuts.
        """
        return pieces(text) if self._form.cuttable else iter([text])

    @cached_property
    def token_bytes(self) -> torch.Tensor:
        """Number of bytes of normalized text that each id represents; 0 for special tokens, which text never contains.

        The tokens of a text add up to the bytes of `normalize(text)`; with the SentencePiece form to one more, for the
        prepended space. So bits per byte are bits per byte of normalized text.

        Returns:
            int64 tensor (vocab_size,).
        """
        sizes = [self._form.n_bytes(self._bpe.id_to_token(i) or "") for i in range(self.vocab_size)]
        for i, token in self._bpe.get_added_tokens_decoder().items():  # their entries are plain text
            sizes[i] = 0 if token.special else len(token.content.encode())
        return torch.tensor(sizes)  # (vocab_size,)

    def _probe(self) -> None:
        """Check that the probe texts decode to `normalize(text)`, with the bytes stated by `token_bytes`.

        Raises:
            ValueError: one does not.
        """
        added = self._bpe.get_added_tokens_decoder().values()
        for text in [*PROBES, *(f"a{token.content}b" for token in added)]:
            ids, wanted = self.encode(text), self.normalize(text)
            if self.decode(ids) != wanted or any(token_id in self._special for token_id in ids):
                raise ValueError(f"does not return text as it was, beyond what its normalizer says: {text!r}")
            in_front = 1 if ids and self._form.sentencepiece else 0
            if int(self.token_bytes[ids].sum()) != len(wanted.encode()) + in_front:
                raise ValueError(f"has tokens that stand for other bytes than their entries say: {text!r}")

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        """Pickle as JSON."""
        return Tokenizer, (self.json,)


def _parse(json_text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json_text)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"is not the JSON of a tokenizer ({error})") from error


def _read(path: Path, errors: str = "strict") -> str:
    if path.exists() and not path.is_file():
        raise ValueError("is no regular file")
    return path.read_text(encoding="utf-8", errors=errors)


def _in_background(work: Callable[[], None]) -> None:
    """Run native code that does not return to Python for long in a thread, so that signals are handled at once."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # daemon: does not keep the process alive
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]


def pieces(text: str) -> Iterator[str]:
    """Yield pieces of a long text, cut at line breaks that begin a new word; see `Tokenizer.pieces`.

    A line break after a letter or digit always begins a new word of the pre-tokenizer (in GPT-2's pattern, and also in
    later ones, in which a word of punctuation includes line breaks), and no token crosses words. So the text is cut
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
