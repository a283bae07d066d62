"""Tiny tokenizers of every kind, as others make them, and texts to try them with."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["the cat sat on the mat.\n" * 20, "def f(x):\n    return x + 1\n" * 20, "大家好，世界。" * 20]
TIKTOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "the",
    " cat",
    "  ",
    "    ",
    "\n",
    "\r\n",
    "\t",
    "é",
    "e\u0301",
    "🙂",
    "👩🏽‍💻",
    "大家",
    "</s>",
    "<unk>",
    "<0x41>",
    "\x00",
]
WORDS += [
    "'s",
    "ﬁ",
    "Ⅳ",
    "２",
    "\u3000",
    "\u00a0",
    "▁",
    "한",
    "ᄒ",
    "\u0327",
    "\u200b",
    "##",
    "A",
    "1234",
    "def f(x):",
    "<|im_end|>",
]
WORDS += ["\n\n", "▁▁▁", "<table>"]


def wild(seed: int, n: int = 200) -> Iterator[str]:
    """Yield random texts: of odd words, and of any characters of Unicode but surrogates."""
    rng = random.Random(seed)
    for i in range(n):
        length = rng.randrange(1, 14)
        if i % 2:
            yield "".join(rng.choice(WORDS) for _ in range(length))
        else:
            yield "".join(
                chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(length)
            )


def special(*names: str) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(name, normalized=False, special=True) for name in names]


def on_bytes(model: Any, trainer: Any, *, pattern: str | None = None, prefix: bool = False) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(model)
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainer)
    return made


def bpe_trainer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trainers.BpeTrainer(
        vocab_size=300, special_tokens=special("</s>"), initial_alphabet=alphabet, show_progress=False
    )


def unigram_on_bytes() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.UnigramTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    return on_bytes(models.Unigram(), trainer)


def word_piece(prefix: str = "▁") -> tokenizers.Tokenizer:
    """A WordPiece on bytes. It restores every text if no text can begin a word with its prefix."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["[UNK]", "</s>", *alphabet, *(prefix + c for c in alphabet), "Ġthe", f"{prefix}at", "Ġc"]
    vocab, most = {name: i for i, name in enumerate(names)}, 10**6
    model = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=most, continuing_subword_prefix=prefix)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace(tokenizers.Regex(rf"\A{prefix}(?=.)"), ""), decoders.ByteLevel()]
    )
    made.add_special_tokens(special("</s>"))
    return made


def fallback(model: Any, before: list[Any], words: Any = None, *, strip: bool) -> tokenizers.Tokenizer:
    """A tokenizer with byte fallback, with the decoder of Llama 2."""
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(before)
    if words is not None:
        made.pre_tokenizer = words
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    made.add_special_tokens(special("<unk>", "<s>", "</s>"))
    return made


def pieces() -> list[str]:
    chars = sorted({c for text in TEXTS for c in text if c.strip()} | set("▁<>/0x4sunk"))
    return [*chars, "▁t", "▁th", "▁the", "at", "▁c", "▁cat", "▁▁", "大家", "ret", "urn"]


def bpe_with_fallback(byte_fallback: bool = True) -> Any:
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *BYTES, *pieces(), "re", "ur"])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "t"), ("▁", "c"), ("▁c", "at"), ("▁", "▁"), ("大", "家")]
    merges += [("r", "e"), ("re", "t"), ("u", "r"), ("ur", "n")]
    return models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)


def unigram_with_fallback() -> Any:
    scores = [(name, 0.0) for name in ("<unk>", "<s>", "</s>", *BYTES)]
    scores += [(piece, -2.0 - 3.0 / len(piece) - i / 1000) for i, piece in enumerate(pieces())]
    return models.Unigram(scores, unk_id=0, byte_fallback=True)


def with_added(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Add tokens that are text, as Gemma has for line breaks, runs of spaces and HTML."""
    made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("\n\n", "▁▁▁", "<table>")])
    return made


def same(text: str) -> str:
    return text


def without_space_in_front(text: str) -> str:
    return text.removeprefix(" ")


def with_spaces(text: str) -> str:
    return text.replace("▁", " ")


def in_form(form: Any) -> Callable[[str], str]:
    return lambda text: without_space_in_front(with_spaces(form.normalize_str(text)))


SPACES = normalizers.Replace(" ", "▁")
LLAMA = [normalizers.Prepend("▁"), SPACES]
NFC, NFKC = normalizers.NFC(), normalizers.NFKC()
METASPACE = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
MERGED = pre_tokenizers.Split(" ", "merged_with_previous")
# name -> how to make it, and what comes back of a text
KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], Callable[[str], str]]] = {
    "BPE on bytes": (lambda: on_bytes(models.BPE(), bpe_trainer()), same),
    "tiktoken": (lambda: on_bytes(models.BPE(ignore_merges=True), bpe_trainer(), pattern=TIKTOKEN), same),
    "space in front": (lambda: on_bytes(models.BPE(), bpe_trainer(), prefix=True), without_space_in_front),
    "Unigram on bytes": (unigram_on_bytes, same),
    "WordPiece on bytes": (word_piece, same),
    "Llama 2": (lambda: fallback(bpe_with_fallback(), LLAMA, strip=True), with_spaces),
    "Gemma": (lambda: with_added(fallback(bpe_with_fallback(), [SPACES], MERGED, strip=False)), with_spaces),
    "BPE, Metaspace, NFC": (lambda: fallback(bpe_with_fallback(), [NFC], METASPACE, strip=True), in_form(NFC)),
    "Unigram with fallback": (lambda: fallback(unigram_with_fallback(), LLAMA, strip=True), with_spaces),
    "Unigram, Metaspace, NFKC": (
        lambda: fallback(unigram_with_fallback(), [NFKC], pre_tokenizers.Metaspace(), strip=True),
        in_form(NFKC),
    ),
}


@cache
def text_of(kind: str) -> str:
    """Return the tokenizer.json of a kind."""
    return KINDS[kind][0]().to_str()


def write(kind: str, folder: Path, **config: object) -> Path:
    """Write the tokenizer.json of a kind, and a tokenizer_config.json if it is to say something."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(text_of(kind), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def with_template(kind: str, begin: str, end: str = "") -> str:
    """Return the JSON of a kind whose post-processor puts a token in front of every text, or another behind it too."""
    made = tokenizers.Tokenizer.from_str(text_of(kind))
    named = [(name, made.token_to_id(name)) for name in (begin, end) if name]
    made.post_processor = processors.TemplateProcessing(f"{begin} $A {end}".strip(), special_tokens=named)
    return made.to_str()


@cache
def sentencepiece_model(kind: str, **options: Any) -> bytes:
    """Train a SentencePiece model of at most 400 pieces, with byte fallback."""
    import sentencepiece

    out = io.BytesIO()
    given = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines()]),
        model_writer=out,
        model_type=kind,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=3,
        **given,
    )
    return out.getvalue()
