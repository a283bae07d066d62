import pytest

from deepseek_exp.data.stream import Contiguous, Shuffled


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 251, 1000, 1023, 1024, 1025, 4096, 4099])
def test_each_epoch_visits_each_sequence_once(n: int) -> None:
    for seed in (0, 7):
        order = Shuffled(n, seed)
        for epoch in (0, 1, 1_000_000):
            assert sorted(order.sequence_at(epoch * n + i) for i in range(n)) == list(range(n))


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
