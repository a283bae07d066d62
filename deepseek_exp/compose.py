"""Compose the configuration tree and word everything that is wrong with it, before anything expensive starts."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import os
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepseek_exp import huggingface, validate
from deepseek_exp.config import ROOT, Do, ExperimentConfig
from deepseek_exp.errors import ConfigError, Problem, UserError
from deepseek_exp.huggingface.files import CONFIG, TOKENIZER

CONF = str(ROOT / "conf")
# groups that write into another section of the tree
SECTION_OF = {"size": "model"}


def check_command_line(argv: Sequence[str]) -> None:
    """Compose and validate every job that a command line asks for.

    Args:
        argv: the arguments after the program's name, as Hydra takes them; a sweep is expanded into its jobs.

    Raises:
        ConfigError: with all problems of all jobs, each told once.
    """
    _check_encoding(argv)
    args = get_args_parser().parse_args(list(argv))
    if args.help or args.hydra_help or args.shell_completion:
        return
    with _hydra():
        jobs = _jobs(args.overrides) if args.multirun else [args.overrides]
        problems: dict[str, Problem] = {}
        for overrides in jobs:
            cfg, found = _compose_all(overrides)
            if cfg.get("init_from") is not None:
                cfg, more = start_from(cfg, overrides)
                found += more
            # what goes on from a checkpoint is checked once its own configuration lies underneath
            problems |= {str(p): p for p in found + _check(cfg, found, rules=not takes_checkpoint(cfg))}
    resumes = [o.lstrip("+") for o in args.overrides if o.lstrip("+").startswith("resume=")]
    if args.multirun and any(o != "resume=null" for o in resumes):
        fix = "resume one run at a time, without -m"
        problems["resume"] = Problem("resume", "a sweep", "cannot be combined with -m", fix)
    if problems:
        raise ConfigError(*problems.values())


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


def merge_saved(saved: dict[str, Any], overrides: Sequence[str]) -> DictConfig:
    """Give the configuration of a checkpoint with what the command line says on top of it.

    A leaf is taken from the command line where an override names it, where an override selects its group's option, or
    where the composed value is not the default (a recipe); every other leaf is the saved one. A section or a
    key that the checkpoint's version did not have has its default, but for keys of the model, which have to be given.

    Args:
        saved: the resolved tree stored in the checkpoint.
        overrides: the command line's overrides.

    Returns:
        The merged tree under the schema.

    Raises:
        ConfigError: the saved tree does not fit this version's schema.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    named = [SECTION_OF.get(str(o.key_or_group), str(o.key_or_group)) for o in parsed]
    # what refers to the model (data.seq_len: ${model.max_seq_len}) refers to the saved one, unless another is named
    model = {k: _select(saved, k) for k in schema_keys() if k.startswith("model.")}
    pins = [f"{k}={json.dumps(v)}" for k, v in model.items() if v is not None]
    if {"model", "recipes"} & set(named):
        pins = []
    with _hydra():
        now, default = (OmegaConf.to_container(compose("config", [*pins, *o]), resolve=True) for o in (overrides, []))
    schema = OmegaConf.structured(ExperimentConfig)
    try:
        later = {name: section for name, section in default.items() if name not in saved}  # by versions since
        merged = OmegaConf.merge(schema, later, saved)
        for path in schema_keys():
            if not path.startswith("model.") and path.partition(".")[0] in saved and not _has(saved, path):
                OmegaConf.update(merged, path, _select(default, path), merge=False)
        for path, value in _leaves(now):
            asked = any(path == n or path.startswith(n + ".") for n in named)
            if asked or value != _select(default, path):
                OmegaConf.update(merged, path, value, merge=False, force_add=False)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ConfigError(
            Problem("resume", "its configuration", f"does not fit this version ({message})", "start a new run")
        ) from error
    return typing.cast(DictConfig, merged)


def start_from(cfg: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, list[Problem]]:
    """Lay what `init_from` says over a composed tree: its model section, and its tokenizer.

    Args:
        cfg: the composed tree, with init_from.
        overrides: the command line's overrides; of the model they may name `FREE` alone.

    Returns:
        The tree under the schema, and what is wrong; it is as it was where something is.
    """
    folder = Path(cfg.init_from)
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
        model = dict(_flat(huggingface.read_release(folder).model, "model."))
    except UserError as error:
        problems += error.problems
    if cfg.data.tokenizer is None and not (folder / TOKENIZER).is_file() and (folder / CONFIG).is_file():
        fix = "put the model's own there (AutoTokenizer's save_pretrained writes one), or name one by data.tokenizer"
        problems.append(Problem("init_from", cfg.init_from, f"has no {TOKENIZER}", fix))
    if problems:
        return cfg, problems
    asked = {path for path, _ in _set_by_hand(cfg, overrides)}
    cfg = copy.deepcopy(cfg)
    for path, value in model.items():
        if path not in asked:
            OmegaConf.update(cfg, path, value, merge=False)
    if cfg.data.tokenizer is None:
        cfg.data.tokenizer = str(folder / TOKENIZER)
    return cfg, []


# of the model, what may be chosen for weights that are there: nothing that inference computes depends on it
FREE = {f"model.{name}" for name in ("version", "max_seq_len", "mtp_loss_weight", "init_std")} | {
    f"model.moe.{name}"
    for name in ("capacity_factor", "balance", "bias_update_rate", "aux_loss_weight", "sequence_loss_weight")
}


def _model_overrides(cfg: DictConfig, overrides: Sequence[str]) -> Iterator[Problem]:
    """Refuse what is set of the model beside `init_from`."""
    rule = f"cannot be used with init_from={cfg.init_from}, whose config.json gives the model"
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
            found.append(_parse_one(override))
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
        options = "|".join(m.value for m in info.type) if _is_enum(info.type) else ""
        extra = "; ".join(x for x in (options, bounds) if x)
        lines.append(f"  {path:44}{info.metadata['doc']}{f' ({extra})' if extra else ''}")
    return "\n".join(lines)


SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclasses.dataclass(frozen=True)
class KeyInfo:
    """One leaf of the schema."""

    type: Any
    optional: bool
    metadata: dict[str, Any]


def schema_keys(cls: type = ExperimentConfig, prefix: str = "") -> dict[str, KeyInfo]:
    """Map every dotted key of the schema to its type and documentation, in the schema's order."""
    found: dict[str, KeyInfo] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, optional = hints[field.name], False
        if isinstance(kind, types.UnionType):
            kind, optional = next(t for t in typing.get_args(kind) if t is not type(None)), True
        if dataclasses.is_dataclass(kind):
            found |= schema_keys(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = KeyInfo(kind, optional, dict(field.metadata))
    return found


def _check(cfg: DictConfig, known: list[Problem], rules: bool = True) -> list[Problem]:
    """Problems of a composed tree that composing itself lets pass; `known` keys are not told twice."""
    try:
        problems = [Problem(p, v, "is not a configuration key", _meant(p, "remove it")) for p, v in _extra_leaves(cfg)]
        missing = sorted(OmegaConf.missing_keys(cfg))
        problems += [
            Problem(k, "???", "has no value", f"give it one, or take the option that sets {k}") for k in missing
        ]
        if problems:
            return problems
        exp = typing.cast(ExperimentConfig, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        path = getattr(error, "full_key", None) or "configuration"
        raw = OmegaConf.to_container(cfg, resolve=False)
        return [
            Problem(
                path,
                _select(raw, path.split("[")[0]),
                f"cannot be resolved ({str(error).splitlines()[0]})",
                "mend the reference",
            )
        ]
    told = {p.key for p in known}
    return [] if not rules else [p for p in validate.problems(exp) if p.key not in told]


def _extra_leaves(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    sections = typing.get_type_hints(ExperimentConfig)
    for name in cfg:
        if name not in sections:
            yield str(name), OmegaConf.select(cfg, str(name), throw_on_missing=False)
        elif dataclasses.is_dataclass(sections[name]) and not OmegaConf.is_missing(cfg, name):
            fields = {f.name for f in dataclasses.fields(sections[name])}
            yield from ((f"{name}.{k}", cfg[name][k]) for k in cfg[name] if k not in fields)


def _jobs(overrides: list[str]) -> list[list[str]]:
    """Expand the overrides of a sweep as Hydra's basic sweeper will; other sweepers choose their own values."""
    if any(o.startswith("hydra/sweeper=") for o in overrides):
        return [[o for o in overrides if not _parse_one(o).is_sweep_override()]]
    try:
        parsed = OverridesParser.create(_loader()).parse_overrides(overrides)
    except OverrideParseException:
        return [overrides]  # told by _compose_all
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def _compose_all(overrides: Sequence[str]) -> tuple[DictConfig, list[Problem]]:
    """Compose with every override that can be used, and explain those that cannot."""
    try:
        return compose("config", list(overrides)), []
    except HydraException as error:
        base_error = error
    try:
        default = compose("config")
    except HydraException:
        raise ConfigError(_explain_file(base_error)) from base_error
    good: list[str] = []
    problems: list[Problem] = []
    groups = _groups()
    for override in sorted(overrides, key=lambda o: o.split("=")[0].lstrip("+~") not in groups):
        try:
            compose("config", [*good, override])
            good.append(override)
        except HydraException as error:
            problems.append(_explain(override, error, default, groups))
    return compose("config", good), problems


def _explain(override: str, error: HydraException, default: DictConfig, groups: dict[str, list[str]]) -> Problem:
    """Word what is wrong with one override of the command line."""
    try:
        parsed = _parse_one(override)
    except OverrideParseException:
        fix = "write key=value; quote a value with special characters, as in 'sample.prompt=\"a, b\"'"
        return Problem("command line", override, "cannot be parsed", fix)
    path, value = str(parsed.key_or_group), parsed.value()
    if parsed.is_sweep_override():
        return Problem(path, parsed.get_value_string(), "gives several values without -m", "add -m for a sweep")
    known = schema_keys()
    options = groups.get(path) or (_loader().get_group_options(path) if path.startswith("hydra/") else [])
    if options:
        near = difflib.get_close_matches(str(value), options, n=1)
        fix = f"use {path}={near[0]}" if near else f"use one of {', '.join(options)}"
        return Problem(path, value, f"is not an option of the group {path}", fix)
    if path in known:
        return _explain_value(path, value, known[path], OmegaConf.select(default, path))
    if any(info.type == dict[str, Any] and path.startswith(k + ".") for k, info in known.items()):
        return Problem(path, value, "adds an entry, which needs a plus sign", f"write +{override}")
    return Problem(path, value, "is not a configuration key", _meant(path, "see python run.py --help for all keys"))


def _explain_value(path: str, value: Any, info: KeyInfo, default: Any) -> Problem:
    if _is_enum(info.type):
        names = [m.value for m in info.type]
        near = difflib.get_close_matches(str(value), names, n=1)
        fix = f"use {path}={near[0]}" if near else f"use one of {', '.join(names)}"
        return Problem(path, value, f"is not one of {', '.join(names)}", fix)
    wanted = TYPE_WORDS.get(info.type, "a mapping")
    shown = Problem(path, default.value if isinstance(default, Enum) else default, "", "")._shown()
    return Problem(path, value, f"is not {wanted}", f"give {wanted}, for example {path}={shown}")


TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _explain_file(error: HydraException) -> Problem:
    """Word an error that lies in the YAML files themselves."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = lines[0].split(":")[0] if lines else "conf"
    path = getattr(error.__cause__, "full_key", None)
    rule = f"does not fit the schema ({' '.join(lines[1:3])})" if len(lines) > 1 else "cannot be composed"
    return Problem("conf", place, rule, _meant(path, "mend that file") if path else "mend that file")


# keys of earlier versions, and what to set instead
RENAMED = {
    "trainer.eval_batches": "set trainer.eval_seqs, the sequences of one validation: "
    "trainer.eval_batches times trainer.micro_batch_seqs"
}


def _meant(path: str, otherwise: str) -> str:
    """Say which key a misspelt one may have meant."""
    if path in RENAMED:
        return RENAMED[path]
    known = list(schema_keys())
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    near = same_leaf or difflib.get_close_matches(
        path, known + list(SECTION_OF) + [k.split(".")[0] for k in known], n=1
    )
    if not near:
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(path.rsplit(".", 1)[-1], leaves, n=1)]
    return f"did you mean {near[0]}? Otherwise {otherwise}" if near else otherwise


def _groups() -> dict[str, list[str]]:
    loader = _loader()
    names = [g for g in loader.list_groups("") if g != "hydra" and not g.startswith((".", "_"))]
    groups = {g: options for g in names if (options := loader.get_group_options(g))}
    recipes = ROOT / "recipes"
    return groups | {"recipes": sorted(str(p.relative_to(recipes).with_suffix("")) for p in recipes.rglob("*.yaml"))}


def _hydra() -> AbstractContextManager[Any]:
    """Make `compose` work: with the Hydra of a job that runs, or one for the moment."""
    running = GlobalHydra.instance().is_initialized()
    return nullcontext() if running else initialize_config_dir(CONF, version_base="1.3")


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _parse_one(override: str) -> Override:
    return OverridesParser.create().parse_overrides([override])[0]


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


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
