"""Batches of token sequences for Lightning; training can go on from any position at no cost."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from deepseek_exp.config import DataConfig, Order
from deepseek_exp.data.prepare import PreparedData
from deepseek_exp.data.shards import Shard
from deepseek_exp.data.stream import Contiguous, Shuffled
from deepseek_exp.errors import DataError, Problem


class TokenDataModule(LightningDataModule):
    """Serves training and validation batches.

    A batch of training is all the sequences of one optimizer step; its rows are the sequences at the global indices
    position .. position + global_batch_seqs - 1 (stream.py). The loader does not know what was trained on: the
    training loop calls `advance` for each step, before a checkpoint of that step is taken. (In Lightning that is in
    `training_step` or `optimizer_step`; callbacks run ahead of the module's `on_train_batch_end`.)

    Attributes:
        position: sequences consumed so far.
        n_train_sequences: sequences of one pass over the training text.
    """

    def __init__(
        self,
        data: PreparedData,
        cfg: DataConfig,
        *,
        seed: int,
        global_batch_seqs: int,
        micro_batch_seqs: int,
        eval_batches: int,
        pin_memory: bool = False,
    ) -> None:
        """Prepare to serve; nothing is read yet.

        Args:
            data: the tokens.
            cfg: the data section.
            seed: decides the order of shuffled sequences.
            global_batch_seqs: rows of a training batch.
            micro_batch_seqs: rows of a validation batch.
            eval_batches: batches of one validation; 0: all of them.
            pin_memory: put batches into page-locked memory, for a GPU.

        Raises:
            DataError: order=contiguous and fewer sequences than lanes.
        """
        super().__init__()
        self.position = 0
        self._train = _Sequences(data.train, cfg.seq_len)
        self._valid = _Sequences(data.valid, cfg.seq_len)
        self.n_train_sequences = self._train.n_sequences
        self._n_workers, self._pin_memory = cfg.n_workers, pin_memory
        self._global_batch_seqs, self._micro_batch_seqs = global_batch_seqs, micro_batch_seqs
        self._eval_batches = eval_batches
        self._is_contiguous = cfg.order is Order.contiguous
        if self._is_contiguous:
            _check_lanes("train", self._train, "trainer.global_batch_seqs", global_batch_seqs)
            _check_lanes("valid", self._valid, "trainer.micro_batch_seqs", micro_batch_seqs)
            self._order = Contiguous(self._train.n_sequences, global_batch_seqs)
        else:
            self._order = Shuffled(self._train.n_sequences, seed)

    def train_dataloader(self) -> DataLoader:
        """Serve int64 tensors (global_batch_seqs, seq_len + 1) without end, from `position` on."""
        if self._n_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns at each fork
        steps = _Steps(self._order, self._global_batch_seqs, lambda: self.position)
        return self._loader(self._train, steps, self._n_workers)

    def val_dataloader(self) -> DataLoader:
        """Serve int64 tensors (micro_batch_seqs, seq_len + 1): eval_batches of them, or all.

        Fewer than all are taken at even distances, so that they stand for the whole of the text and not for its first
        documents. With order=contiguous a row of each batch reads on where that row of the batch before ended, rows
        start at even distances, and what does not fill a batch is left out; else the last batch of all is smaller when
        they do not divide. Read in the training process: validation needs no order of its own to be prefetched.
        """
        n, rows = self._valid.n_sequences, self._micro_batch_seqs
        if self._is_contiguous:
            order = Contiguous(n, rows)
            batches = [[order.sequence_at(g) for g in range(s * rows, (s + 1) * rows)] for s in range(n // rows)]
            return self._loader(self._valid, batches[: self._eval_batches or None], 0)
        n_taken = min(n, self._eval_batches * rows) if self._eval_batches else n
        taken = [i * n // n_taken for i in range(n_taken)]
        return self._loader(self._valid, [taken[i : i + rows] for i in range(0, n_taken, rows)], 0)

    def advance(self, n: int) -> None:
        """Count n more sequences as consumed."""
        self.position += n

    def state_dict(self) -> dict[str, Any]:
        """Say where training is; Lightning keeps it in the checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where a checkpoint was taken."""
        self.position = state_dict["position"]

    def _loader(self, sequences: _Sequences, batches: Iterable[list[int]], n_workers: int) -> DataLoader:
        return DataLoader(
            sequences,
            batch_sampler=batches,
            num_workers=n_workers,
            persistent_workers=n_workers > 0,
            pin_memory=self._pin_memory,
            collate_fn=_as_is,
            generator=torch.Generator(),  # a loader draws a number at its start; not from the global generator
        )


class _Steps(Sampler[list[int]]):
    """The sequences of each optimizer step, without end, from the position that `position()` gives at the start."""

    def __init__(self, order: Shuffled | Contiguous, rows: int, position: Callable[[], int]) -> None:
        self._order, self._rows, self._position = order, rows, position

    def __iter__(self) -> Iterator[list[int]]:
        for start in itertools.count(self._position(), self._rows):
            yield [self._order.sequence_at(index) for index in range(start, start + self._rows)]


class _Sequences(Dataset[torch.Tensor]):
    """Rows of a shard: i -> tokens[i * seq_len : i * seq_len + seq_len + 1]; each process maps the file itself."""

    def __init__(self, shard: Shard, seq_len: int) -> None:
        self._shard, self._seq_len = shard, seq_len
        self._tokens: np.memmap | None = None
        self.n_sequences = (shard.n_tokens - 1) // seq_len

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        if self._tokens is None:
            self._tokens = self._shard.open()
        rows = np.empty((len(indices), self._seq_len + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            start = index * self._seq_len
            row[:] = self._tokens[start : start + self._seq_len + 1]
        return torch.from_numpy(rows)  # (len(indices), seq_len + 1)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the map, whose tokens would be copied."""
        return {**self.__dict__, "_tokens": None}


def _as_is(batch: torch.Tensor) -> torch.Tensor:
    return batch


def _check_lanes(split: str, sequences: _Sequences, key: str, n_lanes: int) -> None:
    if sequences.n_sequences < n_lanes:
        rule = (
            f"needs as many sequences of {split} text with data.order=contiguous and there are {sequences.n_sequences}"
        )
        raise DataError(Problem(key, n_lanes, rule, f"lower {key} or data.seq_len, or give more {split} text"))
