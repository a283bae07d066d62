"""Tokenizers: a byte-level BPE (Sennrich et al. 2016) trained offline on the text, or an existing one of any kind."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from deepseek_exp.data.sentencepiece_model import read_model
from deepseek_exp.data.token_form import Form, keep_names_out_of_text
from deepseek_exp.data.tokenizer_config import TokenizerConfig
from deepseek_exp.disk import expand
from deepseek_exp.errors import DataError, Problem

END = "<|endoftext|>"
# End-of-document tokens of existing tokenizers. The first one that is a special token is used.
ENDS = (END, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|eos|>", "[EOS]")
# Texts that reveal a tokenizer whose changes to text differ from `Form.normalize`.
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
    "##! ##a",
    "éé\ufffd",
    "a" * 300,
]
PIECE_CHARS = 1 << 16
# Lies in every checkpoint of ours.
OURS = "manifest.json"


class Tokenizer:
    """Converts text to token ids and back.

    Every text can be encoded. A tokenizer that is trained here restores it unchanged, and so do most existing ones. The
    rest return a text as their normalizer leaves it: in a Unicode normal form, without a space in front, or with U+2581
    as a space (see token_form.py). The end of a document is a special token, the first one of `ENDS` in the vocabulary.
    No text encodes to a special token, not even the literal `<|endoftext|>`.

    Attributes:
        vocab_size: the largest id + 1, which exceeds the number of entries if ids are skipped.
        end_id: id of the end of a document.
        special_tokens: id of each special token by name, such as `<|endoftext|>`.
        start: ids that a document and a prompt begin with: the beginning-of-text token if the tokenizer adds one, else
            nothing.
        json: the tokenizer in the tokenizers library's own format.
        config: what its tokenizer_config.json says.
        digest: sha256 of `json` and of the beginning-of-text token, if one is added, in hexadecimal.
    """

    def __init__(self, json_text: str, config: TokenizerConfig | None = None) -> None:
        """Create the tokenizer from its JSON.

        Args:
            json_text: the tokenizer in the tokenizers library's own format.
            config: what its tokenizer_config.json says. None: nothing.

        Raises:
            ValueError: it is no supported tokenizer; the message continues a sentence that starts with the file name.
        """
        self.json, self.config = json_text, TokenizerConfig() if config is None else config
        self._inner = _parse(json_text)
        special = {t.content: i for i, t in self._inner.get_added_tokens_decoder().items() if t.special}
        self.special_tokens, self._special = special, frozenset(special.values())
        end = _end(special, self.config)
        if end is None:
            raise ValueError(f"has no special token {' or '.join(ENDS)}")
        self.end_id = special[end]
        begin = self.config.roles.get("bos_token") if self.config.add_bos_token else None
        if self.config.add_bos_token and begin not in special:
            raise ValueError(f"says add_bos_token, and its bos_token {begin!r} is no special token")
        self.start = [] if begin is None else [special[begin]]
        self._inner.encode_special_tokens = True  # encode their literals as plain text; the JSON does not store this
        self._inner.no_truncation()
        self._inner.no_padding()
        self._form = Form(self._inner, json.loads(json_text))
        self.vocab_size = 1 + max(self._inner.get_vocab().values())
        rule = "" if begin is None else f"\nadd_bos_token {begin}"
        self.digest = hashlib.sha256((json_text + rule).encode()).hexdigest()

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
        """Load an existing tokenizer: a tokenizer.json, or a SentencePiece model if the name ends in .model.

        Its tokenizer_config.json is read too. If it has none of `ENDS` and names no eos_token, `END` is added as the
        last entry. The tokenizer in a checkpoint of ours is loaded as it is.

        Raises:
            OSError: the file cannot be read.
            ValueError: it cannot encode every text, or changes text in an unsupported way.
        """
        if path.with_name(OURS).is_file():
            return cls.load(path)
        _check_regular(path)
        text = read_model(path) if path.suffix == ".model" else path.read_text(encoding="utf-8", errors="replace")
        inner, config = _parse(text), TokenizerConfig.next_to(path)
        Form(inner, json.loads(text)).check()
        special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
        if _end(special, config) is None:
            inner.add_special_tokens([END])
        ids = list(inner.get_vocab().values())
        if len(set(ids)) < len(ids):  # the library uses the number of entries as the id of an added token
            raise ValueError(f"leaves ids out, so that {END} cannot be added, and has no other end of a document")
        keep_names_out_of_text(inner)
        config = _with_start(inner, config)
        tokenizer = cls(inner.to_str(), config)
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
        fix = "use a tokenizer.json or SentencePiece .model that encodes every text (on bytes or with byte fallback); "
        fix += "data.tokenizer=null trains one on the text, except with init_from, where it takes the checkpoint's"
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
        """Load a tokenizer of ours: one that `save` wrote, or the one in a checkpoint.

        Raises:
            ValueError: the file is damaged or is not a supported tokenizer.
        """
        _check_regular(path)
        return cls(path.read_text(encoding="utf-8"), TokenizerConfig.next_to(path))

    def save(self, path: Path) -> None:
        """Write one JSON file in the format of the tokenizers library, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("w", encoding="utf-8") as file:
            file.write(self.json)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def files(self) -> dict[str, str]:
        """Return the files of a checkpoint that `load` reads: name -> content."""
        config = self.config.to_json()
        return {"tokenizer.json": self.json} | ({"tokenizer_config.json": config} if config else {})

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into text, if the tokenizer has one."""
        return self.config.chat_template

    @property
    def changes_text(self) -> bool:
        """Whether `normalize` may return another text; False: every text comes back as it was."""
        return self._form.changes_text

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without `start`."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of many texts, using all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(texts, add_special_tokens=False)]

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of the beginning of a document: `start`, then the text."""
        return [*self.start, *self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Invalid UTF-8 becomes U+FFFD; special tokens are omitted."""
        text = self._inner.decode(ids)
        return text.removeprefix(" ") if self._form.puts_space and not self._form.strips_space else text

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

        The tokens of a document and its end add up to the bytes of `normalize(text)`. So the end of a document is -1
        if the tokenizer prepends a space, which belongs to the first token and not to the text.

        Returns:
            int64 tensor (vocab_size,).
        """
        sizes = [self._form.n_bytes(self._inner.id_to_token(i) or "") for i in range(self.vocab_size)]
        for i, token in self._inner.get_added_tokens_decoder().items():
            sizes[i] = 0 if token.special else self._form.n_bytes_added(token.content)
        sizes[self.end_id] = -1 if self._form.puts_space else 0
        return torch.tensor(sizes)  # (vocab_size,)

    def _probe(self) -> None:
        """Check that the probe texts decode to `normalize(text)`, with the bytes stated by `token_bytes`.

        Raises:
            ValueError: one does not.
        """
        added = [token.content for token in self._inner.get_added_tokens_decoder().values()]
        for text in [*PROBES, *(text for name in added for text in (f"a{name}b", f"a {name} b"))]:
            ids, wanted = self.encode(text), self.normalize(text)
            shown = text if len(text) < 60 else f"{text[:9]}... of {len(text)} characters"
            if any(token_id in self._special for token_id in ids):
                name = self._inner.id_to_token(next(i for i in ids if i in self._special))
                raise ValueError(f"encodes a part of {shown!r} as its special token {name}")
            if self.decode(ids) != wanted:
                rule = "does not return text as it was, beyond what its normalizer says"
                raise ValueError(f"{rule}: {shown!r} becomes {self.decode(ids)[:80]!r}")
            in_front = 1 if ids and self._form.puts_space else 0
            if int(self.token_bytes[ids].sum()) != len(wanted.encode()) + in_front:
                raise ValueError(f"has tokens that stand for other bytes than their entries say: {shown!r}")

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, TokenizerConfig]]:
        """Pickle as JSON and the configuration."""
        return Tokenizer, (self.json, self.config)


def _parse(json_text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json_text)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"is not the JSON of a tokenizer ({error})") from error


def _end(special: Collection[str], config: TokenizerConfig) -> str | None:
    """Return the special token that ends a document, or None."""
    return next((name for name in [*ENDS, config.roles.get("eos_token")] if name in special), None)


def _check_regular(path: Path) -> None:
    """Raise an error if the path exists but is not a regular file; opening a pipe would block."""
    if path.exists() and not path.is_file():
        raise ValueError("is no regular file")


def _with_start(inner: tokenizers.Tokenizer, config: TokenizerConfig) -> TokenizerConfig:
    """Return the configuration with the beginning-of-text token that transformers would add, and make it do so.

    tokenizer_config.json decides if it has add_bos_token, and otherwise the post-processor of tokenizer.json.
    """
    by_id = {i: token.content for i, token in inner.get_added_tokens_decoder().items() if token.special}
    bare = _parse(inner.to_str()) if inner.padding or inner.truncation else inner
    bare.no_padding()
    bare.no_truncation()
    added = bare.encode("a").ids[: -len(bare.encode("a", add_special_tokens=False).ids)]
    first = by_id.get(added[0]) if added else None
    begins = first is not None if config.add_bos_token is None else config.add_bos_token
    begin = config.roles.get("bos_token", first)
    if begins and begin is not None and begin != first:
        single, pair = f"{begin} $A", f"{begin} $A {begin}:1 $B:1"
        token_id = inner.token_to_id(begin)
        if token_id is not None:
            inner.post_processor = processors.TemplateProcessing(single, pair, [(begin, token_id)])
    elif not begins and first is not None:
        inner.post_processor = None
    roles = {**config.roles, **({"bos_token": begin} if begin is not None else {})}
    return replace(config, add_bos_token=begins, roles=roles)


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
