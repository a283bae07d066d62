"""The process groups of a layout, and the collectives over all ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_exp.config.topology import Axis, Coordinates, Degrees
from deepseek_exp.launch.worker import DATA_TIMEOUT

# All ranks reach every other collective within minutes, including a first compilation and a checkpoint. A rank that
# hangs without dying stalls the job for at most this long.
TIMEOUT = timedelta(minutes=30)
KV, ENDS = "kv", "ends"


class Groups:
    """This rank's place in a layout and its groups.

    Attributes:
        degrees: of the layout.
        at: this rank's coordinates.
        rank: of this process.
        device: the device of this rank.
        axis: group of each axis that this rank is in; None if the axis has one rank.
        sums: groups over which gradients are summed: axes; KV, the ranks with the same key and value heads; ENDS, the
            first and the last stage, which may have the same table.
    """

    def __init__(self, degrees: Degrees, device: torch.device, n_kv_heads: int) -> None:
        """Create the groups; collective over all ranks, after `connect`.

        Args:
            degrees: of the layout.
            device: the device of this rank.
            n_kv_heads: of the model.
        """
        self.degrees, self.device, self.rank = degrees, device, dist.get_rank()
        self.at: Coordinates = degrees.coordinates(self.rank)
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._waiting = dist.new_group(backend="gloo", timeout=DATA_TIMEOUT)
        self.axis: dict[Axis, Any] = {axis: self._mine(degrees.groups(axis)) for axis in Axis}
        ends = [[ranks[0], ranks[-1]] for ranks in degrees.groups(Axis.pp)] if degrees.pp > 1 else []
        n_same = max(1, degrees.tp // n_kv_heads)  # tensor ranks that hold the same key and value heads
        kv = [g[i : i + n_same] for g in degrees.groups(Axis.tp) for i in range(0, len(g), n_same)]
        self.sums = {
            KV: self._mine(kv),
            Axis.tp.value: self.axis[Axis.tp],
            Axis.ep.value: self.axis[Axis.ep],
            ENDS: self._mine(ends),
        }

    @property
    def is_first(self) -> bool:
        """Return whether this rank has the first stage."""
        return self.at.pp == 0

    @property
    def is_last(self) -> bool:
        """Return whether this rank has the last stage."""
        return self.at.pp == self.degrees.pp - 1

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's losses are counted: of the ranks of the last stage that compute the same ones, one is."""
        return self.is_last and self.at.tp == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.control)

    def wait_for_data(self) -> None:
        """Wait for all ranks while some prepare the data, with a long timeout."""
        dist.barrier(group=self._waiting)

    def largest(self, value: int) -> int:
        """Return the maximum of all ranks' values."""
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return int(found)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks."""
        found: list[Any] = [None] * self.degrees.world_size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over all ranks, in place, on this rank's device."""
        dist.all_reduce(values)
        return values

    def _mine(self, all_ranks: list[list[int]]) -> Any:
        mine = None
        for ranks in all_ranks:
            if len(ranks) > 1:
                group = dist.new_group(ranks, timeout=TIMEOUT)
                mine = group if self.rank in ranks else mine
        return mine


def connect(device: torch.device) -> None:
    """Join the other ranks of the job, as described by torchrun's environment variables."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None, timeout=TIMEOUT)


def disconnect() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """Return this process's index on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))
