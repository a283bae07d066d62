"""OmegaConf resolvers for derived values in YAML, and registration of them and the schema with Hydra."""

from __future__ import annotations

import os

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from deepseek_exp.config.schema import ROOT, ExperimentConfig


def lr_from_batch(base: float, batch: int) -> float:
    """Return the learning rate scaled linearly with the batch: lr = base * batch / 256."""
    return base * batch / 256


def share(width: int, numerator: int, denominator: int) -> int:
    """Return width * numerator / denominator, rounded down to a multiple of 8 and at least 8."""
    return max(8, width * numerator // denominator // 8 * 8)


def at_most(limit: int, count: int, per: int) -> int:
    """Return one for each `per` of the count, at most `limit` and at least 1."""
    return max(1, min(limit, count // per))


def warmup(limit: int, max_steps: int) -> int:
    """Return the number of warm-up steps: `limit`, or a tenth of max_steps if `limit` is more than half of it."""
    return limit if max_steps >= 2 * limit else max_steps // 10


def register() -> None:
    """Register the schema and the resolvers with Hydra. May be called more than once."""
    ConfigStore.instance().store(name="schema", node=ExperimentConfig)
    OmegaConf.register_new_resolver("lr_from_batch", lr_from_batch, replace=True)
    OmegaConf.register_new_resolver("share", share, replace=True)
    OmegaConf.register_new_resolver("at_most", at_most, replace=True)
    # Cached, as `now` is: a launcher may run the jobs of a sweep in other processes, which share one folder.
    OmegaConf.register_new_resolver("pid", os.getpid, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("warmup", warmup, replace=True)
    OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)
