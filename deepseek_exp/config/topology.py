"""Which rank does what: degrees of parallelism, coordinates and groups, by arithmetic alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from deepseek_exp.config.schema import ClusterConfig, ExperimentConfig

AUTO = 0  # a degree that is worked out from the others


class Axis(StrEnum):
    """What the ranks of one group share out among themselves.

    Attributes:
        tp: the matrices of a layer.
        pp: the layers of the model.
        dp: the sequences of a step.
        ep: the experts of a layer; ep neighbours of dp.
        data: copies of one expert, dp / ep of them; DeepSpeed's data axis, over which ZeRO shards.
        model: DeepSpeed's model axis, ep * tp.
    """

    tp = "tp"
    pp = "pp"
    dp = "dp"
    ep = "ep"
    data = "data"
    model = "model"


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands: its place on the axes pp, dp and tp, and on ep and data, which dp is made of."""

    pp: int
    dp: int
    tp: int
    ep: int
    data: int


@dataclass(frozen=True)
class Degrees:
    """How many ways each axis is cut, all at least 1; ep divides dp.

    Expert parallelism takes no ranks of its own: the ep neighbours of a data-parallel group share the experts out. For
    DeepSpeed, which knows three axes, it is folded into the model axis: pipe = pp, data = dp / ep, model = ep * tp, and
    rank = (pipe * (dp / ep) + data) * ep * tp + e * tp + t. With the place on dp = data * ep + e, that is
    (pp * dp + dp's place) * tp + tp's place, whatever ep.
    """

    dp: int
    tp: int
    pp: int
    ep: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.dp * self.tp * self.pp

    @property
    def n_data(self) -> int:
        """Copies of each expert, and shards of ZeRO."""
        return self.dp // self.ep

    def coordinates(self, rank: int) -> Coordinates:
        """Give the place of a rank.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size}")
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        data, ep = divmod(dp, self.ep)
        return Coordinates(pp=pp, dp=dp, tp=tp, ep=ep, data=data)

    def rank(self, *, pp: int, dp: int, tp: int) -> int:
        """Give the rank at a place.

        Raises:
            ValueError: there is no such place.
        """
        if not (0 <= pp < self.pp and 0 <= dp < self.dp and 0 <= tp < self.tp):
            raise ValueError(f"pp={pp} dp={dp} tp={tp} is not within {self}")
        return (pp * self.dp + dp) * self.tp + tp

    def groups(self, axis: Axis) -> list[list[int]]:
        """List the groups of an axis; each rank is in one of them, at its place on the axis."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            at = self.coordinates(rank)
            same = {
                Axis.tp: (at.pp, at.dp),
                Axis.pp: (at.dp, at.tp),
                Axis.dp: (at.pp, at.tp),
                Axis.ep: (at.pp, at.data, at.tp),
                Axis.data: (at.pp, at.ep, at.tp),
                Axis.model: (at.pp, at.data),
            }[axis]
            found.setdefault(same, []).append(rank)
        return list(found.values())

    def span(self, axis: Axis) -> int:
        """Give the ranks from the first to the last of one group, both included."""
        stride = {Axis.pp: self.dp * self.tp, Axis.data: self.ep * self.tp, Axis.dp: self.tp, Axis.ep: self.tp}
        return (self.size(axis) - 1) * stride.get(axis, 1) + 1

    def size(self, axis: Axis) -> int:
        """Give the ranks of one group."""
        sizes = {Axis.tp: self.tp, Axis.pp: self.pp, Axis.dp: self.dp, Axis.ep: self.ep, Axis.data: self.n_data}
        return sizes.get(axis, self.ep * self.tp)


def resolve(dp: int, tp: int, pp: int, ep: int, *, world_size: int, n_experts: int) -> Degrees:
    """Work out the degrees that are AUTO.

    One of dp, tp and pp may be: it takes what the other two leave of the world. ep takes as many ways as the routed
    experts and dp can both be cut, gcd(dp, n_experts); 1 without experts.

    Args:
        dp: data-parallel degree, or AUTO; so are the next three.
        tp: tensor-parallel degree.
        pp: pipeline stages.
        ep: expert-parallel degree.
        world_size: ranks there are.
        n_experts: routed experts of a layer; 0: none.

    Raises:
        ValueError: two are AUTO, or the world cannot be cut like that.
    """
    fixed = [d for d in (dp, tp, pp) if d != AUTO]
    if len(fixed) < 2:
        raise ValueError("one of dp, tp and pp at most can follow from the others")
    rest, left = divmod(world_size, math.prod(fixed))
    if len(fixed) == 2 and (left or not rest):
        raise ValueError(f"{' x '.join(map(str, fixed))} does not divide {world_size} ranks")
    dp, tp, pp = (rest if d == AUTO else d for d in (dp, tp, pp))
    return Degrees(dp, tp, pp, (math.gcd(dp, n_experts) if n_experts else 1) if ep == AUTO else ep)


def divisors(number: int) -> list[int]:
    """List the whole numbers that divide one, in order, in time that grows with its square root."""
    small = [d for d in range(1, math.isqrt(max(0, number)) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def n_gpus(cluster: ClusterConfig) -> int:
    """Give the ranks that a cluster has room for."""
    return cluster.gpus_per_node * cluster.n_nodes


def degrees(exp: ExperimentConfig) -> Degrees:
    """Give the degrees of an experiment, with those that are auto worked out from its cluster.

    Raises:
        ValueError: they cannot be worked out; `layout_problems` has the words.
    """
    p = exp.parallel
    world, experts = n_gpus(exp.cluster), exp.model.moe.n_routed_experts
    return resolve(p.dp, p.tp, p.pp, p.ep, world_size=world, n_experts=experts)
