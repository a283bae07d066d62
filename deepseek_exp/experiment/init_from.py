"""Start from existing weights: one of our runs, or a Hugging Face checkpoint."""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from deepseek_exp import huggingface
from deepseek_exp.checkpoint import saved_config
from deepseek_exp.checkpoint.saved_config import literal
from deepseek_exp.config.compose import base_tree, hydra_ready, leaves, select
from deepseek_exp.config.enums import Do
from deepseek_exp.config.explain import parse_one
from deepseek_exp.config.keys import SECTION_OF
from deepseek_exp.disk import expand
from deepseek_exp.errors import Problem, UserError
from deepseek_exp.experiment.resume import saved_experiment
from deepseek_exp.huggingface.files import CONFIG, TOKENIZER, tokenizer_file


def is_release(path: str) -> bool:
    """Return whether a path is the folder of a Hugging Face checkpoint, judged by its config.json."""
    return (expand(path) / CONFIG).is_file()


def names_a_run(init_from: str) -> bool:
    """Return whether `init_from` names one of our runs: `last`, a run id prefix, or a folder without config.json."""
    if init_from == "last" or re.fullmatch("[0-9a-f]{4,32}", init_from):
        return True
    return expand(init_from).is_dir() and not is_release(init_from)


def start_from(
    cfg: DictConfig, overrides: Sequence[str], checkpoint: Path | None = None
) -> tuple[DictConfig, list[Problem]]:
    """Return a composed tree with the model section and tokenizer of `init_from`.

    Args:
        cfg: the composed tree, with init_from.
        overrides: the command line's overrides. The only model keys they may name are `FREE`.
        checkpoint: checkpoint of the run that init_from names. None if it names a Hugging Face folder.

    Returns:
        The tree under the schema, and the problems. If there are any, the tree is unchanged.
    """
    folder = Path(cfg.init_from) if checkpoint is None else checkpoint
    fix = "leave one of the two out"
    problems = []
    if cfg.resume is not None:
        rule = f"cannot be combined with resume={cfg.resume}, whose checkpoint has its own weights and model"
        problems.append(Problem("init_from", cfg.init_from, rule, fix))
    if cfg.do is Do.export:
        rule = "is not written by do=export, which takes a checkpoint of a run"
        problems.append(Problem("init_from", cfg.init_from, rule, "set resume=<checkpoint> instead"))
    problems += _model_overrides(cfg, overrides)
    try:
        model = huggingface.read_release(folder).model if checkpoint is None else _saved_model(folder)
    except UserError as error:
        problems += error.problems
    own = tokenizer_file(folder)
    if cfg.data.tokenizer is None and not own.is_file() and is_release(cfg.init_from):
        fix = "put the model's own there (AutoTokenizer's save_pretrained writes one), or name one by data.tokenizer"
        problems.append(Problem("init_from", cfg.init_from, f"has no {TOKENIZER}", fix))
    other = huggingface.other_tokenizer(own, cfg.data.tokenizer) if cfg.data.tokenizer else None
    if other is not None:
        problems.append(other)
    if problems:
        return cfg, problems
    asked = {path for path, _ in _set_by_hand(cfg, overrides)}
    cfg = copy.deepcopy(cfg)
    cfg.init_from = literal(str(folder))
    for path, value in _flat(model, "model."):
        if path not in asked:
            OmegaConf.update(cfg, path, literal(value), merge=False)
    if cfg.data.tokenizer is None:
        cfg.data.tokenizer = literal(str(own))
    return cfg, []


def _saved_model(checkpoint: Path) -> dict[str, Any]:
    """Return the model section of a run's checkpoint, with every key and the schema's types."""
    exp = saved_experiment(saved_config.read(checkpoint))
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(exp.model)))


# Model keys that may be set with existing weights, because inference does not depend on them.
FREE = {f"model.{name}" for name in ("version", "max_seq_len", "mtp_loss_weight", "init_std")} | {
    f"model.moe.{name}"
    for name in ("capacity_factor", "balance", "bias_update_rate", "aux_loss_weight", "sequence_loss_weight")
}


def _model_overrides(cfg: DictConfig, overrides: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each model key that is set in addition to `init_from`."""
    source = "config.json" if is_release(cfg.init_from) else "checkpoint"
    rule = f"cannot be used with init_from={cfg.init_from}, whose {source} defines the model"
    groups = [o for o in _parsed(overrides) if SECTION_OF.get(str(o.key_or_group), str(o.key_or_group)) == "model"]
    for o in groups:
        yield Problem(str(o.key_or_group), o.value(), rule, f"leave {o.key_or_group} out")
    if not groups:
        for path, value in _set_by_hand(cfg, overrides):
            if path not in FREE:
                yield Problem(path, value, rule, f"leave {path} out")


def _set_by_hand(cfg: DictConfig, overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the model's leaves that the command line or a recipe sets, with their values."""
    named = [str(o.key_or_group) for o in _parsed(overrides)]
    with hydra_ready():
        default = OmegaConf.to_container(base_tree(()), resolve=False)
    now = OmegaConf.to_container(cfg, resolve=False)
    for path, value in leaves(now):
        asked = any(path == n or path.startswith(n + ".") for n in named)
        if path.startswith("model.") and (asked or value != select(default, path)):
            yield path, value.value if isinstance(value, Enum) else value


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Return the parsed overrides, skipping those that cannot be parsed."""
    found = []
    for override in overrides:
        with suppress(OverrideParseException):
            found.append(parse_one(override))
    return found


def _flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
