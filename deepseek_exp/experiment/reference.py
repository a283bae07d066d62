"""The reference policy of preference training: a run of the same model."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from deepseek_exp.checkpoint import manifest, saved_config
from deepseek_exp.config.schema import ModelConfig
from deepseek_exp.console import say
from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.experiment import init_from, resume


def with_reference(composed: DictConfig) -> DictConfig:
    """Return the tree with dpo.reference as the folder of a checkpoint, whose model is the same.

    Raises:
        CheckpointError: there is no such run.
        ConfigError: its model is another.
    """
    named = str(composed.dpo.reference)
    if init_from.is_release(named):
        return composed  # its model is compared when it is loaded
    checkpoint, passed_over = manifest.locate(named, Path(composed.output_dir), "dpo.reference")
    for sentence in passed_over:
        say(sentence)
    problem = other_model(named, resume.saved_experiment(saved_config.read(checkpoint)).model, composed)
    if problem is not None:
        raise ConfigError(problem)
    composed = composed.copy()
    composed.dpo.reference = saved_config.literal(str(checkpoint))
    return composed


def other_model(named: str, model: ModelConfig, composed: DictConfig) -> Problem | None:
    """Return a problem if the model of a reference is not the one that is trained.

    Args:
        named: the reference.
        model: its model section.
        composed: the tree of the training.
    """
    now = OmegaConf.to_object(composed.model)
    other = [key for key, (old, new) in resume.section_leaves("model", model, now).items() if old != new]
    if not other:
        return None
    rule = f"has another model than the one that is trained ({', '.join(other)})"
    return Problem("dpo.reference", named, rule, "name a run of the same model")
