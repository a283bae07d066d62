"""Check the entire command line before anything expensive starts."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from deepseek_exp.config.compose import (
    check_tree,
    compose_run,
    compose_tree,
    config_loader,
    hydra_ready,
    override_key,
    section_problems,
    structured,
    usable,
)
from deepseek_exp.config.enums import Do
from deepseek_exp.config.explain import parse_one
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.rules import hydra_section
from deepseek_exp.config.rules.chain import unchained_problems
from deepseek_exp.config.rules.chat import unread_chat_problems
from deepseek_exp.config.rules.model import unread_problems
from deepseek_exp.config.rules.optim import unread_optim_problems
from deepseek_exp.config.rules.values import text_problems, untracked_problems
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.experiment.chain import Stage, compose_stages
from deepseek_exp.experiment.init_from import names_a_run, start_from


@dataclass(frozen=True)
class Composed:
    """A job as its command line composes it, checked as far as that goes without a checkpoint.

    Attributes:
        tree: the tree that Hydra composes; with `init_from=<Hugging Face checkpoint>`, that model's section.
        exp: the tree as dataclasses, validated; None if the job depends on a checkpoint of a run. Of a chain, only what
            its stages share is validated.
        hydra: the section `hydra` of the tree; None in a sweep, whose jobs Hydra composes.
        config_dir: where the user's options are, as in --config-dir.
        stages: of a chain, each after the one it starts from; empty if the command line is no chain.
    """

    tree: DictConfig
    exp: ExperimentConfig | None
    hydra: DictConfig | None = None
    config_dir: str | None = None
    stages: tuple[Stage, ...] = ()


def with_text_run_ids(argv: Sequence[str]) -> list[str]:
    """Return the arguments with a run id quoted if Hydra could read it as a number, as in resume=12e4."""
    return [re.sub(r"^resume=([0-9a-f]+)$", r"resume='\1'", word) for word in argv]


def check_command_line(argv: Sequence[str], machine: Machine | None = None) -> Composed | None:
    """Compose and validate every job of a command line.

    Args:
        argv: the arguments after the program's name, in Hydra's syntax. A sweep is expanded into its jobs.
        machine: where the jobs are to run; None: this machine.

    Returns:
        The job, if the command line asks for a single one to be run; None for a sweep, and for what Hydra prints.

    Raises:
        ConfigError: with the problems of all jobs, each reported once.
    """
    _check_encoding(argv)
    machine = machine or Machine.here()
    args = get_args_parser().parse_args(list(argv))
    flaws = list(hydra_section.flag_problems(args))
    if flaws:
        raise ConfigError(*flaws)
    if args.shell_completion or ((args.help or args.hydra_help) and not args.overrides):
        return None
    with hydra_ready(args.config_dir):
        jobs, found = _jobs(args.overrides) if args.multirun else ([args.overrides], [])
        problems = {str(p): p for p in found}
        for overrides in jobs:
            composed, found = _composed(overrides, machine, in_sweep=args.multirun)
            problems |= {str(p): p for p in found}
    resumes = [o.lstrip("+") for o in args.overrides if o.lstrip("+").startswith("resume=")]
    if args.multirun and any(o != "resume=null" for o in resumes):
        fix = "resume one run at a time, without -m"
        problems["resume"] = Problem("resume", "a sweep", "cannot be combined with -m", fix)
    if problems:
        raise ConfigError(*problems.values())
    runs = not (args.multirun or args.help or args.hydra_help or args.cfg or args.info)
    return dataclasses.replace(composed, config_dir=args.config_dir) if runs and composed is not None else None


def prints_configuration(argv: Sequence[str]) -> bool:
    """Return whether a command line makes Hydra print the configuration, which users may save and share."""
    args = get_args_parser().parse_args(list(argv))
    return bool(args.cfg or args.info)


def _check_encoding(argv: Sequence[str]) -> None:
    """Raise ConfigError for arguments with undecodable bytes, which Python represents as surrogates."""
    encoding = sys.getfilesystemencoding()
    problems = []
    for word in argv:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            key, _, value = word.partition("=")
            rule = f"holds bytes that are not text in the locale's encoding ({encoding})"
            fix = "type it in that encoding" if encoding == "utf-8" else "use a UTF-8 locale: export LC_ALL=C.UTF-8"
            problems.append(Problem(_escaped(key), _escaped(value), rule, fix))
    if problems:
        raise ConfigError(*problems)


def _escaped(text: str) -> str:
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _composed(overrides: Sequence[str], machine: Machine, *, in_sweep: bool) -> tuple[Composed | None, list[Problem]]:
    """Compose and validate one job; return it with all its problems, None if it cannot be composed."""
    good, found = usable(overrides)
    whole = None if in_sweep else compose_run(good)
    if whole is not None:
        cfg, section, more = whole
    else:
        (cfg, more), section = compose_tree(good), None
    found += more
    exp, flaws = structured(cfg)
    if exp is None:
        return None, found + flaws
    if exp.chain.stages:
        stages, more = compose_stages(cfg, good, machine)
        if in_sweep:
            fix = "run one chain at a time, without -m"
            more = [Problem("chain.stages", "a chain", "cannot be combined with -m", fix)]
        return Composed(cfg, exp, section, stages=tuple(stages)), found + more
    flaws = [p for p in text_problems(exp) if p.key == "init_from"]
    if flaws:
        return None, found + flaws
    release = cfg.get("init_from") is not None and not names_a_run(cfg.init_from)
    if release:
        cfg, more = start_from(cfg, overrides)
        found += more
    # Values from a checkpoint are checked once the checkpoint's own configuration is known.
    found += unchained_problems(exp, {override_key(o) for o in good})
    of_a_run = takes_checkpoint(cfg) or (cfg.get("init_from") is not None and not release)
    if not of_a_run:
        named = {override_key(o) for o in good}
        found += [*unread_problems(exp, named), *unread_chat_problems(exp, named), *untracked_problems(exp, named)]
        found += unread_optim_problems(exp, named)
    checked, more = check_tree(cfg, found, None if of_a_run else machine, None if release else exp)
    return Composed(cfg, None if of_a_run else checked, section), found + more


def takes_checkpoint(cfg: DictConfig) -> bool:
    """Return whether a composed tree is to be merged onto that of a checkpoint."""
    if cfg.get("do") == Do.verify:  # it starts from scratch
        return False
    without = [do for do in Do if do.is_training or do is Do.plan]
    from_scratch = cfg.get("do") in without or cfg.get("init_from") is not None
    return cfg.get("resume") is not None or not from_scratch


def _jobs(overrides: list[str]) -> tuple[list[list[str]], list[Problem]]:
    """Expand the overrides of a sweep as Hydra's basic sweeper does; also return the problems if it cannot.

    Other sweepers choose their own values, so only the overrides without sweeps are checked, as one job.
    """
    good, problems = usable(overrides)
    try:
        master = GlobalHydra.instance().hydra.compose_config("config", good, RunMode.MULTIRUN, from_shell=False)
    except Exception:
        return [_without_sweeps(good)], problems  # reported by compose_tree
    problems += section_problems(master, good)
    if problems:
        return [_without_sweeps(good)], problems
    if not master.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return [_without_sweeps(good)], []
    params = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
    swept, problems = usable([*params, *good])
    parsed = OverridesParser.create(config_loader()).parse_overrides(swept)
    problems += hydra_section.sweep_problems(parsed)
    if problems:
        return [_without_sweeps(good)], problems
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch], []


def _without_sweeps(overrides: list[str]) -> list[str]:
    return [o for o in overrides if not parse_one(o).is_sweep_override()]
