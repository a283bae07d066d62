"""Rules of `branches`: runs on one domain each, whose weights are merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deepseek_exp.config.enums import Do
from deepseek_exp.config.rules.values import path_problems
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.errors import Problem

MERGING = (Do.train, Do.sft, Do.grpo, Do.eval, Do.sample, Do.plan)


def branch_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield what is wrong with the branches of an experiment, apart from their checkpoints."""
    if not exp.branches:
        return
    if exp.do not in MERGING:
        rule = f"are not merged by do={exp.do.value}"
        yield Problem("branches", ", ".join(exp.branches), rule, "merge them by do=train first, and take its run")
    elif exp.init_from is None:
        rule = "come without the run that they all start from"
        yield Problem("branches", ", ".join(exp.branches), rule, "set init_from to that run")
    else:
        yield from domain_problems("branches", exp.branches, exp.model.moe.domains)
    for domain, run in exp.branches.items():
        yield from path_problems(f"branches.{domain}", run)


def domain_problems(key: str, branches: Mapping[str, str], domains: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each branch whose domain the model does not have.

    Args:
        key: of the branches.
        branches: domain -> its branch.
        domains: of the model.
    """
    for domain in [name for name in branches if name not in domains]:
        rule = f"is for a domain that the model does not have (model.moe.domains=[{', '.join(domains)}])"
        fix = f"use one of {', '.join(domains)}" if domains else "take a model with domains, such as v5_domain_moe"
        yield Problem(f"{key}.{domain}", branches[domain], rule, fix)
