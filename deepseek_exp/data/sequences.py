"""Sequences of prepared data by their number: what a batch of them holds.

Text is cut every seq_len tokens; instruction data is packed (packing.py).
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from deepseek_exp.config import DataConfig, Source
from deepseek_exp.data.packing import Packed, pack
from deepseek_exp.data.prepare import PreparedData
from deepseek_exp.data.rows import PreparedRows, Rows
from deepseek_exp.data.shards import Shard

FILLER = -1  # sequence number of a padding row
SEARCHED = 1000  # sequences among which some with several documents are looked for


class Batch(NamedTuple):
    """A batch of sequences with their origin.

    Attributes:
        tokens: (sequences, seq_len + 1) int64.
        part: (sequences,) int64, index of each sequence's part in the order of data.mixture; -1 without a mixture.
        n_counted: in validation, the number of sequences that count; those after them are padding.
        loss_mask: (sequences, seq_len) bool, whether each target counts; None if all do.
        document: (sequences, seq_len) int32, the document of each input, if those of a sequence do not see each other;
            None if they do.
        reference: (sequences,) float64, log-probability of each completion under the reference of preference training.
        row: (sequences,) int64, the prompt of each sequence, in reinforcement learning; -1 of padding.
        prompt_len: (sequences,) int64, its number of tokens. What follows is filled by the sampled completion, and the
            fields below describe it, as those of `MicroBatch` do.
    """

    tokens: torch.Tensor
    part: torch.Tensor
    n_counted: int
    loss_mask: torch.Tensor | None = None
    document: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    row: torch.Tensor | None = None
    prompt_len: torch.Tensor | None = None
    advantage: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    reference_log_probs: torch.Tensor | None = None


class Sequences(Dataset[Batch]):
    """Rows of the shards of all parts, numbered consecutively. Each process memory-maps the files itself.

    Row i of a part is tokens[i * seq_len : i * seq_len + seq_len + 1] of its shard.

    Attributes:
        seq_len: inputs of a sequence.
        sizes: number of sequences of each part.
        starts: index of the first sequence of each part.
        n_sequences: total number of sequences.
        unit: adjacent sequences that belong together.
    """

    unit = 1

    def __init__(self, shards: Sequence[Shard], seq_len: int, *, labelled: bool, isolated_by: int | None) -> None:
        """Set up without reading anything.

        Args:
            shards: of all parts.
            seq_len: inputs of a sequence.
            labelled: parts are those of a mixture.
            isolated_by: id of the end of a document, if documents of a sequence do not see each other; else None.
        """
        self._shards, self.seq_len, self._labelled, self._isolated_by = shards, seq_len, labelled, isolated_by
        self._tokens: list[np.memmap] | None = None
        self.sizes = self._sizes()
        self.n_sequences = sum(self.sizes)
        self.starts = [0, *itertools.accumulate(self.sizes)][:-1]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the sequences of some numbers, and rows of zeros for `FILLER`."""
        if self._tokens is None:
            self._tokens = [shard.open() for shard in self._shards]
        rows = np.zeros((len(indices), self.seq_len + 1), dtype=np.int64)
        parts = np.full(len(indices), -1, dtype=np.int64)
        counted = [index for index in indices if index != FILLER]
        places = []
        for i, index in enumerate(counted):
            part = bisect_right(self.starts, index) - 1
            places.append((part, index - self.starts[part]))
            if self._labelled:
                parts[i] = part
        mask, document = self._fill(rows, places)
        return Batch(torch.from_numpy(rows), torch.from_numpy(parts), len(counted), mask, document)

    def isolated(self, n: int) -> list[int]:
        """Return the numbers of n sequences, or fewer, that hold targets of several documents, of the first ones."""
        found: list[int] = []
        for index in range(min(self.n_sequences, SEARCHED)):
            batch = self.__getitems__([index])
            if batch.document is not None and len(batch.document[batch.loss_mask].unique()) > 1:
                found.append(index)
            if len(found) == n:
                break
        return found

    def _sizes(self) -> list[int]:
        return [(shard.n_tokens - 1) // self.seq_len for shard in self._shards]

    def _fill(
        self, rows: np.ndarray, places: Sequence[tuple[int, int]]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Write the sequences at (part, number in the part) into the rows; return their loss mask and documents."""
        assert self._tokens is not None
        for row, (part, number) in zip(rows, places, strict=False):
            start = number * self.seq_len
            row[:] = self._tokens[part][start : start + self.seq_len + 1]
        if self._isolated_by is None:
            return None, None
        ends = torch.from_numpy(rows[:, :-1] == self._isolated_by)  # (rows, seq_len)
        return ~ends, (ends.cumsum(1) - ends.long()).int()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the memory maps, whose tokens would be copied."""
        return {**self.__dict__, "_tokens": None}


class PackedSequences(Sequences):
    """Sequences of packed rows of instruction data.

    Attributes:
        packed: the rows of each part, by sequence.
    """

    def __init__(
        self, shards: Sequence[Shard], packed: Sequence[Packed], seq_len: int, *, labelled: bool, isolated: bool
    ) -> None:
        """Set up.

        Args:
            shards: of all parts.
            packed: their rows.
            seq_len: inputs of a sequence.
            labelled: parts are those of a mixture.
            isolated: rows of a sequence do not see each other.
        """
        self.packed, self._isolated = packed, isolated
        super().__init__(shards, seq_len, labelled=labelled, isolated_by=None)
        self._masks: list[np.ndarray] | None = None

    def _sizes(self) -> list[int]:
        return [packed.n_sequences for packed in self.packed]

    def _fill(self, rows: np.ndarray, places: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self._tokens is not None
        if self._masks is None:
            self._masks = [shard.open_mask() for shard in self._shards]
        supervised = np.zeros(rows.shape, dtype=bool)
        document = np.zeros(rows.shape, dtype=np.int32)
        for i, (part, number) in enumerate(places):
            packed, at = self.packed[part], 0
            first, last = packed.first_row[number : number + 2]
            for k, row in enumerate(range(first, last)):
                here = slice(at, at + int(packed.lengths[row]))
                there = slice(int(packed.starts[row]), int(packed.starts[row] + packed.lengths[row]))
                rows[i, here], supervised[i, here] = self._tokens[part][there], self._masks[part][there]
                document[i, here], at = k, here.stop
            document[i, at:] = last - first  # the padding
        return torch.from_numpy(supervised[:, 1:]), torch.from_numpy(document[:, :-1]) if self._isolated else None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the memory maps."""
        return {**super().__getstate__(), "_masks": None}


class RowSequences(Sequences):
    """Separate rows: pairs of completions, or prompts."""

    def __init__(self, rows: Rows, unit: int) -> None:
        """Set up.

        Args:
            rows: of the split.
            unit: 2 for pairs, 1 for prompts.
        """
        self._rows, self.unit = rows, unit
        self.sizes, self.starts, self.n_sequences = [len(rows.tokens)], [0], len(rows.tokens)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the rows of some numbers, and rows that do not count for `FILLER`."""
        rows, at, is_row = self._rows, np.maximum(indices, 0), np.array(indices) != FILLER
        tokens = torch.from_numpy(rows.tokens[at].astype(np.int64))
        batch = Batch(tokens, torch.full((len(at),), -1), int(is_row.sum()))
        if self.unit == 1:
            row, prompt_len = np.where(is_row, at, FILLER), rows.prompt_len[at]
            return batch._replace(row=torch.from_numpy(row), prompt_len=torch.from_numpy(prompt_len))
        loss_mask = torch.from_numpy(rows.loss_mask(at) & is_row[:, None])
        reference = None if rows.reference is None else torch.from_numpy(rows.reference[at])
        return batch._replace(loss_mask=loss_mask, reference=reference)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle all; there are no memory maps."""
        return self.__dict__


def sequences_of(data: PreparedData, cfg: DataConfig, split: str) -> Sequences:
    """Return the sequences of a split.

    Args:
        data: the prepared data.
        cfg: the data section.
        split: train or valid.

    Raises:
        DataError: see `pack`.
    """
    if isinstance(data, PreparedRows):
        return RowSequences(getattr(data, split), data.unit)
    shards, labelled = [getattr(part, split) for part in data.parts], bool(data.part_names)
    if cfg.source is not Source.chat:
        end_id = data.tokenizer.end_id if cfg.isolate_documents else None
        return Sequences(shards, cfg.seq_len, labelled=labelled, isolated_by=end_id)
    names = [f"the {split} rows" + (f" of {part.name}" if part.name else "") for part in data.parts]
    packed = [pack(shard, cfg, name) for shard, name in zip(shards, names, strict=True)]
    isolated = cfg.isolate_documents and cfg.packing  # alone in a sequence, a row sees no other
    return PackedSequences(shards, packed, cfg.seq_len, labelled=labelled, isolated=isolated)
