"""Batches of token sequences for Lightning. Training can resume from any position at no cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from deepseek_exp.config import DataConfig, Order
from deepseek_exp.config.batch_sizes import BatchSizes
from deepseek_exp.data.order import Contiguous, Grouped, Mixed, Paired, Shuffled
from deepseek_exp.data.packing import Supervision, supervision
from deepseek_exp.data.prepare import PreparedData
from deepseek_exp.data.rows import PreparedRows
from deepseek_exp.data.sequences import FILLER, Batch, PackedSequences, Sequences, sequences_of
from deepseek_exp.errors import DataError, Problem


class TokenDataModule(LightningDataModule):
    """Serves training and validation batches.

    A training batch holds all sequences of one optimizer step: those at the global indices
    position .. position + global_batch_seqs - 1 (order.py), or fewer in a ramp of the batch. With several data-parallel
    ranks, each has an equal contiguous range of these rows, so a step consists of the same sequences for every dp. The
    loader does not know what was trained on: the training loop calls `advance` for each step, before a checkpoint of
    that step is saved. (In Lightning that is in `training_step` or `optimizer_step`; callbacks run before the module's
    `on_train_batch_end`.)

    Attributes:
        position: number of sequences consumed so far.
        n_train_sequences: number of sequences in one pass over the training text, all parts together.
    """

    def __init__(
        self,
        data: PreparedData,
        cfg: DataConfig,
        *,
        seed: int,
        global_batch_seqs: int,
        micro_batch_seqs: int,
        eval_seqs: int,
        dp: int = 1,
        dp_rank: int = 0,
        fill_up: bool = False,
        pin_memory: bool = False,
        group_size: int = 1,
        iterations: int = 1,
        sizes: BatchSizes | None = None,
    ) -> None:
        """Set up the module without reading anything.

        Args:
            data: the tokens.
            cfg: the data section.
            seed: seed of the order of shuffled sequences.
            global_batch_seqs: rows of a training batch.
            micro_batch_seqs: rows of a validation batch; has no other effect.
            eval_seqs: number of sequences per validation; 0 means all of them.
            dp: number of data-parallel ranks.
            dp_rank: this process's data-parallel rank.
            fill_up: pad validation so that all batches have one size and all ranks have equally many.
            pin_memory: put batches into page-locked memory, for a GPU.
            group_size: rows of a training batch with the same prompt, one after the other (data.source=prompts).
            iterations: training batches with the same rows, one after the other (data.source=prompts).
            sizes: rows of each training batch; None: all have global_batch_seqs.

        Raises:
            DataError: order=contiguous and fewer training sequences than lanes.
        """
        super().__init__()
        self.position = 0
        self._train, self._valid = (sequences_of(data, cfg, split) for split in ("train", "valid"))
        self.n_train_sequences = self._train.n_sequences * group_size * iterations
        self._n_workers, self._pin_memory = cfg.n_workers, pin_memory
        self._global_batch_seqs, self._micro_batch_seqs = global_batch_seqs, micro_batch_seqs
        self._eval_seqs, self._dp, self._dp_rank, self._fill_up = eval_seqs, dp, dp_rank, fill_up
        self._sizes = sizes or BatchSizes(global_batch_seqs, global_batch_seqs)
        self._is_contiguous = cfg.order is Order.contiguous
        if isinstance(data, PreparedRows):
            shuffled = Shuffled(self._train.n_sequences // data.unit, seed)
            grouped = Grouped(shuffled, group_size, global_batch_seqs, iterations)
            self._order: Contiguous | Grouped | Mixed | Paired | Shuffled = (
                Paired(shuffled) if data.unit == 2 else grouped
            )
        elif self._is_contiguous:
            _check_lanes(self._train.n_sequences, global_batch_seqs)
            self._order = Contiguous(self._train.n_sequences, global_batch_seqs)
        elif data.part_names:
            weights = tuple(part.weight for part in data.parts)
            self._order = Mixed(tuple(data.part_names), tuple(self._train.sizes), weights, seed)
        else:
            self._order = Shuffled(self._train.n_sequences, seed)

    def train_dataloader(self) -> DataLoader:
        """Return an endless loader of this rank's rows of each global batch, starting at `position`."""
        if self._n_workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise tokenizers warns at each fork
        steps = _Steps(self._order, self._sizes, self._dp, self._dp_rank, lambda: self.position)
        return self._loader(self._train, steps, self._n_workers)

    def val_dataloader(self) -> DataLoader:
        """Return a loader of eval_seqs sequences, or all, in batches of micro_batch_seqs.

        The choice of sequences depends neither on the micro-batch nor on the layout. If not all are used, they are
        evenly spaced, so that they represent the entire text rather than its first documents. The last batch may be
        smaller. They are read in the training process, because validation has no separate order to prefetch.

        The parts of a mixture follow one another, and no batch mixes parts. Each part has an equal number of sequences
        whatever its weight: at least one, with one more for the first parts if the number does not divide evenly.

        With order=contiguous the text is read in lanes, as in training: `n_eval_lanes` lanes start at evenly spaced
        places, and each reads eval_seqs // n_eval_lanes consecutive sequences. A step of all lanes is split into
        `batches_per_eval_step` batches, so lane l is in row l % micro_batch_seqs of each batch with
        batch_idx % batches_per_eval_step == l // micro_batch_seqs.

        Batches are assigned to data-parallel ranks in turn. With fill_up, all batches are padded with rows that do not
        count, and all ranks have equally many batches.
        """
        return self._loader(self._valid, self._share(self._val_batches()), 0)

    @property
    def n_eval_lanes(self) -> int:
        """Number of validation lanes with order=contiguous: global_batch_seqs, or fewer if sequences are fewer."""
        return min(self._global_batch_seqs, self._valid.n_sequences, self._eval_seqs or self._valid.n_sequences)

    @property
    def batches_per_eval_step(self) -> int:
        """Number of validation batches that hold one sequence of each lane, with order=contiguous."""
        return -(-self.n_eval_lanes // self._micro_batch_seqs)

    def _val_batches(self) -> list[list[int]]:
        if self._is_contiguous:
            return self._val_lanes()
        batches, n_parts, unit = [], len(self._valid.sizes), self._valid.unit
        for part, (start, size) in enumerate(zip(self._valid.starts, self._valid.sizes, strict=True)):
            share, n = max(1, (self._eval_seqs + n_parts - 1 - part) // n_parts // unit), size // unit
            n_taken = min(n, share) if self._eval_seqs else n
            first = (start + i * n // n_taken * unit for i in range(n_taken))
            batches += self._cut([sequence + k for sequence in first for k in range(unit)])
        return batches

    def _val_lanes(self) -> list[list[int]]:
        n, lanes = self._valid.n_sequences, self.n_eval_lanes
        order, n_steps = Contiguous(n, lanes), min(self._eval_seqs or n, n) // lanes
        steps = ([order.sequence_at(g) for g in range(s * lanes, (s + 1) * lanes)] for s in range(n_steps))
        return [batch for step in steps for batch in self._cut(step)]

    def _cut(self, sequences: list[int]) -> list[list[int]]:
        rows = self._micro_batch_seqs
        return [sequences[i : i + rows] for i in range(0, len(sequences), rows)]

    def _share(self, batches: list[list[int]]) -> list[list[int]]:
        """Return the batches of this data-parallel rank."""
        if self._fill_up:
            batches = batches + [[]] * (-len(batches) % self._dp)
            batches = [batch + [FILLER] * (self._micro_batch_seqs - len(batch)) for batch in batches]
        return batches[self._dp_rank :: self._dp]

    def isolated_sample(self) -> Batch | None:
        """Return a micro-batch of training sequences that hold documents that do not see each other, None if none does.

        It is the same on all ranks. If there are too few such sequences, they are repeated.
        """
        found = self._train.isolated(self._micro_batch_seqs)
        if not found:
            return None
        return self._train.__getitems__([found[i % len(found)] for i in range(self._micro_batch_seqs)])

    @property
    def supervision(self) -> dict[str, Supervision]:
        """The supervised tokens of instruction data, by split; empty for text."""
        both = {"train": self._train, "valid": self._valid}
        return {
            split: supervision(sequences.packed, sequences.seq_len)
            for split, sequences in both.items()
            if isinstance(sequences, PackedSequences)
        }

    @property
    def first_row(self) -> int:
        """Global index of the first row of this rank's next training batch."""
        return self.position + self._dp_rank * (self._global_batch_seqs // self._dp)

    def own_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of those of a whole training batch."""
        return rows.chunk(self._dp)[self._dp_rank]

    def advance(self, n: int) -> None:
        """Mark n more sequences as consumed."""
        self.position += n

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data; Lightning stores it in the checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position of a checkpoint."""
        self.position = state_dict["position"]

    def _loader(self, sequences: Sequences, batches: Iterable[list[int]], n_workers: int) -> DataLoader:
        return DataLoader(
            sequences,
            batch_sampler=batches,
            num_workers=n_workers,
            persistent_workers=n_workers > 0,
            pin_memory=self._pin_memory,
            collate_fn=_as_is,
            generator=torch.Generator(),  # a loader draws one number at its start; keep the global generator unchanged
        )


class _Steps(Sampler[list[int]]):
    """Endless sampler of this rank's sequences of each optimizer step, starting at the value of `position()`."""

    def __init__(
        self,
        order: Contiguous | Grouped | Mixed | Paired | Shuffled,
        sizes: BatchSizes,
        dp: int,
        dp_rank: int,
        position: Callable[[], int],
    ) -> None:
        self._order, self._sizes, self._dp, self._dp_rank, self._position = order, sizes, dp, dp_rank, position

    def __iter__(self) -> Iterator[list[int]]:
        start = self._position()
        while True:
            rows = self._sizes.seqs_from(start)
            share = rows // self._dp
            first = start + self._dp_rank * share
            yield [self._order.sequence_at(index) for index in range(first, first + share)]
            start += rows


def _as_is(batch: Batch) -> Batch:
    return batch


def _check_lanes(n_sequences: int, n_lanes: int) -> None:
    if n_sequences < n_lanes:
        key = "trainer.global_batch_seqs"
        rule = f"needs as many sequences of train text with data.order=contiguous and there are {n_sequences}"
        raise DataError(Problem(key, n_lanes, rule, f"lower {key} or data.seq_len, or add more train text"))
