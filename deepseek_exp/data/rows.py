"""Data of separate rows, each a sequence with a prompt: preference pairs, and prompts with verifiable answers.

Rows are padded on the right to data.seq_len instead of packed, and tokenized at every start, since there are thousands
of them and not billions of tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek_exp.config import DataConfig, Source
from deepseek_exp.config.text_files import find_files
from deepseek_exp.data.prepare import PreparedData
from deepseek_exp.data.readers import BadRow, Reader, encodable, kind, listed
from deepseek_exp.data.template import ChatEncoder, Message, Template, TemplateError
from deepseek_exp.data.tokenizer import Tokenizer
from deepseek_exp.errors import DataError, Problem

KEYS = {Source.preference: ("prompt", "chosen", "rejected"), Source.prompts: ("prompt", "answer")}

Encoded = tuple[list[int], list[int]]  # ids of a prompt, and of its completion

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The rows of a split.

    Attributes:
        tokens: (sequences, seq_len + 1) int32, padded with the end token. For preferences the chosen completion of pair
            i is row 2 i, the rejected one row 2 i + 1.
        prompt_len: (sequences,) int64, tokens of each prompt, at least 1.
        length: (sequences,) int64, tokens of each row: the prompt, and the completion with the end token, if any.
        objects: the rows as read, one per pair or prompt.
        digest: sha256 of the rows as read.
        reference: (sequences,) float64, log-probability of each completion under the reference of preference training.
    """

    tokens: np.ndarray
    prompt_len: np.ndarray
    length: np.ndarray
    objects: list[dict[str, Any]]
    digest: str
    reference: np.ndarray | None = None

    @property
    def n_tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.length.sum())

    def loss_mask(self, at: np.ndarray) -> np.ndarray:
        """Return which targets of some sequences belong to completions, (len(at), seq_len) bool."""
        place = np.arange(1, self.tokens.shape[1])  # of each target among the tokens
        return (place >= self.prompt_len[at, None]) & (place < self.length[at, None])


@dataclass(frozen=True)
class PreparedRows(PreparedData):
    """Rows that are ready for training; `parts` is empty.

    Attributes:
        train: rows for training.
        valid: rows for validation.
        unit: adjacent sequences that belong together: 2 for preferences.
        stop_id: the token that ends a completion.
    """

    train: Rows = field(kw_only=True)
    valid: Rows = field(kw_only=True)
    unit: int = field(kw_only=True)
    stop_id: int = field(kw_only=True)

    @property
    def n_train_tokens(self) -> int:
        """Number of training tokens."""
        return self.train.n_tokens

    @property
    def n_valid_tokens(self) -> int:
        """Number of validation tokens."""
        return self.valid.n_tokens

    @property
    def token_bytes(self) -> Tensor:
        """Bytes of text that each token stands for, (vocab_size,) int64."""
        return self.tokenizer.token_bytes

    def first_words(self) -> str:
        """Return the first validation prompt, as much as there is of it."""
        return self.tokenizer.decode(self.valid.tokens[0, : self.valid.prompt_len[0]].tolist())

    def digests(self) -> dict[str, str]:
        """Return the sha256 digests of tokenizer, template and rows by name."""
        assert self.template is not None
        found = {"tokenizer": self.tokenizer.digest, "template": self.template.digest}
        return found | {"train": self.train.digest, "valid": self.valid.digest}

    def with_reference(self, train: np.ndarray, valid: np.ndarray) -> PreparedRows:
        """Return the same with the reference's log-probabilities of the completions."""
        splits = {"train": dataclasses.replace(self.train, reference=train)}
        return dataclasses.replace(self, **splits, valid=dataclasses.replace(self.valid, reference=valid))


def prepare_rows(cfg: DataConfig) -> PreparedRows:
    """Read and tokenize the rows of data.source=preference or prompts.

    Without data.valid_path, every n-th row is held out, n = 1 / valid_fraction, at least one.

    Raises:
        DataError: a file or row cannot be read or used, or nothing is left of a split.
    """
    assert cfg.path is not None and cfg.tokenizer is not None, "the rules of the configuration require both"
    tokenizer, skipped = Tokenizer.named(cfg.tokenizer, cfg.vocab_size), Counter[str]()
    objects = {"train": _read(cfg, "path", skipped)}
    if cfg.valid_path is not None:
        objects["valid"] = _read(cfg, "valid_path", skipped)
    else:
        every = objects["train"]
        n_valid = max(1, int(len(every) * cfg.valid_fraction))
        held_out = {(k + 1) * len(every) // n_valid - 1 for k in range(n_valid)}
        objects = {"train": [o for i, o in enumerate(every) if i not in held_out]}
        objects["valid"] = [o for i, o in enumerate(every) if i in held_out]
    if skipped:
        by_file = ", ".join(f"{path}: {count}" for path, count in skipped.items())
        log.warning("skipped %d rows that could not be read (%s)", sum(skipped.values()), by_file)
    encoder = RowEncoder(cfg, tokenizer)
    splits = {split: _encoded(cfg, split, found, encoder, tokenizer.end_id) for split, found in objects.items()}
    counts = np.bincount(splits["train"].tokens.ravel(), minlength=tokenizer.vocab_size) + 1
    unigram_bits = torch.from_numpy(-np.log2(counts / counts.sum()))  # (vocab_size,)
    inputs = [_input(cfg, split, rows) for split, rows in splits.items()]
    unit = 2 if cfg.source is Source.preference else 1
    common = tokenizer, (), unigram_bits, dict(skipped), inputs, encoder.template
    return PreparedRows(*common, unit=unit, stop_id=encoder.stop_id, **splits)


def _read(cfg: DataConfig, name: str, skipped: Counter[str]) -> list[dict[str, Any]]:
    key, path = f"data.{name}", str(getattr(cfg, name))
    parse = parse_pair if cfg.source is Source.preference else parse_prompt
    reader = Reader(key, cfg.text_key, cfg.on_bad_line, skipped, lambda row: json.dumps(parse(row)))
    return [json.loads(row) for file in find_files(key, path) for row in reader.documents(file)]


def parse_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Return a preference row.

    Raises:
        BadRow: the row is malformed.
    """
    _, chosen, rejected = (_text(row, key) for key in KEYS[Source.preference])
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow(f"holds no text under '{key}'")
    if chosen == rejected:
        raise BadRow("has equal texts under 'chosen' and 'rejected'")
    return row


def parse_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with a prompt and an answer, a text or a number; other keys are passed on to the rewards.

    Raises:
        BadRow: the row is malformed.
    """
    _text(row, "prompt")
    if not isinstance(row.get("answer"), int | float) or isinstance(row.get("answer"), bool):
        _text(row, "answer")
    return row


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise BadRow(f"has no key '{key}'; its keys are {listed(row)}")
    if not isinstance(row[key], str):
        raise BadRow(f"holds {kind(row[key])} under '{key}', not a string")
    return encodable(row[key])


class RowEncoder:
    """Encodes rows by the chat template, as instruction data is: the prompt is the user's, a completion the reply.

    Attributes:
        template: the chat template.
        stop_id: the token that ends a completion.
    """

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer) -> None:
        """Load the template.

        Raises:
            DataError: it cannot be used.
        """
        self.template = Template.of(cfg)
        self._encoder = ChatEncoder(self.template, tokenizer)
        self._seq_len, self._end_id = cfg.seq_len, tokenizer.end_id
        self.stop_id = self._encoder.end_id

    def pair(self, prompt: str, completions: Sequence[str]) -> list[Encoded] | None:
        """Return the ids of a prompt with each of its completions, in at most seq_len + 1 tokens.

        Of a prompt that is too long, the beginning is cut off, equally for all completions.

        Returns:
            (prompt ids, completion ids) per completion; None if a completion leaves no room for a token of the prompt.
        """
        found = []
        for ids, is_reply in self._encoder.encode([_conversation(prompt, text) for text in completions], ["assistant"]):
            first = is_reply.index(True)
            last = max(i for i, of_reply in enumerate(is_reply) if of_reply)
            found.append((ids[:first] or [self._end_id], ids[first : last + 1]))
        room = self._seq_len + 1 - max(len(completion) for _, completion in found)
        return [(start[-room:], completion) for start, completion in found] if room > 0 else None

    def prompt(self, prompt: str) -> Encoded:
        """Return the ids of a prompt, without its beginning if it is too long, and no completion."""
        ids = self._encoder.prompt(_conversation(prompt)) or [self._end_id]
        return ids[-self._seq_len :], []


def _conversation(*contents: str) -> list[Message]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=False)]


def _encoded(cfg: DataConfig, split: str, objects: list[dict[str, Any]], encoder: RowEncoder, end_id: int) -> Rows:
    name = "valid_path" if split == "valid" and cfg.valid_path else "path"
    key, path = f"data.{name}", getattr(cfg, name)
    kept, rows, digest = [], [], hashlib.sha256()
    for found in objects:
        digest.update(json.dumps(found, sort_keys=True).encode() + b"\n")
        try:
            if cfg.source is Source.preference:
                encoded = encoder.pair(found["prompt"], [found["chosen"], found["rejected"]])
            else:
                encoded = [encoder.prompt(found["prompt"])]
        except TemplateError as error:
            rule = f"has a row that cannot be used: {error}"
            raise DataError(Problem(key, path, rule, "correct the row, or set data.template to another")) from error
        if encoded is not None:
            kept.append(found)
            rows += encoded
    if not rows:
        if objects:
            rule = f"has no row for {split} whose completions fit into data.seq_len={cfg.seq_len}"
            raise DataError(Problem(key, path, rule, "raise data.seq_len"))
        fix = "add rows, or name others by data.valid_path"
        raise DataError(
            Problem(key, path, f"has no row for {split} with data.valid_fraction={cfg.valid_fraction}", fix)
        )
    if len(kept) < len(objects):
        left_out = len(objects) - len(kept)
        log.warning("left out %d of %d %s rows, which do not fit into data.seq_len", left_out, len(objects), split)
    tokens = np.full((len(rows), cfg.seq_len + 1), end_id, dtype=np.int32)
    for line, (prompt, completion) in zip(tokens, rows, strict=True):
        line[: len(prompt) + len(completion)] = prompt + completion
    prompt_len = np.array([len(prompt) for prompt, _ in rows])
    length = prompt_len + np.array([len(completion) for _, completion in rows])
    return Rows(tokens, prompt_len, length, kept, digest.hexdigest())


def _input(cfg: DataConfig, split: str, rows: Rows) -> dict[str, Any]:
    path = cfg.valid_path if split == "valid" and cfg.valid_path is not None else cfg.path
    return {
        "name": Path(str(path)).name,
        "context": split,
        "digest": rows.digest,
        "source": str(path),
        "n_documents": len(rows.objects),
        "n_bytes": sum(len(str(value).encode()) for found in rows.objects for value in found.values()),
        "n_tokens": rows.n_tokens,
    }


def length_baseline(data: PreparedRows) -> tuple[str, float]:
    """Return the accuracy of preferring the "shorter" or "longer" completion: that word, and the share of valid pairs.

    The direction is the better one on the training pairs; pairs of equal length count half.
    """

    def share_longer(rows: Rows) -> float:
        n = (rows.length - rows.prompt_len).reshape(-1, 2)
        return float(((1 + np.sign(n[:, 0] - n[:, 1])) / 2).mean())

    longer = share_longer(data.train) >= 0.5
    found = share_longer(data.valid)
    return ("longer", found) if longer else ("shorter", 1 - found)
