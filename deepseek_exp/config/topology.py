"""Parallel degrees, rank coordinates and process groups, as pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from deepseek_exp.config.schema import ClusterConfig, ExperimentConfig

AUTO = 0  # a degree that is derived from the others


class Axis(StrEnum):
    """A mesh axis: what is sharded over the ranks of one group.

    Attributes:
        tp: the matrices of a layer.
        pp: the layers of the model.
        dp: the sequences of a step.
        ep: the experts of a layer; each group is ep neighbours on the dp axis.
        data: the dp / ep replicas of each expert; DeepSpeed's data axis, over which ZeRO shards.
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
    """Coordinates of a rank on the axes pp, dp and tp, and on ep and data, into which dp factors."""

    pp: int
    dp: int
    tp: int
    ep: int
    data: int


@dataclass(frozen=True)
class Degrees:
    """Parallel degree of each axis, at least 1; ep divides dp.

    Expert parallelism adds no ranks: the experts are sharded over ep neighbours of a data-parallel group. DeepSpeed has
    three axes, so ep is folded into its model axis: pipe = pp, data = dp / ep, model = ep * tp, and
    rank = (pipe * (dp / ep) + data) * ep * tp + e * tp + t. With the dp coordinate = data * ep + e, that equals
    (pp * dp + dp coordinate) * tp + tp coordinate, for every ep.
    """

    dp: int
    tp: int
    pp: int
    ep: int

    def __str__(self) -> str:
        """Return the degrees that multiply to the ranks, as in `dp 2 x tp 2 x pp 2`."""
        return f"dp {self.dp} x tp {self.tp} x pp {self.pp}"

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.dp * self.tp * self.pp

    @property
    def n_data(self) -> int:
        """Number of replicas of each expert, which is also the number of ZeRO shards."""
        return self.dp // self.ep

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of a rank.

        Raises:
            ValueError: the rank does not exist.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a world of {self.world_size}")
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        data, ep = divmod(dp, self.ep)
        return Coordinates(pp=pp, dp=dp, tp=tp, ep=ep, data=data)

    def rank(self, *, pp: int, dp: int, tp: int) -> int:
        """Return the rank at the given coordinates.

        Raises:
            ValueError: the coordinates are out of range.
        """
        if not (0 <= pp < self.pp and 0 <= dp < self.dp and 0 <= tp < self.tp):
            raise ValueError(f"pp={pp} dp={dp} tp={tp} is not within {self}")
        return (pp * self.dp + dp) * self.tp + tp

    def groups(self, axis: Axis) -> list[list[int]]:
        """Return the groups of an axis. Each rank is in exactly one, at the index of its coordinate on the axis."""
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
        """Return the number of ranks from the first to the last of one group, inclusive."""
        stride = {Axis.pp: self.dp * self.tp, Axis.data: self.ep * self.tp, Axis.dp: self.tp, Axis.ep: self.tp}
        return (self.size(axis) - 1) * stride.get(axis, 1) + 1

    def size(self, axis: Axis) -> int:
        """Return the number of ranks in one group."""
        sizes = {Axis.tp: self.tp, Axis.pp: self.pp, Axis.dp: self.dp, Axis.ep: self.ep, Axis.data: self.n_data}
        return sizes.get(axis, self.ep * self.tp)


def resolve(dp: int, tp: int, pp: int, ep: int, *, world_size: int, n_experts: int) -> Degrees:
    """Return the degrees, with those that are AUTO derived from the others.

    At most one of dp, tp and pp may be AUTO: it becomes world_size divided by the other two. An AUTO ep becomes
    gcd(dp, n_experts), or 1 without experts.

    Args:
        dp: data-parallel degree, or AUTO.
        tp: tensor-parallel degree, or AUTO.
        pp: number of pipeline stages, or AUTO.
        ep: expert-parallel degree, or AUTO.
        world_size: number of ranks.
        n_experts: number of routed experts per layer; 0 if none.

    Raises:
        ValueError: two are AUTO, or the degrees do not divide the world size.
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
    """Return the divisors of a number in ascending order, in O(sqrt(number)) time."""
    small = [d for d in range(1, math.isqrt(max(0, number)) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def n_gpus(cluster: ClusterConfig) -> int:
    """Return the number of GPUs (ranks) of a cluster."""
    return cluster.gpus_per_node * cluster.n_nodes


def degrees(exp: ExperimentConfig) -> Degrees:
    """Return the degrees of an experiment, with automatic ones derived from its cluster.

    Raises:
        ValueError: they cannot be derived; `layout_problems` reports why.
    """
    p = exp.parallel
    world, experts = n_gpus(exp.cluster), exp.model.moe.n_routed_experts
    return resolve(p.dp, p.tp, p.pp, p.ep, world_size=world, n_experts=experts)
