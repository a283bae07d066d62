"""Compose as run.py does, with one Hydra per process: what command lines have in common is read and composed once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from deepseek_exp import config
from deepseek_exp.config import ExperimentConfig, compose
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.rules import validate
from deepseek_exp.errors import ConfigError
from deepseek_exp.experiment import chain, command_line

MACHINE = Machine(interprets_triton=True)


@functools.cache
def _hydra() -> Hydra:
    config.register()
    with compose.hydra_ready():
        return GlobalHydra.instance().hydra


@contextmanager
def shared_hydra() -> Iterator[None]:
    """Compose with the Hydra that all tests of the process share. It searches the project's folders only."""
    running = GlobalHydra.instance()
    before, running.hydra = running.hydra, _hydra()
    try:
        yield
    finally:
        running.hydra = before


@contextmanager
def as_in_a_sweep() -> Iterator[None]:
    """Check command lines as the jobs of a sweep, which share the trees that their groups compose.

    Hydra composes a single run itself, which takes most of the time of its check.
    """
    with shared_hydra(), pytest.MonkeyPatch.context() as patch:
        for module in (command_line, chain):
            patch.setattr(module, "compose_run", lambda overrides: None)
        yield


def tree(*overrides: str) -> DictConfig:
    """Return the tree of overrides that Hydra accepts, as the jobs of a sweep are composed."""
    with shared_hydra():
        cfg, problems = compose.compose_tree(overrides)
    if problems:
        raise ConfigError(*problems)
    return cfg


@functools.cache
def _structured(*overrides: str) -> ExperimentConfig:
    exp, problems = compose.structured(tree(*overrides))
    if exp is None:
        raise ConfigError(*problems)
    return exp


def composed(*overrides: str) -> ExperimentConfig:
    """Compose and check; the same overrides are composed once per process."""
    exp = copy.deepcopy(_structured(*overrides))
    problems = validate.problems(exp, MACHINE)
    if problems:
        raise ConfigError(*problems)
    return exp
