"""Resume from a checkpoint: merge its configuration with the command line, and check that fixed keys are unchanged."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepseek_exp.checkpoint.saved_config import literal
from deepseek_exp.config.compose import base_tree, compose_tree, has_path, hydra_ready, leaves, select
from deepseek_exp.config.enums import Do, Order
from deepseek_exp.config.keys import SECTION_OF, schema_keys
from deepseek_exp.config.schema import DataConfig, ExperimentConfig, MixturePart
from deepseek_exp.errors import ConfigError, Problem

# Locations of data and files may differ: data are identified by digest when they are read.
PLACES = ("path", "valid_path", "tokenizer", "n_workers", "cache_dir")


def resume_problems(saved: ExperimentConfig, now: ExperimentConfig) -> list[Problem]:
    """Return a problem for each key that differs from the checkpoint and may not.

    The model and its adapters may never differ. When training continues, these may not differ either: the seed, the
    data section except for paths, the precision, the optimizer's class and arguments (learning rate, decay and clipping
    may change), and the batch size if the lanes of the segment memory depend on it.
    """
    fixed: dict[str, tuple[Any, Any]] = {}
    if now.do.is_training:
        fixed["seed"] = saved.seed, now.seed
        fixed["optim.optimizer"] = saved.optim.optimizer, now.optim.optimizer
        fixed["optim.lr_multipliers"] = saved.optim.lr_multipliers, now.optim.lr_multipliers
        batch = ("global_batch_seqs",) if now.data.order is Order.contiguous else ()
        ramp = ("batch_ramp_seqs", "batch_ramp_steps")  # the step that a position belongs to depends on it
        ramp += ("global_batch_seqs",) if saved.trainer.batch_ramp_seqs or now.trainer.batch_ramp_seqs else ()
        micro_batch = ("micro_batch_seqs",) if now.model.memory_len else ()
        for key in ("precision", *batch, *ramp, *micro_batch):
            fixed[f"trainer.{key}"] = getattr(saved.trainer, key), getattr(now.trainer, key)
    fixed |= section_leaves("model", saved.model, now.model)
    fixed |= section_leaves("lora", saved.lora, now.lora, ("init", "path"))
    if now.do.is_training:
        fixed |= section_leaves("data", _without_paths(saved.data), _without_paths(now.data), PLACES)
    fix = "leave {} out, or start a new run with resume=null"
    return [
        Problem(k, _plain(new), f"differs from the checkpoint's {_plain(old)}", fix.format(k))
        for k, (old, new) in fixed.items()
        if old != new
    ]


def differing(before: ExperimentConfig, now: ExperimentConfig, ignored: Sequence[str]) -> list[str]:
    """Return the keys whose values differ, except for ignored keys and sections."""
    before, now = (dataclasses.replace(exp, data=_without_paths(exp.data)) for exp in (before, now))
    return [
        key
        for f in dataclasses.fields(before)
        for key, (old, new) in _leaf_pairs(f.name, getattr(before, f.name), getattr(now, f.name))
        if old != new and not any(key == name or key.startswith(f"{name}.") for name in ignored)
    ]


def _leaf_pairs(name: str, old: Any, new: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if dataclasses.is_dataclass(old):
        yield from section_leaves(name, old, new).items()
    else:
        yield name, (old, new)


def _without_paths(data: DataConfig) -> DataConfig:
    """Return the data section with each part of its mixture replaced by its weight."""
    weights = {name: getattr(part, "weight", part) for name, part in data.mixture.items()}
    return dataclasses.replace(data, mixture=weights)


def section_leaves(name: str, old: Any, new: Any, skip: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Return the pairs of leaves of two sections of the same type, by full key."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(old):
        before, now = getattr(old, f.name), getattr(new, f.name)
        if f.name in skip:
            continue
        if dataclasses.is_dataclass(before):
            pairs |= section_leaves(f"{name}.{f.name}", before, now)
        else:
            pairs[f"{name}.{f.name}"] = before, now
    return pairs


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: vars(v) if isinstance(v, MixturePart) else v for k, v in value.items()}
    return value.value if isinstance(value, Enum) else value


# The part of a checkpoint's configuration that these verbs use. The rest comes from the command line and the defaults.
USED_BY = {
    Do.sample: ("model", "lora", "seed", "sample", "trainer.precision"),
    Do.export: ("model", "lora", "seed", "trainer.precision"),
}


# Keys that decide where output goes and what is started. They are not taken from somebody else's checkpoint.
OF_THE_MACHINE = ("tracking", "launch", "output_dir", "data.cache_dir")


OF_THE_COMMAND = ("do", "resume", "use_ema", "tracking.new_run")


def merge_saved(saved: dict[str, Any], overrides: Sequence[str], *, is_own: bool = True) -> DictConfig:
    """Merge the command line onto the configuration of a checkpoint.

    A leaf is requested if an override names it or selects its group's option, or if a recipe sets it. Every other leaf
    keeps its saved value, even if it was derived from a requested one. Requested values may refer to saved leaves. In a
    free mapping, such as the callbacks, an override changes only the entries that it names. A section or key that the
    checkpoint's version did not have takes its default, except for keys of the model, which must be present.

    Args:
        saved: the checkpoint's values. Interpolations in them are not evaluated.
        overrides: the command line's overrides.
        is_own: whether the checkpoint is in this command's output_dir. If not, `OF_THE_MACHINE` comes from the command.

    Returns:
        The merged tree under the schema. do=sample and do=export take only what they use from the checkpoint.

    Raises:
        ConfigError: an override cannot be used, or the saved tree does not fit this version's schema.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    named = [SECTION_OF.get(str(o.key_or_group), str(o.key_or_group)) for o in parsed]
    with hydra_ready():
        (merged, problems), default = compose_tree(overrides), OmegaConf.to_container(base_tree(()), resolve=False)
    if problems:
        raise ConfigError(*problems)
    now = OmegaConf.to_container(merged, resolve=False)
    fresh = OF_THE_COMMAND if is_own else OF_THE_COMMAND + OF_THE_MACHINE
    used = USED_BY.get(now["do"], ("",))
    try:
        _check_keys(saved)
        for path, value in leaves(now):
            kept = _within(path, used) and not _within(path, fresh)
            keep_default = not path.startswith("model.") and not has_path(saved, path)
            if _within(path, named) or ("recipes" in named and value != select(default, path)) or not kept:
                asked = value
            elif keep_default:
                asked = select(default, path)
            elif has_path(saved, path):
                asked = _changed(literal(select(saved, path)), value, path, named)
            else:
                asked = MISSING  # a key of the model, which is reported as having no value
            OmegaConf.update(merged, path, asked, merge=False, force_add=False)
    except OmegaConfBaseException as error:
        raise ConfigError(_unfit(str(error).splitlines()[0])) from error
    return merged


def saved_experiment(saved: dict[str, Any]) -> ExperimentConfig:
    """Return a checkpoint's configuration with the schema's types. It is not validated against this machine.

    Raises:
        ConfigError: it does not fit this version's schema.
    """
    tree = merge_saved(saved, [])
    try:
        return typing.cast(ExperimentConfig, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        raise ConfigError(_unfit(str(error).splitlines()[0])) from error


def _unfit(reason: str) -> Problem:
    return Problem("resume", "its configuration", f"does not fit this version ({reason})", "start a new run")


def _check_keys(saved: dict[str, Any]) -> None:
    """Raise an error for saved keys that the schema no longer has, or whose structure differs."""
    known = schema_keys()
    for path, _ in _flat_to(saved, set(known)):
        if path not in known:
            raise ConfigError(_unfit(f"Key '{path}' is not in it"))


def _flat_to(tree: dict[str, Any], leaves: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values at the paths in `leaves`, and every leaf outside of them."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in leaves:
            yield from _flat_to(value, leaves, f"{path}.")
        else:
            yield path, value


def _within(path: str, sections: Sequence[str]) -> bool:
    """Return whether a path is one of the keys or inside one of the sections; "" is the entire tree."""
    return any(not name or path == name or path.startswith(f"{name}.") for name in sections)


def is_of_the_machine(key: str) -> bool:
    """Return whether an override decides where output goes, what is started, or where options are found.

    True also for a command-line flag such as --config-dir.
    """
    return _within(key, (*OF_THE_MACHINE, "hydra")) or key.startswith(("hydra/", "-"))


def _changed(kept: Any, now: Any, path: str, named: Sequence[str]) -> Any:
    """Return a saved mapping with the entries replaced that overrides name individually."""
    entries = [name.removeprefix(f"{path}.").split(".") for name in named if name.startswith(f"{path}.")]
    for *parents, last in entries:
        source, target = now, kept
        for name in parents:
            source = source.get(name, {}) if isinstance(source, dict) else {}
            target = target.setdefault(name, {})
        if last in source:
            target[last] = source[last]
        else:  # deleted by an override such as ~optim.optimizer.fused
            target.pop(last, None)
    return kept
