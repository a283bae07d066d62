"""The order in which the sequences of a token stream are visited: pure functions of a global index.

Sequence i of a stream is tokens[i * seq_len : i * seq_len + seq_len + 1]. Index g counts the sequences consumed since
the start of training, over all epochs; nothing depends on the number of loader processes or devices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

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
    """Each lane of a batch reads on through its own equal part of the stream, and starts over at its end.

    Lane g % n_lanes is at step g // n_lanes; a part has n_sequences // n_lanes sequences, what is left over at the end
    of the stream is not visited.
    """

    n_sequences: int
    n_lanes: int

    def sequence_at(self, index: int) -> int:
        """Find the sequence at a global index >= 0."""
        step, lane = divmod(index, self.n_lanes)
        part = self.n_sequences // self.n_lanes
        return lane * part + step % part


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digests = (hashlib.sha256(f"{seed} {epoch} {r}".encode()).digest() for r in range(ROUNDS))
    return tuple(int.from_bytes(digest[:8]) for digest in digests)


def _feistel(place: int, half: int, keys: tuple[int, ...]) -> int:
    """Permute the numbers of 2 * half bits; one to one whatever the round function is."""
    mask = (1 << half) - 1
    left, right = place >> half, place & mask
    for k in keys:
        left, right = right, left ^ (_mix(right ^ k) & mask)
    return left << half | right


def _mix(x: int) -> int:
    """Finalizer of splitmix64: a 64-bit hash of a 64-bit number."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31
