"""How many sequences each step of a growing batch has."""

import pytest

from deepseek_exp.config.batch_sizes import BatchSizes

RAMP = BatchSizes(12, 4, 5)


def test_steps_grow_in_multiples_of_the_first():
    position, found = 0, []
    for _ in range(8):
        found.append(RAMP.seqs_from(position))
        position += found[-1]
    assert found == [4, 4, 4, 8, 8, 12, 12, 12] and RAMP.total(0, 8) == position
    assert RAMP.total(2, 6) == sum(found[2:6]) and RAMP.total(6, 7) == 12


@pytest.mark.parametrize(("n", "steps"), [(0.5, 1), (4, 1), (5, 2), (12, 3), (28, 5), (28.5, 6), (40, 6), (41, 7)])
def test_epochs_of_a_growing_batch_have_more_steps(n, steps):
    assert RAMP.steps_for(n) == steps
    assert RAMP.total(0, steps) >= n > RAMP.total(0, steps - 1)


def test_without_a_ramp_all_steps_are_alike():
    sizes = BatchSizes(6, 6)
    assert [sizes.seqs_from(p) for p in (0, 5, 6, 600)] == [6] * 4 and sizes.total(3, 5) == 12
    assert [sizes.steps_for(n) for n in (1, 6, 6.5, 12)] == [1, 1, 2, 2]
