"""Values that are derived from others in YAML, and what makes them and the schema known to Hydra."""

from __future__ import annotations

import os

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from deepseek_exp.config.schema import ROOT, ExperimentConfig


def lr_from_batch(base: float, batch: int) -> float:
    """Linear scaling of the learning rate with the batch: lr = base * batch / 256."""
    return base * batch / 256


def share(width: int, numerator: int, denominator: int) -> int:
    """Derive one width from another: width * numerator / denominator, down to a multiple of 8 and 8 at least."""
    return max(8, width * numerator // denominator // 8 * 8)


def at_most(limit: int, count: int, per: int) -> int:
    """Derive a count from another: one for each `per` of it, `limit` at most and 1 at least."""
    return max(1, min(limit, count // per))


def warmup(limit: int, max_steps: int) -> int:
    """Derive the steps of warm-up: `limit`, of a run so short that this would be more than half of it a tenth."""
    return limit if max_steps >= 2 * limit else max_steps // 10


def register() -> None:
    """Make the schema and the resolvers known to Hydra; may be called again."""
    ConfigStore.instance().store(name="schema", node=ExperimentConfig)
    OmegaConf.register_new_resolver("lr_from_batch", lr_from_batch, replace=True)
    OmegaConf.register_new_resolver("share", share, replace=True)
    OmegaConf.register_new_resolver("at_most", at_most, replace=True)
    # cached as `now` is: a launcher may run the jobs of a sweep in other processes, and they share one folder
    OmegaConf.register_new_resolver("pid", os.getpid, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("warmup", warmup, replace=True)
    OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)
