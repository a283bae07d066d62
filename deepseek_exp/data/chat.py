"""Instruction data: rows of prompt and response, or of messages with roles, as token ids with a loss mask.

A row of a .jsonl file is {"prompt": ..., "response": ...} (names by data.prompt_key and data.response_key) or
{"messages": [{"role": ..., "content": ...}, ...]}. Both become one conversation, whose canonical JSON is the document
that a corpus splits and counts. Its tokens are packed into three files per split: <split>.bin (ids, one row after the
other), <split>.mask.bin (a byte per id: 1 if it is a target that counts) and <split>.ends.bin (where each row ends).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from deepseek_exp.config import DataConfig, OnEmptyMask
from deepseek_exp.config.rules.chat import ROLES
from deepseek_exp.data.readers import BadRow, encodable, kind, listed
from deepseek_exp.data.template import BEGIN, BREAK, END, ChatEncoder, Message, Template, TemplateError
from deepseek_exp.data.tokenizer import Tokenizer

BATCH_ROWS = 1024
OTHER_KEYS = "set data.prompt_key and data.response_key to the keys of the two, or data.on_bad_line=skip"
EMPTY = "set data.on_empty_mask=drop to leave such rows out and count them, or data.train_on to other roles"

EncodedRow = tuple[list[int], list[bool]]  # ids, and whether each is supervised


@dataclass(frozen=True)
class ChatReader:
    """Turns a row's JSON into the canonical JSON of its conversation.

    Attributes:
        cfg: the data section.
        template: renders each conversation once, so that one it refuses is reported with its line.
    """

    cfg: DataConfig
    template: Template

    def document(self, row: dict[str, Any]) -> str:
        """Return the document of a row.

        Raises:
            BadRow: the row is malformed, or the template refuses it.
        """
        messages = self._messages(row)
        try:
            pieces = self.template.pieces(messages, self.cfg.train_on, "")
        except TemplateError as error:
            raise BadRow(f"has messages that cannot be used: {error}") from error
        if self.cfg.on_empty_mask is OnEmptyMask.stop and not any(piece.is_supervised for piece in pieces):
            roles = ", ".join(self.cfg.train_on)
            raise BadRow(f"has no message of data.train_on=[{roles}], so no supervised token", EMPTY, may_skip=False)
        return json.dumps(messages, ensure_ascii=False)

    def _messages(self, row: dict[str, Any]) -> list[Message]:
        prompt, response = self.cfg.prompt_key, self.cfg.response_key
        if "messages" in row:
            messages = row["messages"]
            if not isinstance(messages, list) or not messages:
                what = "an empty list" if messages == [] else kind(messages)
                raise BadRow(f"holds {what} under 'messages', not a list of messages")
            return [_message(i, message) for i, message in enumerate(messages, start=1)]
        if prompt in row and response in row:
            pairs = ("user", prompt), ("assistant", response)
            return [{"role": role, "content": _content(row[key], f"under '{key}'")} for role, key in pairs]
        rule = f"has neither 'messages' nor both of '{prompt}' and '{response}'; its keys are {listed(row)}"
        raise BadRow(rule, OTHER_KEYS)


def _message(number: int, message: Any) -> Message:
    where = f"in message {number}"
    if not isinstance(message, dict):
        raise BadRow(f"holds {kind(message)} as message {number}, not an object with role and content")
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        raise BadRow(f"has no '{missing[0]}' {where}; its keys are {listed(message)}")
    role = message["role"]
    if role not in ROLES:
        shown = repr(role) if isinstance(role, str) else kind(role)
        raise BadRow(f"has the role {shown} {where}, which is none of {', '.join(ROLES)}")
    return {"role": role, "content": _content(message["content"], f"as the content of message {number}")}


def _content(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise BadRow(f"holds {kind(text)} {where}, not a string")
    marks = {mark for mark in (BREAK, BEGIN, END) if mark in text}
    if marks:
        raise BadRow(f"holds the noncharacter U+{ord(min(marks)):04X} {where}, which the reader needs as a mark")
    return encodable(text)


def contents(document: str) -> str:
    """Return the text of a document, from which a tokenizer is trained."""
    return "\n".join(message["content"] for message in json.loads(document))


@dataclass(frozen=True)
class RowFiles:
    """What a split of instruction data has in addition to its ids.

    Attributes:
        n_supervised: number of targets that count.
        mask_digest: sha256 of <split>.mask.bin.
        ends_digest: sha256 of <split>.ends.bin.
    """

    n_supervised: int
    mask_digest: str
    ends_digest: str


class RowWriter:
    """Writes the three files of one split.

    Attributes:
        counts: (vocab_size,) int64, occurrences of each id.
        n_supervised: number of targets that count.
        files: the open files: ids, mask, ends.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, vocab_size: int) -> None:
        """Create the files."""
        self._dtype, self._end, self.n_supervised = dtype, 0, 0
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        names = (f"{split}.bin", f"{split}.mask.bin", f"{split}.ends.bin")
        self.files: list[IO[bytes]] = [(folder / name).open("wb") for name in names]
        self._hashes = [hashlib.sha256() for _ in names]

    def add(self, rows: Sequence[EncodedRow]) -> None:
        """Append encoded rows."""
        for tokens, supervised in rows:
            ids, mask = np.array(tokens, dtype=self._dtype), np.array(supervised, dtype=np.uint8)
            mask[:1] = 0  # the first token is predicted from nothing
            self._end += len(ids)
            self.n_supervised += int(mask.sum())
            self.counts += np.bincount(ids, minlength=len(self.counts))
            for file, digest, array in zip(self.files, self._hashes, (ids, mask, np.array([self._end])), strict=True):
                file.write(array.tobytes())
                digest.update(array.tobytes())

    @property
    def ids_digest(self) -> str:
        """Sha256 of the ids."""
        return self._hashes[0].hexdigest()

    @property
    def row_files(self) -> RowFiles:
        """What meta.json keeps of the mask and the ends."""
        return RowFiles(self.n_supervised, *(digest.hexdigest() for digest in self._hashes[1:]))


def encoded(
    documents: Iterable[tuple[str, str]], cfg: DataConfig, template: Template, tokenizer: Tokenizer
) -> Iterator[tuple[str, list[EncodedRow]]]:
    """Yield the encoded rows of documents in batches, each with its split.

    Args:
        documents: (split, document).
        cfg: the data section.
        template: the one that the documents were read with.
        tokenizer: encodes them.
    """
    encoder = ChatEncoder(template, tokenizer)
    waiting: dict[str, list[list[Message]]] = {}
    for split, document in documents:
        waiting.setdefault(split, []).append(json.loads(document))
        if len(waiting[split]) == BATCH_ROWS:
            yield split, encoder.encode(waiting.pop(split), cfg.train_on)
    for split, rows in waiting.items():
        yield split, encoder.encode(rows, cfg.train_on)
