import random
from itertools import pairwise

import pytest

from deepseek_exp.data import order as order_module
from deepseek_exp.data.order import BLOCK, Contiguous, Mixed, Shuffled


def test_each_epoch_visits_each_sequence_once() -> None:
    for n in (*range(1, 70), 127, 128, 129, 251, 1000, 1023, 1024, 1025, 4096, 4099):
        for seed in (0, 7):
            order = Shuffled(n, seed)
            for epoch in (0, 1, 1_000_000):
                assert sorted(order.sequence_at(epoch * n + i) for i in range(n)) == list(range(n)), (n, seed, epoch)


def test_epochs_and_seeds_differ() -> None:
    orders = [[Shuffled(1000, seed).sequence_at(e * 1000 + i) for i in range(1000)] for seed in (0, 1) for e in (0, 1)]
    orders.append(list(range(1000)))
    for a in range(5):
        for b in range(a):
            assert sum(x == y for x, y in zip(orders[a], orders[b], strict=True)) < 15


def test_shuffled_is_near_uniform() -> None:
    n, seeds = 10, 2000
    for i in range(n):
        seen = [Shuffled(n, seed).sequence_at(i) for seed in range(seeds)]
        assert all(abs(seen.count(s) - seeds / n) < 75 for s in range(n))  # 5.6 standard deviations of 13.4
    follows = sum(abs(Shuffled(1000, 0).sequence_at(i + 1) - Shuffled(1000, 0).sequence_at(i)) == 1 for i in range(999))
    assert follows < 12


def test_the_order_of_a_seed_never_changes() -> None:
    assert [Shuffled(10, 0).sequence_at(i) for i in range(12)] == [3, 6, 9, 0, 4, 2, 5, 8, 7, 1, 9, 7]
    assert [Shuffled(10**12, 3).sequence_at(i) for i in (0, 10**12)] == [444822070880, 702133051661]


def test_lanes_read_on_and_wrap() -> None:
    order = Contiguous(7, 2)
    visited = [order.sequence_at(i) for i in range(10)]
    assert visited[0::2] == [0, 1, 2, 0, 1]
    assert visited[1::2] == [3, 4, 5, 3, 4]


MIXTURES = [(1.0,), (1.0, 1.0), (0.5, 0.3, 0.2), (5.0, 1e-4, 2.0, 1e-4), (0.1,) * 7, (1e9, 1.0, 3.3)]


def mixed(weights=(0.5, 0.3, 0.2), sizes=(50, 7, 23), seed=0) -> Mixed:
    return Mixed(tuple("abcdefg"[: len(weights)]), tuple(sizes), tuple(weights), seed)


def walk(order: Mixed, n: int, start: int = 0) -> list[tuple[int, int]]:
    """Give (part, sequence within the part) for the indices start .. start + n - 1."""
    found = []
    for index in range(start, start + n):
        number = order.sequence_at(index)
        part = max(k for k, first in enumerate(order.starts) if first <= number)
        found.append((part, number - order.starts[part]))
    return found


@pytest.mark.parametrize("weights", MIXTURES)
def test_each_step_of_the_counts_goes_to_one_part(weights) -> None:
    for start in (0, 12_345, 10**12):
        counts = [order_module._counts(weights, n) for n in range(start, start + 2000)]
        assert [sum(c) for c in counts] == list(range(start, start + 2000))
        for before, after in pairwise(counts):
            assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0] * (len(weights) - 1) + [1]


@pytest.mark.parametrize("weights", MIXTURES)
def test_shares_are_the_weights(weights) -> None:
    order, total = mixed(weights, [9] * len(weights)), sum(weights)
    parts = [part for part, _ in walk(order, 40 * BLOCK)]
    for n in range(BLOCK, 40 * BLOCK + 1, BLOCK):
        assert all(abs(parts[:n].count(k) - n * w / total) <= len(weights) for k, w in enumerate(weights))
    assert order_module._counts((1.0, 2.0, 4.0), 7 * 10**15) == [10**15, 2 * 10**15, 4 * 10**15]


def test_a_part_repeats_nothing_within_an_epoch_and_orders_each_anew() -> None:
    for weights, sizes in (((0.5, 0.3, 0.2), (50, 7, 23)), ((1, 9), (300, 1)), ((1, 1), (2, 64))):
        seen: dict[int, list[int]] = {}
        for part, sequence in walk(mixed(weights, sizes), 6400):
            seen.setdefault(part, []).append(sequence)
        for part, size in enumerate(sizes):
            epochs = [seen[part][i : i + size] for i in range(0, len(seen[part]) - size + 1, size)]
            assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
            assert size < 20 or (len(epochs) > 1 and len(set(map(tuple, epochs))) == len(epochs))


def test_a_mixture_starts_anywhere() -> None:
    whole, rng = walk(mixed(), 2000), random.Random(0)
    for start in [rng.randrange(1900) for _ in range(30)]:
        order_module._block.cache_clear()
        assert walk(mixed(), 100, start) == whole[start : start + 100]
    assert len(walk(mixed(), 3, 10**18)) == 3


def test_parts_are_arranged_at_random_and_by_seed() -> None:
    orders = [[part for part, _ in walk(mixed((1, 1), (99, 99), seed), 100 * BLOCK)] for seed in (0, 1)]
    blocks = [tuple(order[i : i + BLOCK]) for order in orders for i in range(0, len(order), BLOCK)]
    assert len(set(blocks)) == 200
    for order in orders:  # the parts of neighbours, and of one row of each batch, are as good as independent
        for step in (1, 2, 8, 21, BLOCK):
            same = sum(a == b for a, b in zip(order, order[step:], strict=False)) / (len(order) - step)
            assert abs(same - 0.5) < 0.04, step


def test_other_parts_keep_their_orders_when_one_is_added() -> None:
    def of(order: Mixed, part: int) -> list[int]:
        return [sequence for p, sequence in walk(order, 2000) if p == part][:80]

    assert of(Mixed(("a", "b"), (40, 30), (1, 1), 3), 0) == of(Mixed(("x", "a", "b"), (9, 40, 30), (1, 1, 1), 3), 1)
    order = Mixed(("a", "b"), (40, 40), (1, 1), 3)
    assert of(order, 0) != of(order, 1)


def test_the_order_of_a_mixture_never_changes() -> None:
    assert walk(mixed(), 10) == [(0, 42), (0, 5), (2, 0), (1, 2), (0, 36), (0, 47), (2, 15), (0, 39), (0, 44), (1, 6)]
    assert walk(mixed(), 2, 10**12) == [(1, 4), (1, 2)]
