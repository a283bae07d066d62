"""The order in which the sequences of a token stream are visited, as pure functions of a global index.

Sequence i of a stream is tokens[i * seq_len : i * seq_len + seq_len + 1]. Index g counts the sequences consumed since
the start of training, over all epochs. The order does not depend on the number of loader processes or devices.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate

BLOCK = 64  # slots of a mixture that share one random arrangement
ROUNDS = 6
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Shuffled:
    """A new random order of all sequences in each epoch.

    Epoch e visits permutation(seed, e) of range(n_sequences), a Feistel network on the smallest even number of bits
    that holds n_sequences, walked along its cycle until it lands in range (Black and Rogaway 2002, section 4): any
    index costs O(1) time and memory.
    """

    n_sequences: int
    seed: int

    def sequence_at(self, index: int) -> int:
        """Find the sequence at a global index >= 0."""
        epoch, place = divmod(index, self.n_sequences)
        half = max(1, ((self.n_sequences - 1).bit_length() + 1) // 2)
        keys = _round_keys(self.seed, epoch)
        place = _feistel(place, half, keys)
        while place >= self.n_sequences:
            place = _feistel(place, half, keys)
        return place


@dataclass(frozen=True)
class Contiguous:
    """Each lane of a batch reads its own equal part of the stream in order, and starts over at the end of the part.

    Index g belongs to lane g % n_lanes at step g // n_lanes. A part has n_sequences // n_lanes sequences; the remainder
    at the end of the stream is not visited.
    """

    n_sequences: int
    n_lanes: int

    def sequence_at(self, index: int) -> int:
        """Find the sequence at a global index >= 0."""
        step, lane = divmod(index, self.n_lanes)
        part = self.n_sequences // self.n_lanes
        return lane * part + step % part


@dataclass(frozen=True)
class Mixed:
    """Several streams, each with its own share and its own random order per epoch.

    Sequences are numbered consecutively through all parts; those of part k start at starts[k]. Among the first
    n * BLOCK indices, the count of part k equals its share within a few slots (`_counts`), so the long-run shares are
    exactly the weights. Block b = index // BLOCK holds the difference of two such counts, in a random arrangement
    seeded by (seed, b). The sequences of a part come in the order of `Shuffled` with a seed specific to the part, so
    none repeats within an epoch of the part. Any index costs O(BLOCK) time and memory.

    Attributes:
        names: names of the parts. They determine the parts' seeds, so that adding a part keeps the others' orders.
        sizes: number of sequences of each part.
        weights: share of each part, up to a common factor.
        seed: seed of the arrangements and the orders.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    @cached_property
    def starts(self) -> list[int]:
        """Index of the first sequence of each part."""
        return [0, *accumulate(self.sizes)][:-1]

    def sequence_at(self, index: int) -> int:
        """Find the sequence at a global index >= 0."""
        block, slot = divmod(index, BLOCK)
        part, place = _block(self.weights, self.seed, block)[slot]
        return self.starts[part] + self._orders[part].sequence_at(place)

    @cached_property
    def _orders(self) -> list[Shuffled]:
        return [Shuffled(size, _seed(self.seed, name)) for name, size in zip(self.names, self.sizes, strict=True)]


@dataclass(frozen=True)
class Paired:
    """The two sequences of a pair one after the other, pairs in the order of `pairs`."""

    pairs: Shuffled

    def sequence_at(self, index: int) -> int:
        """Find the sequence at a global index >= 0."""
        return 2 * self.pairs.sequence_at(index // 2) + index % 2


@dataclass(frozen=True)
class Grouped:
    """Each prompt as many times in a row as completions are sampled of it; prompts in the order of `prompts`.

    Attributes:
        prompts: the order of the prompts.
        group_size: completions per prompt.
        n_rows: rows of an optimizer step, a multiple of group_size.
        iterations: optimizer steps with the same rows.
    """

    prompts: Shuffled
    group_size: int
    n_rows: int
    iterations: int

    def sequence_at(self, index: int) -> int:
        """Find the sequence at a global index >= 0."""
        step, row = divmod(index, self.n_rows)
        return self.prompts.sequence_at((step // self.iterations * self.n_rows + row) // self.group_size)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])


@lru_cache(maxsize=16)
def _block(weights: tuple[float, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """Return the slots of a block, each as (part, number of earlier sequences of the part)."""
    done = _counts(weights, block * BLOCK)
    counts = [after - before for after, before in zip(_counts(weights, (block + 1) * BLOCK), done, strict=True)]
    ends, order, layout = list(accumulate(counts)), Shuffled(BLOCK, seed), []
    for slot in range(BLOCK):
        part = bisect_right(ends, order.sequence_at(block * BLOCK + slot))
        layout.append((part, done[part]))
        done[part] += 1
    return layout


def _counts(weights: Sequence[float], n: int) -> list[int]:
    """Divide n into integer counts proportional to the weights.

    Part 0 gets its rounded share, part 1 its rounded share of the remainder, and so on. If n grows by one, exactly one
    count grows by one: rounded x * share grows by 0 or 1 if x grows by 1, and the remainder grows by 1 or 0.
    """
    counts, left, rest = [], n, sum(map(Fraction, weights))
    for weight in map(Fraction, weights):
        counts.append((2 * left * weight + rest) // (2 * rest) if rest > weight else left)
        left, rest = left - counts[-1], rest - weight
    return counts


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digests = (hashlib.sha256(f"{seed} {epoch} {r}".encode()).digest() for r in range(ROUNDS))
    return tuple(int.from_bytes(digest[:8]) for digest in digests)


def _feistel(place: int, half: int, keys: tuple[int, ...]) -> int:
    """Permute the numbers of 2 * half bits. Bijective for every round function."""
    mask = (1 << half) - 1
    left, right = place >> half, place & mask
    for k in keys:
        left, right = right, left ^ (_mix(right ^ k) & mask)
    return left << half | right


def _mix(x: int) -> int:
    """Return a 64-bit hash of a 64-bit number (the finalizer of splitmix64)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31
