"""Find the checkpoints of branches, and check that they can be merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deepseek_exp.checkpoint import manifest, saved_config
from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.experiment.resume import saved_experiment


def located_branches(branches: Mapping[str, str], start: Path, output_dir: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the newest whole checkpoint of each branch, and a sentence for each damaged one that was skipped.

    Args:
        branches: domain -> run, as in resume.
        start: checkpoint that all of them have to start from; it can be a branch itself.
        output_dir: the folder of the runs.

    Raises:
        CheckpointError: a branch has no whole checkpoint.
        ConfigError: one starts from other weights, or balances its experts in another way.
    """
    found, passed_over, problems = dict[str, Path](), list[str](), list[Problem]()
    digest = manifest.digest(start)
    balance = saved_experiment(saved_config.read(start)).model.moe.balance
    for domain, run in branches.items():
        key = f"branches.{domain}"
        folder, skipped = manifest.locate(run, output_dir, key)
        found[domain] = folder
        passed_over += skipped
        if digest not in (manifest.digest(folder), manifest.read_manifest(folder).lineage.inputs.get("start")):
            rule = f"does not start from the weights of init_from={start}, and only branches of one model can be merged"
            problems.append(Problem(key, run, rule, f"train the branch with init_from={start}"))
            continue
        own = saved_experiment(saved_config.read(folder)).model.moe.balance
        if own is not balance:
            rule = f"has model.moe.balance={own.value}, and the model that it starts from {balance.value}"
            problems.append(Problem(key, run, rule, f"train the branch with model.moe.balance={balance.value}"))
    if problems:
        raise ConfigError(*problems)
    return found, passed_over
