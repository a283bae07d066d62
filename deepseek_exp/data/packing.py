"""Rows of instruction data put into sequences of one length, as a pure function of their lengths.

A sequence holds seq_len + 1 tokens: inputs and targets. Rows are kept whole, each put where it fills a sequence best;
the rest is padding, which counts for nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_exp.config import DataConfig, OnEmptyMask, OnLongRow
from deepseek_exp.data.shards import Shard
from deepseek_exp.errors import DataError, Problem


@dataclass(frozen=True)
class Packed:
    """The sequences of one split.

    Attributes:
        starts: (rows,) int64, first token of each row in the shard, in the order of the sequences.
        lengths: (rows,) int64, tokens of each row; of a truncated one, those that are left.
        supervised: (rows,) int64, targets that count of each row.
        first_row: (sequences + 1,) int64; sequence s holds the rows first_row[s] .. first_row[s + 1] - 1.
        n_long: rows longer than a sequence, truncated or dropped.
        n_empty: rows that were dropped for having no target that counts.
    """

    starts: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    first_row: np.ndarray
    n_long: int
    n_empty: int

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return len(self.first_row) - 1


@dataclass(frozen=True)
class Supervision:
    """The supervised tokens of the rows of a split, all parts together.

    Attributes:
        n_rows: rows that are used.
        n_supervised: targets that count.
        least: targets that count of the row with the fewest.
        n_long: rows longer than a sequence, truncated or dropped.
        n_empty: rows that were dropped for having no target that counts.
        n_sequences: sequences that they are packed into.
        fill: share of the sequences' tokens that are not padding.
    """

    n_rows: int
    n_supervised: int
    least: int
    n_long: int
    n_empty: int
    n_sequences: int
    fill: float

    @property
    def mean(self) -> float:
        """Mean number of targets that count per row."""
        return self.n_supervised / self.n_rows


def supervision(parts: Sequence[Packed], seq_len: int) -> Supervision:
    """Return the supervised tokens of packed parts."""
    supervised, n_sequences = np.concatenate([p.supervised for p in parts]), sum(p.n_sequences for p in parts)
    return Supervision(
        n_rows=len(supervised),
        n_supervised=int(supervised.sum()),
        least=int(supervised.min()),
        n_long=sum(p.n_long for p in parts),
        n_empty=sum(p.n_empty for p in parts),
        n_sequences=n_sequences,
        fill=sum(int(p.lengths.sum()) for p in parts) / (n_sequences * (seq_len + 1)),
    )


def pack(shard: Shard, cfg: DataConfig, what: str) -> Packed:
    """Choose the rows of a shard and put them into sequences.

    Args:
        shard: a split of instruction data.
        cfg: the data section.
        what: the split and part, for messages.

    Raises:
        DataError: a row is too long or has no target that counts, and that is to stop the run; or no target counts.
    """
    capacity, ends = cfg.seq_len + 1, shard.open_ends()
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    lengths, n_all = ends - starts, len(ends)
    n_long = int((lengths > capacity).sum())
    if n_long and cfg.on_long_row is OnLongRow.stop:
        rule = f"is less than {n_long} of {n_all} rows of {what} need, the longest {int(lengths.max()) - 1}"
        fix = "raise data.seq_len, or set data.on_long_row=truncate or drop"
        raise DataError(Problem("data.seq_len", cfg.seq_len, rule, fix))
    if cfg.on_long_row is OnLongRow.drop:
        starts, lengths = starts[lengths <= capacity], lengths[lengths <= capacity]
    lengths = np.minimum(lengths, capacity)
    supervised = _sums(shard.open_mask(), starts, lengths)
    is_empty = supervised == 0
    n_empty = int(is_empty.sum())
    if n_empty == len(supervised):
        rule = f"leaves no supervised token in {n_all} rows of {what}"
        if n_long:
            rule += f", of which {n_long} are longer than data.seq_len={cfg.seq_len}"
        fix = "set data.train_on to roles that occur, or raise data.seq_len"
        raise DataError(Problem("data.train_on", list(cfg.train_on), rule, fix))
    if n_empty and cfg.on_empty_mask is OnEmptyMask.stop:
        rule = f"stops at {n_empty} of {n_all} rows of {what}, which have no supervised token"
        fix = "raise data.seq_len if they were truncated, or set data.on_empty_mask=drop to leave them out"
        raise DataError(Problem("data.on_empty_mask", cfg.on_empty_mask.value, rule, fix))
    starts, lengths, supervised = starts[~is_empty], lengths[~is_empty], supervised[~is_empty]
    rows, first_row = best_fit(lengths, capacity) if cfg.packing else _one_each(len(lengths))
    return Packed(starts[rows], lengths[rows], supervised[rows], first_row, n_long, n_empty)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put rows into few sequences by best-fit decreasing, without cutting one.

    From the longest row to the shortest, each goes where it leaves the least room. Source: Johnson et al. 1974,
    "Worst-Case Performance Bounds for Simple One-Dimensional Packing Algorithms": at most 11/9 of the optimum + 4.

    Args:
        lengths: (rows,), each from 1 to capacity.
        capacity: tokens of a sequence.

    Returns:
        The rows in the order of the sequences, and (sequences + 1,) where each sequence begins. Sequences are in the
        order of their first rows, and rows in a sequence in their own order.
    """
    rooms: list[tuple[int, int]] = []  # (room, sequence), sorted
    sequences: list[list[int]] = []
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, sequence = capacity, len(sequences)
            sequences.append([])
        else:
            room, sequence = rooms.pop(place)
        sequences[sequence].append(row)
        if room > length:
            insort(rooms, (room - length, sequence))
    ordered = sorted(sorted(rows) for rows in sequences)
    first_row = np.cumsum([0, *map(len, ordered)], dtype=np.int64)
    return np.array([row for rows in ordered for row in rows], dtype=np.int64), first_row


def _one_each(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n), np.arange(n + 1)


def _sums(mask: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the sum of a mask over each row: (rows,) int64."""
    before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    return before[starts + lengths] - before[starts]
