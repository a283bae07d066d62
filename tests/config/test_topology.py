"""Ranks, coordinates and groups: against small layouts by hand, and as laws over many."""

from __future__ import annotations

import itertools

import pytest

from deepseek_exp.config.topology import AUTO, Axis, Degrees, divisors, resolve

LAYOUTS = [
    Degrees(dp, tp, pp, ep)
    for dp, tp, pp, ep in itertools.product((1, 2, 3, 4, 6), (1, 2, 4), (1, 2, 3), (1, 2, 3, 4))
    if dp % ep == 0
]


class TestByHand:
    def test_2x2x2_is_numbered_tp_first_then_dp_then_pp(self):
        d = Degrees(dp=2, tp=2, pp=2, ep=1)
        assert d.world_size == 8
        assert d.groups(Axis.tp) == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert d.groups(Axis.dp) == d.groups(Axis.data) == [[0, 2], [1, 3], [4, 6], [5, 7]]
        assert d.groups(Axis.pp) == [[0, 4], [1, 5], [2, 6], [3, 7]]
        assert d.groups(Axis.ep) == [[0], [1], [2], [3], [4], [5], [6], [7]]

    def test_experts_are_shared_by_neighbours_of_dp(self):
        d = Degrees(dp=4, tp=2, pp=1, ep=2)
        assert d.n_data == 2
        assert d.groups(Axis.ep) == [[0, 2], [1, 3], [4, 6], [5, 7]]
        assert d.groups(Axis.data) == [[0, 4], [1, 5], [2, 6], [3, 7]]
        assert d.groups(Axis.model) == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_coordinates(self):
        at = Degrees(dp=4, tp=2, pp=2, ep=2).coordinates(13)
        assert (at.pp, at.dp, at.tp, at.data, at.ep) == (1, 2, 1, 1, 0)


class TestLaws:
    def test_every_axis_parts_the_ranks_into_groups_of_its_size(self):
        for d in LAYOUTS:
            for axis in Axis:
                groups = d.groups(axis)
                assert sorted(itertools.chain.from_iterable(groups)) == list(range(d.world_size)), d
                assert {len(g) for g in groups} == {d.size(axis)}, d
                assert {g[-1] - g[0] + 1 for g in groups} == {d.span(axis)}, d

    def test_a_rank_stands_in_its_group_at_its_coordinate(self):
        for d in LAYOUTS:
            for axis in (Axis.tp, Axis.pp, Axis.dp, Axis.ep, Axis.data):
                assert all(getattr(d.coordinates(r), axis) == i for g in d.groups(axis) for i, r in enumerate(g)), d

    def test_coordinates_are_the_inverse_of_rank(self):
        for d in LAYOUTS:
            for rank in range(d.world_size):
                at = d.coordinates(rank)
                assert d.rank(pp=at.pp, dp=at.dp, tp=at.tp) == rank, d
                assert at.dp == at.data * d.ep + at.ep, d

    def test_it_is_deepspeeds_numbering_with_the_experts_folded_into_the_model_axis(self):
        for d in LAYOUTS:
            folded = itertools.product(range(d.pp), range(d.n_data), range(d.ep), range(d.tp))
            for rank, (pipe, data, e, t) in enumerate(folded):  # row by row, as PipeModelDataParallelTopology counts
                at = d.coordinates(rank)
                assert (at.pp, at.data, at.ep, at.tp) == (pipe, data, e, t), d


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_of_the_world(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not in a world of 8"):
        Degrees(2, 2, 2, 1).coordinates(rank)


def test_a_place_outside_of_the_world():
    with pytest.raises(ValueError, match="is not within"):
        Degrees(2, 2, 2, 1).rank(pp=0, dp=2, tp=0)


class TestAuto:
    @pytest.mark.parametrize(
        ("asked", "world_size", "n_experts", "expected"),
        [
            ((AUTO, 2, 2, 1), 16, 0, Degrees(4, 2, 2, 1)),
            ((2, AUTO, 2, 1), 16, 0, Degrees(2, 4, 2, 1)),
            ((2, 2, AUTO, 1), 16, 0, Degrees(2, 2, 4, 1)),
            ((AUTO, 1, 1, AUTO), 12, 8, Degrees(12, 1, 1, 4)),
            ((6, 1, 1, AUTO), 12, 0, Degrees(6, 1, 1, 1)),
            ((2, 2, 2, 2), 1024, 8, Degrees(2, 2, 2, 2)),  # nothing to work out: a part of the world
        ],
    )
    def test_takes_what_is_left(self, asked, world_size, n_experts, expected):
        assert resolve(*asked, world_size=world_size, n_experts=n_experts) == expected

    @pytest.mark.parametrize("asked", [(AUTO, AUTO, 2, 1), (AUTO, AUTO, AUTO, AUTO)])
    def test_two_cannot_follow(self, asked):
        with pytest.raises(ValueError, match="one of dp, tp and pp at most"):
            resolve(*asked, world_size=8, n_experts=0)

    @pytest.mark.parametrize("world_size", [2, 9])
    def test_a_world_that_cannot_be_cut(self, world_size):
        with pytest.raises(ValueError, match=f"2 x 2 does not divide {world_size} ranks"):
            resolve(AUTO, 2, 2, 1, world_size=world_size, n_experts=0)


def test_divisors():
    assert list(divisors(12)) == [1, 2, 3, 4, 6, 12]
