"""Compose the configuration tree and word everything that is wrong with it, before anything expensive starts."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import hydra.version
from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from deepseek_exp import huggingface, hydra_rules, saved_config, validate
from deepseek_exp.config import ROOT, Do, ExperimentConfig
from deepseek_exp.disk import expand
from deepseek_exp.errors import ConfigError, Problem, UserError
from deepseek_exp.explain import file_words, meant, override_words, parse_one, unparsed
from deepseek_exp.huggingface.files import CONFIG, TOKENIZER
from deepseek_exp.model_rules import unread_problems
from deepseek_exp.saved_config import literal
from deepseek_exp.schema import SECTION_OF, is_enum, is_mapping, schema_keys
from deepseek_exp.value_rules import text_problems

CONF = str(ROOT / "conf")


def check_command_line(argv: Sequence[str]) -> None:
    """Compose and validate every job that a command line asks for.

    Args:
        argv: the arguments after the program's name, as Hydra takes them; a sweep is expanded into its jobs.

    Raises:
        ConfigError: with all problems of all jobs, each reported once.
    """
    _check_encoding(argv)
    args = get_args_parser().parse_args(list(argv))
    flaws = list(hydra_rules.flag_problems(args))
    if flaws:
        raise ConfigError(*flaws)
    if args.shell_completion or ((args.help or args.hydra_help) and not args.overrides):
        return
    with _hydra(args.config_dir):
        jobs, found = _jobs(args.overrides) if args.multirun else ([args.overrides], [])
        problems = {str(p): p for p in found}
        for overrides in jobs:
            problems |= {str(p): p for p in _job_problems(overrides)}
    resumes = [o.lstrip("+") for o in args.overrides if o.lstrip("+").startswith("resume=")]
    if args.multirun and any(o != "resume=null" for o in resumes):
        fix = "resume one run at a time, without -m"
        problems["resume"] = Problem("resume", "a sweep", "cannot be combined with -m", fix)
    if problems:
        raise ConfigError(*problems.values())


def prints_configuration(argv: Sequence[str]) -> bool:
    """Return whether a command line asks Hydra to print the configuration, which people keep in files and share."""
    args = get_args_parser().parse_args(list(argv))
    return bool(args.cfg or args.info)


def _check_encoding(argv: Sequence[str]) -> None:
    """Refuse words that are no text: Python keeps bytes that the locale's encoding lacks as surrogates."""
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


def _job_problems(overrides: Sequence[str]) -> list[Problem]:
    """Find everything that is wrong with one job."""
    good, found = _usable(overrides)
    cfg, more = _compose_all(good)
    found += more
    flaws = _structure_problems(cfg)
    if flaws:
        return found + flaws
    exp = typing.cast(ExperimentConfig, OmegaConf.to_object(cfg))
    flaws = [p for p in text_problems(exp) if p.key == "init_from"]
    if flaws:
        return found + flaws
    release = cfg.get("init_from") is not None and not names_a_run(cfg.init_from)
    if release:
        cfg, more = start_from(cfg, overrides)
        found += more
    # what is of a checkpoint is checked once the checkpoint's own configuration is known
    of_a_run = takes_checkpoint(cfg) or (cfg.get("init_from") is not None and not release)
    if not of_a_run:
        found += unread_problems(exp, {_path(o) for o in good})
    return found + _check(cfg, found, rules=not of_a_run)


def takes_checkpoint(cfg: DictConfig) -> bool:
    """Say whether a composed tree is to be laid over that of a checkpoint."""
    if cfg.get("do") == Do.verify:  # which starts anew
        return False
    from_scratch = cfg.get("do") in (Do.train, Do.plan) or cfg.get("init_from") is not None
    return cfg.get("resume") is not None or not from_scratch


def to_experiment(cfg: DictConfig) -> ExperimentConfig:
    """Turn a composed tree into dataclasses, checked.

    Raises:
        ConfigError: with every rule that the tree breaks.
    """
    problems = _check(cfg, [])
    if problems:
        raise ConfigError(*problems)
    return typing.cast(ExperimentConfig, OmegaConf.to_object(cfg))


# what of a checkpoint's configuration these verbs use; the rest is the command line's, over the defaults
USED_BY = {
    Do.sample: ("model", "seed", "sample", "trainer.precision"),
    Do.export: ("model", "seed", "trainer.precision"),
}
# what says where things go and what is started, which is not taken from a checkpoint of somebody else
OF_THE_MACHINE = ("tracking", "launch", "output_dir", "data.cache_dir")
OF_THE_COMMAND = ("do", "resume", "tracking.new_run")


def merge_saved(saved: dict[str, Any], overrides: Sequence[str], *, is_own: bool = True) -> DictConfig:
    """Return the configuration of a checkpoint with what the command line asks for on top of it.

    A leaf is asked for if an override names it or selects its group's option, or if a recipe sets it. Every other leaf
    keeps its saved value, also if it was derived from one that is asked for; what is asked for may refer to saved
    leaves. Of a free mapping, such as the callbacks, an override changes the entries that it names. A section or a key
    that the checkpoint's version did not have has its default, except for keys of the model, which must be there.

    Args:
        saved: the checkpoint's values; no interpolation in them is evaluated.
        overrides: the command line's overrides.
        is_own: the checkpoint lies in this command's output_dir; if not, `OF_THE_MACHINE` is taken from the command.

    Returns:
        The merged tree under the schema. do=sample and do=export take from the checkpoint what they use, no more.

    Raises:
        ConfigError: the saved tree does not fit this version's schema.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    named = [SECTION_OF.get(str(o.key_or_group), str(o.key_or_group)) for o in parsed]
    with _hydra():
        merged, default = compose("config", list(overrides)), OmegaConf.to_container(compose("config"), resolve=False)
    now = OmegaConf.to_container(merged, resolve=False)
    fresh = OF_THE_COMMAND if is_own else OF_THE_COMMAND + OF_THE_MACHINE
    used = USED_BY.get(now["do"], ("",))
    try:
        _check_keys(saved)
        for path, value in _leaves(now):
            kept = _within(path, used) and not _within(path, fresh)
            keep_default = not path.startswith("model.") and not _has(saved, path)
            if _within(path, named) or ("recipes" in named and value != _select(default, path)) or not kept:
                asked = value
            elif keep_default:
                asked = _select(default, path)
            elif _has(saved, path):
                asked = _changed(literal(_select(saved, path)), value, path, named)
            else:
                asked = MISSING  # a key of the model, which is reported as one without a value
            OmegaConf.update(merged, path, asked, merge=False, force_add=False)
    except OmegaConfBaseException as error:
        raise ConfigError(_unfit(str(error).splitlines()[0])) from error
    return typing.cast(DictConfig, merged)


def saved_experiment(saved: dict[str, Any]) -> ExperimentConfig:
    """Return a checkpoint's configuration as it is: of the right types, and not checked by any rule of this machine.

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
    """Refuse saved values that today's schema has no key for, or that have another shape."""
    known = schema_keys()
    for path, _ in _flat_to(saved, set(known)):
        if path not in known:
            raise ConfigError(_unfit(f"Key '{path}' is not in it"))


def _flat_to(tree: dict[str, Any], leaves: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk a tree down to the paths in `leaves`, and to whatever lies outside of them."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in leaves:
            yield from _flat_to(value, leaves, f"{path}.")
        else:
            yield path, value


def _within(path: str, sections: Sequence[str]) -> bool:
    """Return whether a path is one of the keys or lies in one of the sections; "" is the whole tree."""
    return any(not name or path == name or path.startswith(f"{name}.") for name in sections)


def is_of_the_machine(key: str) -> bool:
    """Return whether an override's key says where things go, what is started, or where options are found.

    A flag of the command line, such as --config-dir, does as well.
    """
    return _within(key, (*OF_THE_MACHINE, "hydra")) or key.startswith(("hydra/", "-"))


def _changed(kept: Any, now: Any, path: str, named: Sequence[str]) -> Any:
    """Return a saved mapping with those of its entries replaced that overrides name one by one."""
    entries = [name.removeprefix(f"{path}.").split(".") for name in named if name.startswith(f"{path}.")]
    for *parents, last in entries:
        source, target = now, kept
        for name in parents:
            source = source.get(name, {}) if isinstance(source, dict) else {}
            target = target.setdefault(name, {})
        if last in source:
            target[last] = source[last]
        else:  # deleted, as in ~optim.optimizer.fused
            target.pop(last, None)
    return kept


def is_release(path: str) -> bool:
    """Return whether a path is the folder of a Hugging Face checkpoint, as far as its config.json goes."""
    return (expand(path) / CONFIG).is_file()


def names_a_run(init_from: str) -> bool:
    """Return whether `init_from` means a run of ours: `last`, the beginning of a run id, or a folder without config."""
    if init_from == "last" or re.fullmatch("[0-9a-f]{4,32}", init_from):
        return True
    return expand(init_from).is_dir() and not is_release(init_from)


def start_from(
    cfg: DictConfig, overrides: Sequence[str], checkpoint: Path | None = None
) -> tuple[DictConfig, list[Problem]]:
    """Return a composed tree with what `init_from` says: its model section, and its tokenizer.

    Args:
        cfg: the composed tree, with init_from.
        overrides: the command line's overrides; of the model they may name `FREE` alone.
        checkpoint: of a run, which init_from names; None: it names the folder of a Hugging Face checkpoint.

    Returns:
        The tree under the schema, and what is wrong; if anything is, the tree is as it was.
    """
    folder = Path(cfg.init_from) if checkpoint is None else checkpoint
    fix = "leave one of the two out"
    problems = []
    if cfg.resume is not None:
        rule = f"cannot be combined with resume={cfg.resume}, whose checkpoint has weights and a model of its own"
        problems.append(Problem("init_from", cfg.init_from, rule, fix))
    if cfg.do is Do.export:
        rule = "is not written by do=export, which takes a checkpoint of a run"
        problems.append(Problem("init_from", cfg.init_from, rule, "set resume=<checkpoint> instead"))
    problems += _model_overrides(cfg, overrides)
    try:
        model = huggingface.read_release(folder).model if checkpoint is None else _saved_model(folder)
    except UserError as error:
        problems += error.problems
    if cfg.data.tokenizer is None and not (folder / TOKENIZER).is_file() and is_release(cfg.init_from):
        fix = "put the model's own there (AutoTokenizer's save_pretrained writes one), or name one by data.tokenizer"
        problems.append(Problem("init_from", cfg.init_from, f"has no {TOKENIZER}", fix))
    other = huggingface.other_tokenizer(folder / TOKENIZER, cfg.data.tokenizer) if cfg.data.tokenizer else None
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
        cfg.data.tokenizer = literal(str(folder / TOKENIZER))
    return cfg, []


def _saved_model(checkpoint: Path) -> dict[str, Any]:
    """Return the model section of a run's checkpoint, complete and of the right types."""
    exp = saved_experiment(saved_config.read(checkpoint))
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(exp.model)))


# of the model, what may be chosen for weights that are there: nothing that inference computes depends on it
FREE = {f"model.{name}" for name in ("version", "max_seq_len", "mtp_loss_weight", "init_std")} | {
    f"model.moe.{name}"
    for name in ("capacity_factor", "balance", "bias_update_rate", "aux_loss_weight", "sequence_loss_weight")
}


def _model_overrides(cfg: DictConfig, overrides: Sequence[str]) -> Iterator[Problem]:
    """Refuse what is set of the model beside `init_from`."""
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
    """List the model's leaves that the command line or a recipe sets, with their values."""
    named = [str(o.key_or_group) for o in _parsed(overrides)]
    with _hydra():
        default = OmegaConf.to_container(compose("config"), resolve=False)
    now = OmegaConf.to_container(cfg, resolve=False)
    for path, value in _leaves(now):
        asked = any(path == n or path.startswith(n + ".") for n in named)
        if path.startswith("model.") and (asked or value != _select(default, path)):
            yield path, value.value if isinstance(value, Enum) else value


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """Parse those overrides that can be."""
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


def register_help() -> None:
    """Let the help text of conf/config.yaml list the groups and the keys."""
    OmegaConf.register_new_resolver("groups", group_docs, replace=True)
    OmegaConf.register_new_resolver("keys", key_docs, replace=True)


def group_docs() -> str:
    """List every group with its options, a line each, for --help."""
    return "\n".join(f"  {name:12}{', '.join(options)}" for name, options in _groups().items())


def key_docs() -> str:
    """List every key with its meaning and range, a line each, for --help."""
    lines = []
    for path, info in schema_keys().items():
        bounds = ", ".join(f"{SIGNS[k]} {v:g}" for k, v in info.metadata["bounds"].items())
        options = "|".join(m.value for m in info.type) if is_enum(info.type) else ""
        extra = "; ".join(x for x in (options, bounds) if x)
        lines.append(f"  {path:44}{info.metadata['doc']}{f' ({extra})' if extra else ''}")
    return "\n".join(lines)


SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _check(cfg: DictConfig, known: list[Problem], rules: bool = True) -> list[Problem]:
    """Problems of a composed tree that composing itself lets pass; `known` keys are not reported twice."""
    problems = _structure_problems(cfg)
    if problems:
        return problems
    exp, reported = typing.cast(ExperimentConfig, OmegaConf.to_object(cfg)), {p.key for p in known}
    return [p for p in (validate.problems(exp) if rules else text_problems(exp)) if p.key not in reported]


def _structure_problems(cfg: DictConfig) -> list[Problem]:
    """Find keys that are not in the schema or have no value, and references that cannot be resolved."""
    try:
        problems = [Problem(p, v, "is not a configuration key", meant(p, "remove it")) for p, v in _extra_leaves(cfg)]
        raw = OmegaConf.to_container(cfg, resolve=False)
        missing = sorted(OmegaConf.missing_keys(cfg) | {k for k in schema_keys() if not _has(raw, k)})
        missing = [k for k in missing if not any(k.startswith(f"{other}.") for other in missing)]
        problems += [Problem(k, "???", "has no value", f"set it, or take the option that sets {k}") for k in missing]
        if problems:
            return problems
        exp = OmegaConf.to_object(cfg)
    except (OmegaConfBaseException, RecursionError) as error:
        path = getattr(error, "full_key", None) or "configuration"
        raw = OmegaConf.to_container(cfg, resolve=False)
        said = "it refers to itself" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        rule = f"cannot be resolved ({said})"
        return [Problem(path, _select(raw, path.split("[")[0]), rule, "correct the reference")]
    wrong = [(k, _attribute(exp, k)) for k, info in schema_keys().items() if is_mapping(info.type)]
    return [
        Problem(k, v, "is not a mapping", f"leave {k} out; +{k}.<name>=... adds an entry")
        for k, v in wrong
        if not isinstance(v, dict)
    ]


def _attribute(exp: Any, path: str) -> Any:
    for name in path.split("."):
        exp = getattr(exp, name)
    return exp


def _extra_leaves(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    sections = typing.get_type_hints(ExperimentConfig)
    for name in cfg:
        if name not in sections:
            yield str(name), OmegaConf.select(cfg, str(name), throw_on_missing=False)
        elif dataclasses.is_dataclass(sections[name]) and not OmegaConf.is_missing(cfg, name):
            fields = {f.name for f in dataclasses.fields(sections[name])}
            yield from ((f"{name}.{k}", cfg[name][k]) for k in cfg[name] if k not in fields)


def _jobs(overrides: list[str]) -> tuple[list[list[str]], list[Problem]]:
    """Expand the overrides of a sweep as Hydra's basic sweeper will, and say why if it cannot.

    Other sweepers choose their own values; the rest of their jobs is checked as one.
    """
    good, problems = _usable(overrides)
    try:
        master = GlobalHydra.instance().hydra.compose_config("config", good, RunMode.MULTIRUN, from_shell=False)
    except Exception:
        return [_without_sweeps(good)], problems  # reported by _compose_all
    problems += _section_problems(master, good)
    if problems:
        return [_without_sweeps(good)], problems
    if not master.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return [_without_sweeps(good)], []
    params = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
    usable, problems = _usable([*params, *good])
    parsed = OverridesParser.create(_loader()).parse_overrides(usable)
    problems += hydra_rules.sweep_problems(parsed)
    if problems:
        return [_without_sweeps(good)], problems
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch], []


def _without_sweeps(overrides: list[str]) -> list[str]:
    return [o for o in overrides if not parse_one(o).is_sweep_override()]


def _usable(overrides: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Sort out what cannot be handed to Hydra: it would load or run what it names, or fail without words."""
    good, problems, groups = [], [], _groups()
    for override in overrides:
        problem = None
        try:
            parsed = parse_one(override)
        except (OverrideParseException, ValueError) as error:
            problem = unparsed(override, error)
        else:
            problem = hydra_rules.override_problem(parsed, groups) or _value_problem(parsed)
        if problem is None:
            good.append(override)
        else:
            problems.append(problem)
    return good, problems


def _value_problem(parsed: Override) -> Problem | None:
    """Refuse what OmegaConf takes and turns into something else."""
    path, value, known = str(parsed.key_or_group), parsed.value(), schema_keys()
    if parsed.is_delete() and (path in known or any(k.startswith(f"{path}.") for k in known)):
        fix = f"set {path}=null" if path in known and known[path].optional else f"leave ~{path} out"
        return Problem(path, None, "cannot be deleted: every key of an experiment has a value", fix)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if path in known and known[path].type is bool and number:
        return Problem(path, value, "is not true or false", f"use {path}=true or {path}=false")
    return None


def _compose_all(overrides: Sequence[str]) -> tuple[DictConfig, list[Problem]]:
    """Compose with every override that can be used, and explain those that cannot."""
    groups = _groups()
    shaping = [o for o in overrides if _path(o) in groups or _path(o).startswith(("hydra.", "hydra/"))]
    problems: list[Problem] = []
    try:
        cfg = _base(tuple(shaping))
    except Exception as error:  # whatever Hydra's internals raise for it
        cfg, problems = _base_of_the_good(shaping, error)
    cfg = copy.deepcopy(cfg)
    for override in [o for o in overrides if o not in shaping]:
        parsed = parse_one(override)
        try:
            if parsed.is_sweep_override():
                raise ValueError("a sweep")
            ConfigLoaderImpl._apply_overrides_to_config([parsed], cfg)
        except Exception as error:
            problems.append(_explain(override, error))
    problems += _section_problems(cfg, overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, problems


# trees that were composed from groups alone, with the section `hydra`: the jobs of a sweep mostly share one
_bases: dict[tuple[str, ...], DictConfig] = {}


def _base(shaping: tuple[str, ...]) -> DictConfig:
    """Compose the options of groups, before values are set."""
    if shaping not in _bases:
        _bases[shaping] = compose("config", list(shaping), return_hydra_config=True)
    return _bases[shaping]


def _base_of_the_good(shaping: Sequence[str], error: Exception) -> tuple[DictConfig, list[Problem]]:
    """Compose with those options that can be used, and explain the others."""
    try:
        cfg = _base(())
    except Exception:
        raise ConfigError(file_words(error)) from error
    good: list[str] = []
    problems: list[Problem] = []
    for override in shaping:
        try:
            cfg = _base((*good, override))
            good.append(override)
        except Exception as error:
            problems.append(_explain(override, error))
    return cfg, problems


def _section_problems(cfg: DictConfig, overrides: Sequence[str]) -> list[Problem]:
    return list(hydra_rules.section_problems(cfg, {o: _path(o) for o in overrides}))


def _explain(override: str, error: Exception) -> Problem:
    path, groups = _path(override), _groups()
    options = groups.get(path) or (_loader().get_group_options(path) if path.startswith("hydra/") else [])
    return override_words(parse_one(override), error, _base(()), options)


def _path(override: str) -> str:
    return str(parse_one(override).key_or_group)


@cache
def _groups() -> dict[str, list[str]]:
    loader = _loader()
    names = [g for g in loader.list_groups("") if g != "hydra" and not g.startswith((".", "_"))]
    groups = {g: options for g in names if (options := loader.get_group_options(g))}
    recipes = ROOT / "recipes"
    ours = {str(p.relative_to(recipes).with_suffix("")) for p in recipes.rglob("*.yaml")}
    return groups | {"recipes": sorted(ours | set(loader.get_group_options("recipes")))}


class Folders(ConfigRepository):
    """The folders that options come from; no path leads out of them."""

    def _find_object_source(self, config_path: str, object_type: ObjectType | None) -> ConfigSource | None:
        if not hydra_rules.is_inside(config_path):
            return None
        return super()._find_object_source(config_path, object_type)


def _hydra(config_dir: str | None = None) -> AbstractContextManager[Any]:
    """Make `compose` work: with the Hydra of a job that runs, or one for the moment."""
    running = GlobalHydra.instance().is_initialized()
    return nullcontext() if running else _momentary(config_dir)


@contextmanager
def _momentary(config_dir: str | None) -> Iterator[None]:
    """Set a Hydra up that searches conf/ and a folder of the user's, and take it down."""
    hydra.version.setbase("1.3")
    search = create_config_search_path(CONF)
    if config_dir is not None:
        path = f"file://{Path(config_dir).absolute()}"
        search.prepend("command-line", path, SearchPathQuery(provider="schema", path=None))
    made = Hydra.create_main_hydra2(task_name="app", config_search_path=search)
    made.config_loader.repository = Folders(search)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        _bases.clear()
        _groups.cache_clear()


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Walk the schema's leaves; a free mapping (callbacks, an optimizer's arguments) is one leaf."""
    for path in schema_keys():
        yield path, _select(tree, path)


def _has(tree: Any, path: str) -> bool:
    """Say whether a tree goes as far as a path, whatever stands there."""
    for name in path.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _select(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
