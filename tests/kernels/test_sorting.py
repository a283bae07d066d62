"""The counting sort in Triton against its definition, whose results it must have to the bit."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.kernels import reference
from deepseek_exp.kernels.triton.sorting import BLOCK, sort_by_expert

# tokens, experts of a token, experts: one block, its border, several; a power of two of experts and one more
SHAPES = [(1, 1, 1), (7, 3, 5), (BLOCK, 1, 7), (BLOCK // 2 + 1, 2, 31), (300, 6, 64), (130, 4, 33), (70, 8, 160)]


def random_ids(tokens, k, n):
    return torch.randint(n, (tokens, k), generator=torch.Generator().manual_seed(tokens))


def assert_sorted(ids, n_experts, sort=sort_by_expert):
    found = sort(ids, n_experts)
    for got, want in zip(found, reference.sort_by_expert(ids, n_experts), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape):
    assert_sorted(random_ids(*shape), shape[2])


def test_rows_of_one_expert_keep_their_order_and_dropped_rows_come_last():
    ids = torch.tensor([[2, 0], [3, 0], [2, 3], [0, 2]])
    order, inverse, ends = assert_sorted(ids, 3)
    assert order.tolist() == [1, 3, 6, 0, 4, 7, 2, 5]
    assert inverse[order].tolist() == list(range(8)) and ends.tolist() == [3, 3, 6]


@pytest.mark.parametrize("n_experts", [31, 63])
def test_dropped_rows_beside_rows_that_are_not_there(n_experts):
    """Both have bins of their own, at the end."""
    ids = random_ids(150, 2, n_experts + 1)
    assert (ids == n_experts).any()
    assert_sorted(ids, n_experts)


@pytest.mark.parametrize("expert", [0, 3, 7])
def test_one_expert_takes_all(expert):
    assert_sorted(torch.full((200, 3), expert), 8)


def test_no_rows():
    assert_sorted(torch.empty(0, 2, dtype=torch.int64), 4)


def test_ids_that_do_not_lie_one_after_the_other():
    assert_sorted(random_ids(3, 90, 5).T, 5)


def test_compiles_without_a_break():
    ids = random_ids(9, 2, 4)
    assert_sorted(ids, 4, torch.compile(sort_by_expert, backend="aot_eager", fullgraph=True))
    torch.library.opcheck(torch.ops.deepseek_exp.sort_by_expert, (ids, 4))
