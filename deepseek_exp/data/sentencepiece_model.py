"""Convert a SentencePiece model file to the JSON of the tokenizers library. Needs the package sentencepiece."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from deepseek_exp.data.token_form import SPACE, keep_names_out_of_text

# Kinds of pieces and models in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE, WORD, CHAR = range(1, 5)
NAMES = {WORD: "word", CHAR: "char"}
# Texts that the converted tokenizer must encode as the package does, with the literal names of pieces and odd spaces.
PROBES = [
    "",
    "the cat",
    " the  cat ",
    "a\n\n\tb\r\nc",
    "don't 1234 é e\u0301 大家。🙂 x",
    "a</s>b <unk> <0x41>",
    "a▁b ▁",
]


def read_model(path: Path) -> str:
    """Return the JSON of the tokenizer in a SentencePiece model file.

    BPE merges the pair whose piece has the highest score first, so the merges are all pairs of pieces that form a
    piece, in the order of its score. Unigram keeps its scores.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no model that can be converted; the message continues a sentence that starts with its name.
    """
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        rule = "is a SentencePiece model, and the package sentencepiece, which reads it, is not installed"
        raise ValueError(f"{rule} (pip install sentencepiece)") from error
    data = path.read_bytes()
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        original = SentencePieceProcessor(model_proto=data)
    except Exception as error:  # the libraries raise nothing more specific
        raise ValueError(f"is no SentencePiece model ({str(error).splitlines()[0]})") from error
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        kind = NAMES.get(model.trainer_spec.model_type, model.trainer_spec.model_type)
        raise ValueError(f"is a SentencePiece model of the type {kind}, and unigram and bpe are read")
    if not model.trainer_spec.byte_fallback:
        rule = "is a SentencePiece model without byte fallback"
        raise ValueError(f"{rule}, so that characters without a piece would become {model.trainer_spec.unk_piece}")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError("is a SentencePiece model that puts the space behind a word, which is not built")
    if any(piece.type == UNUSED for piece in model.pieces):
        raise ValueError("is a SentencePiece model whose vocabulary is restricted to a part of its pieces")
    converted = _converted(model)
    json_text = converted.to_str()
    converted.encode_special_tokens = True  # not stored in the JSON
    symbols = [piece.piece.replace(SPACE, " ") for piece in model.pieces if piece.type == USER_DEFINED]
    for text in [*PROBES, *(f"a {symbol} b{symbol}" for symbol in symbols)]:
        if converted.encode(text, add_special_tokens=False).ids != original.encode(text):
            rule = f"is a SentencePiece model that encodes {text!r} as the tokenizers library cannot"
            raise ValueError(f"{rule}; use the model's tokenizer.json")
    return json_text


def _converted(model: Any) -> tokenizers.Tokenizer:
    spec, rules = model.trainer_spec, model.normalizer_spec
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    if spec.model_type == UNIGRAM:
        made = models.Unigram(_scores(model), unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    else:
        vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
        made = models.BPE(vocab, _merges(model), unk_token=spec.unk_piece, fuse_unk=True)
        made.byte_fallback, made.ignore_merges = spec.byte_fallback, bool(symbols)
    tokenizer = tokenizers.Tokenizer(made)
    tokenizer.normalizer = normalizers.Sequence(list(_normalizers(rules)))
    if symbols and spec.model_type == BPE:  # each becomes one word, which is encoded as this one entry
        longest_first = sorted(symbols, key=len, reverse=True)
        pattern = tokenizers.Regex("|".join(map(re.escape, longest_first)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    special = [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    keep_names_out_of_text(tokenizer)
    return tokenizer


def _scores(model: Any) -> list[tuple[str, float]]:
    """Return the pieces of a Unigram model with their scores.

    SentencePiece prefers a user-defined symbol to its parts: its score is its length times the best score, less 0.1.
    """
    best = max(piece.score for piece in model.pieces if piece.type == NORMAL)
    return [
        (piece.piece, len(piece.piece) * best - 0.1 if piece.type == USER_DEFINED else piece.score)
        for piece in model.pieces
    ]


def _merges(model: Any) -> list[tuple[str, str]]:
    """Return the merges of a BPE model in their order: by the score of the result, then by the ids of the parts."""
    ids = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == NORMAL}
    found = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                found.append((-model.pieces[i].score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizers(rules: Any) -> Iterator[Any]:
    """Yield what SentencePiece does with a text first, in its order; only spaces are removed, not other white space."""
    if rules.precompiled_charsmap:
        table = normalizers.Precompiled(rules.precompiled_charsmap)
        if table.normalize_str("\r") == table.normalize_str("\n") == " ":
            yield normalizers.Replace("\r\n", "\n\n")  # the library looks the pair up as one character
        yield table
    if rules.remove_extra_whitespaces:
        yield normalizers.Replace(tokenizers.Regex(r"\A +"), "")
        yield normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    if rules.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)
    if rules.remove_extra_whitespaces:
        yield normalizers.Replace(tokenizers.Regex(rf"{SPACE}+\z"), "")
