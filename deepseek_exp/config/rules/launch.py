"""Rules of the section `launch`, and of the ranks that there is room for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepseek_exp.config.enums import Device, Do, Launcher
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.rules.parallel import IN_ONE_PROCESS, too_many
from deepseek_exp.config.schema import ExperimentConfig, LaunchConfig
from deepseek_exp.config.topology import degrees, divisors
from deepseek_exp.errors import Problem


def launch_problems(exp: ExperimentConfig, machine: Machine) -> Iterator[Problem]:
    """Find what keeps the ranks from being started, where ranks are."""
    if exp.do is Do.plan or exp.do in IN_ONE_PROCESS:
        return
    yield from _unread_launch_keys(exp.launch)
    yield from _unprintable_words(exp.launch)
    if exp.launch.submit and not machine.has_sbatch:
        fix = "set launch.submit=false and submit the script where Slurm is, or put sbatch into PATH"
        yield Problem("launch.submit", True, "needs sbatch, which is not in PATH", fix)
    try:
        layout = degrees(exp)
    except ValueError:
        return  # told by layout_problems
    if exp.launch.launcher is Launcher.local:
        n_gpus = 0 if exp.device is Device.cpu else machine.n_gpus
        if 0 < n_gpus < layout.world_size:
            fix = f"lower parallel.dp, parallel.tp or parallel.pp to {n_gpus} ranks or less, or set device=cpu"
            yield too_many(layout, f"this machine has {n_gpus} GPU{'s' * (n_gpus > 1)}", fix)
        return
    yield from _nodes(exp.launch, layout.world_size)


def _unread_launch_keys(launch: LaunchConfig) -> Iterator[Problem]:
    for name, (off, readers) in LAUNCH_KEYS.items():
        value = getattr(launch, name)
        if value != off and launch.launcher not in readers:
            rule = f"is not read by launch.launcher='{launch.launcher.value}'"
            fix = f"add launch={' or launch='.join(readers)}, or leave launch.{name} out"
            yield Problem(f"launch.{name}", value, rule, fix)


def _unprintable_words(launch: LaunchConfig) -> Iterator[Problem]:
    """Refuse words that would begin another line in a script, or that a terminal obeys."""
    for name in ("master_addr", "socket_ifname", "account", "partition", "time_limit"):
        value = getattr(launch, name)
        if value is not None and not value.isprintable():
            rule = "has control characters or line breaks, which a script or a terminal would obey"
            yield Problem(f"launch.{name}", value, rule, f"write launch.{name} without them")


NODES = (Launcher.torchrun, Launcher.slurm)


# what each key is when it says nothing, and who reads it
LAUNCH_KEYS: dict[str, tuple[Any, tuple[Launcher, ...]]] = {
    "n_nodes": (1, NODES),
    "ranks_per_node": (0, NODES),
    "master_addr": (None, (Launcher.torchrun,)),
    "account": (None, (Launcher.slurm,)),
    "partition": (None, (Launcher.slurm,)),
    "time_limit": (None, (Launcher.slurm,)),
    "submit": (False, (Launcher.slurm,)),
}


def _nodes(launch: LaunchConfig, n_ranks: int) -> Iterator[Problem]:
    n, each = launch.n_nodes, launch.ranks_per_node
    if n < 1 or each < 0:
        return  # told by the ranges
    if n_ranks % n:
        rule, fix = f"does not share {n_ranks} ranks evenly", "use one of " + ", ".join(map(str, divisors(n_ranks)))
        yield Problem("launch.n_nodes", n, rule, fix)
    elif each not in (0, n_ranks // n):
        rule = f"and launch.n_nodes={n} make {each * n} ranks, and parallel asks for {n_ranks}"
        yield Problem("launch.ranks_per_node", each, rule, f"use launch.ranks_per_node={n_ranks // n}, or 0")
