"""Compose the configuration tree and report all its problems, before anything expensive starts."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import hydra.version
from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from deepseek_exp.config import ROOT, ExperimentConfig
from deepseek_exp.config.explain import file_words, meant, override_words, parse_one, unparsed
from deepseek_exp.config.keys import is_mapping, schema_keys
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.rules import hydra_section, validate
from deepseek_exp.config.rules.values import text_problems
from deepseek_exp.errors import ConfigError, Problem

CONF = str(ROOT / "conf")


def to_experiment(cfg: DictConfig, machine: Machine) -> ExperimentConfig:
    """Validate a composed tree for a machine and return it as dataclasses.

    Raises:
        ConfigError: with every rule that the tree breaks.
    """
    exp, problems = check_tree(cfg, [], machine)
    if exp is None or problems:
        raise ConfigError(*problems)
    return exp


def check_tree(
    cfg: DictConfig, known: list[Problem], machine: Machine | None, exp: ExperimentConfig | None = None
) -> tuple[ExperimentConfig | None, list[Problem]]:
    """Return a composed tree as dataclasses, and its problems that composing itself lets pass.

    Args:
        cfg: the tree.
        known: problems that are already found, whose keys are not reported twice.
        machine: where the experiment is to run; None: only texts are checked, and no rule between keys.
        exp: the tree as dataclasses, if it is known to have the schema's form.

    Returns:
        The experiment, None if the tree does not have the schema's form; and the problems.
    """
    if exp is None:
        exp, problems = structured(cfg)
        if exp is None:
            return None, problems
    reported = {p.key for p in known}
    found = text_problems(exp) if machine is None else validate.problems(exp, machine)
    return exp, [p for p in found if p.key not in reported]


def structure_problems(cfg: DictConfig) -> list[Problem]:
    """Return problems for keys that are not in the schema or have no value, and for unresolvable references."""
    return structured(cfg)[1]


def structured(cfg: DictConfig) -> tuple[ExperimentConfig | None, list[Problem]]:
    """Return a composed tree as dataclasses, or None and the problems of its structure."""
    try:
        problems = [Problem(p, v, "is not a configuration key", meant(p, "remove it")) for p, v in _extra_leaves(cfg)]
        raw = OmegaConf.to_container(cfg, resolve=False)
        missing = sorted(OmegaConf.missing_keys(cfg) | {k for k in schema_keys() if not has_path(raw, k)})
        missing = [k for k in missing if not any(k.startswith(f"{other}.") for other in missing)]
        problems += [Problem(k, "???", "has no value", f"set it, or take the option that sets {k}") for k in missing]
        if problems:
            return None, problems
        exp = typing.cast(ExperimentConfig, OmegaConf.to_object(cfg))
    except (OmegaConfBaseException, RecursionError) as error:
        path = getattr(error, "full_key", None) or "configuration"
        raw = OmegaConf.to_container(cfg, resolve=False)
        said = "it refers to itself" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        rule = f"cannot be resolved ({said})"
        return None, [Problem(path, select(raw, path.split("[")[0]), rule, "correct the reference")]
    wrong = [(k, _attribute(exp, k)) for k, info in schema_keys().items() if is_mapping(info.type)]
    problems = [
        Problem(k, v, "is not a mapping", f"leave {k} out; +{k}.<name>=... adds an entry")
        for k, v in wrong
        if not isinstance(v, dict)
    ]
    return None if problems else exp, problems


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


def usable(overrides: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Separate overrides that are safe for Hydra from those that would load or run code, or fail without a message."""
    good, problems, groups = [], [], option_groups()
    for override in overrides:
        problem = None
        try:
            parsed = parse_one(override)
        except (OverrideParseException, ValueError) as error:
            problem = unparsed(override, error)
        else:
            problem = hydra_section.override_problem(parsed, groups) or _value_problem(parsed)
        if problem is None:
            good.append(override)
        else:
            problems.append(problem)
    return good, problems


def _value_problem(parsed: Override) -> Problem | None:
    """Return a problem if OmegaConf would accept the value but convert it to something else."""
    path, value, known = str(parsed.key_or_group), parsed.value(), schema_keys()
    if parsed.is_delete() and (path in known or any(k.startswith(f"{path}.") for k in known)):
        fix = f"set {path}=null" if path in known and known[path].optional else f"leave ~{path} out"
        return Problem(path, None, "cannot be deleted: every key of an experiment has a value", fix)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if path in known and known[path].type is bool and number:
        return Problem(path, value, "is not true or false", f"use {path}=true or {path}=false")
    return None


def compose_run(overrides: Sequence[str]) -> tuple[DictConfig, DictConfig, list[Problem]] | None:
    """Compose the tree as Hydra does for a single job; return None if Hydra refuses to.

    Returns:
        The tree, its section `hydra`, and the problems of that section.
    """
    try:
        cfg = compose("config", list(overrides), return_hydra_config=True)
    except Exception:  # Hydra's internals raise many kinds; `compose_tree` has the words
        return None
    problems = section_problems(cfg, overrides)
    cfg.hydra.mode = RunMode.RUN
    section = OmegaConf.masked_copy(cfg, "hydra")
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, section, problems


def compose_tree(overrides: Sequence[str]) -> tuple[DictConfig, list[Problem]]:
    """Compose the tree with every usable override, and return it with the problems of the others."""
    groups = option_groups()
    shaping = [o for o in overrides if override_key(o) in groups or override_key(o).startswith(("hydra.", "hydra/"))]
    problems: list[Problem] = []
    try:
        cfg = base_tree(tuple(shaping))
    except Exception as error:  # Hydra's internals raise many kinds
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
    problems += section_problems(cfg, overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, problems


# Trees that a Hydra has composed from groups only, including the section `hydra`. The jobs of a sweep mostly share one.
_bases: WeakKeyDictionary[ConfigLoader, dict[tuple[str, ...], DictConfig]] = WeakKeyDictionary()


def base_tree(shaping: tuple[str, ...]) -> DictConfig:
    """Return the tree composed from group options, before values are set. Copy it before you change it."""
    trees = _bases.setdefault(config_loader(), {})
    if shaping not in trees:
        trees[shaping] = compose("config", list(shaping), return_hydra_config=True)
    return trees[shaping]


def _base_of_the_good(shaping: Sequence[str], error: Exception) -> tuple[DictConfig, list[Problem]]:
    """Compose the tree with every usable option, and return it with the problems of the others."""
    try:
        cfg = base_tree(())
    except Exception:
        raise ConfigError(file_words(error)) from error
    good: list[str] = []
    problems: list[Problem] = []
    for override in shaping:
        try:
            cfg = base_tree((*good, override))
            good.append(override)
        except Exception as error:
            problems.append(_explain(override, error))
    return cfg, problems


def section_problems(cfg: DictConfig, overrides: Sequence[str]) -> list[Problem]:
    """Return the problems of the section `hydra`."""
    return list(hydra_section.section_problems(cfg, {o: override_key(o) for o in overrides}))


def _explain(override: str, error: Exception) -> Problem:
    path, groups = override_key(override), option_groups()
    options = groups.get(path) or (config_loader().get_group_options(path) if path.startswith("hydra/") else [])
    return override_words(parse_one(override), error, base_tree(()), options)


def override_key(override: str) -> str:
    """Return the key or group that an override names."""
    return str(parse_one(override).key_or_group)


def option_groups() -> dict[str, list[str]]:
    """Return the options of each group, by group."""
    loader = config_loader()
    if loader not in _groups:
        _groups[loader] = _listed(loader.repository)  # type: ignore[attr-defined]
    return _groups[loader]


# The options that a Hydra finds.
_groups: WeakKeyDictionary[ConfigLoader, dict[str, list[str]]] = WeakKeyDictionary()


def _listed(folders: ConfigRepository) -> dict[str, list[str]]:
    found = folders.get_group_options("", ObjectType.GROUP)
    names = [g for g in found if g != "hydra" and not g.startswith((".", "_"))]
    groups = {g: options for g in names if (options := folders.get_group_options(g))}
    recipes = ROOT / "recipes"
    ours = {str(p.relative_to(recipes).with_suffix("")) for p in recipes.rglob("*.yaml")}
    return groups | {"recipes": sorted(ours | set(folders.get_group_options("recipes")))}


# Files of options that are read, with their state on the disk. Hydra reads each one when it composes, up to five times
# per command, and most of the time of composing is the reading.
_files: dict[tuple[str, str, str], tuple[tuple[int, int, int] | None, ConfigResult]] = {}


class Folders(ConfigRepository):
    """The folders that options come from. Paths that lead out of them are not found."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Folders:
        copied = copy.copy(self)  # Hydra replaces the sources of its copy
        copied.sources = list(self.sources)
        return copied

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Return the content of a file, as a copy that Hydra may change. A file is read again if it has changed."""
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() == "structured":
            return super().load_config(config_path)
        state = None  # a file of Hydra's
        if source.scheme() == "file":
            stat = Path(source.path, source._normalize_file_name(config_path)).stat()
            state = stat.st_ino, stat.st_size, stat.st_mtime_ns
        key = source.provider, source.path, config_path
        if key not in _files or _files[key][0] != state:
            read = super().load_config(config_path)
            assert read is not None  # its source was found
            _files[key] = state, read
        return copy.deepcopy(_files[key][1])

    def _find_object_source(self, config_path: str, object_type: ObjectType | None) -> ConfigSource | None:
        if not hydra_section.is_inside(config_path):
            return None
        return super()._find_object_source(config_path, object_type)


def hydra_ready(config_dir: str | None = None) -> AbstractContextManager[Any]:
    """Return a context in which `compose` works, using the Hydra of the running job or a temporary one."""
    running = GlobalHydra.instance().is_initialized()
    return nullcontext() if running else _momentary(config_dir)


@contextmanager
def _momentary(config_dir: str | None) -> Iterator[None]:
    """Set up a temporary Hydra that searches conf/ and the user's `config_dir`, if any."""
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


def config_loader() -> ConfigLoader:
    """Return the loader of the current Hydra."""
    return GlobalHydra.instance().config_loader()


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield each leaf of the schema with its value. A free mapping (callbacks, optimizer arguments) is one leaf."""
    for path in schema_keys():
        yield path, select(tree, path)


def has_path(tree: Any, path: str) -> bool:
    """Return whether the path exists in the tree, whatever its value."""
    for name in path.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def select(tree: Any, path: str) -> Any:
    """Return the value at a path, or None if the path does not exist."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
