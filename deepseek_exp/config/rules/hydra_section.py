"""Rules for Hydra itself: its flags, its section of the tree, and the options of groups."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from hydra.conf import HydraConf
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepseek_exp.config import ROOT
from deepseek_exp.config.rules.values import is_folder
from deepseek_exp.errors import Problem

# Hydra's groups and keys that a command line may set. The launcher and sweeper decide what runs the jobs of a sweep.
GROUPS = ("hydra/launcher", "hydra/sweeper")
KEYS = ("hydra.launcher", "hydra.sweeper", "hydra.searchpath", "hydra.sweep.dir", "hydra.verbose")
# Keys that a recipe or another file may set: the values of a sweep.
FILE_KEYS = ("hydra.sweeper.params",)
# Keys that Hydra fills in when it composes, and the text of --help.
NOT_CHECKED = (
    "hydra.help",
    "hydra.hydra_help",
    "hydra.runtime",
    "hydra.job.config_name",
    "hydra.job.id",
    "hydra.job.name",
    "hydra.job.num",
    "hydra.job.override_dirname",
)
OVERRIDES = ("hydra.overrides.hydra", "hydra.overrides.task")
TARGETS = (
    r"hydra\._internal\.core_plugins\.basic_(launcher\.BasicLauncher|sweeper\.BasicSweeper)|"
    r"hydra_plugins(\.\w+)+\.[A-Z]\w*(Launcher|Sweeper)|optuna\.(samplers|pruners)\.[A-Z]\w*"
)
# The keys of Hydra's own launcher and sweeper.
BASIC = {"launcher": (), "sweeper": ("max_batch_size", "params")}
# Composing and recording a job takes about a second before its first step.
MAX_JOBS = 1000


def flag_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Yield problems for Hydra flags that run code from a file, do nothing or contradict each other."""
    if args.experimental_rerun is not None:
        rule = "unpickles a file, which can run any code"
        fix = "resume a run with resume=<MLflow run id>"
        yield Problem("--experimental-rerun", args.experimental_rerun, rule, fix)
    for name in ("config_path", "config_name"):
        value = getattr(args, name)
        if value is not None:
            rule = "cannot be used: conf/config.yaml is where every experiment starts"
            fix = "put options of your own below a folder, and name it with --config-dir"
            yield Problem(f"--{name.replace('_', '-')}", value, rule, fix)
    if args.config_dir is not None and not is_folder(args.config_dir):
        rule = f"is no folder (looked in {Path.cwd()})"
        yield Problem("--config-dir", args.config_dir, rule, "name the folder that holds cluster/, model/ and so on")
    modes = ("run", "multirun", "cfg", "info", "shell_completion")
    asked = [f"--{m.replace('_', '-')}" for m in modes if getattr(args, m) not in (None, False)]
    if len(asked) > 1:
        yield Problem("command line", " ".join(asked), "are several things to do", f"leave {asked[1]} out")
    for name in ("package", "resolve"):
        value = getattr(args, name)
        if value not in (None, False) and args.cfg is None and not (name == "resolve" and args.help):
            rule = "says how the configuration is printed, and nothing asks for that"
            yield Problem(f"--{name}", value, rule, f"add --cfg job, or leave --{name} out")


def override_problem(override: Override, groups: dict[str, list[str]]) -> Problem | None:
    """Return a problem if an override of Hydra's section, or a group option, may not be set.

    Args:
        override: one override of the command line.
        groups: the groups of the configuration, including Hydra's.
    """
    path, value = str(override.key_or_group), override.value()
    if path in groups or path.startswith("hydra/"):
        problem = _option_problem(override, path, groups.get(path, []))
        if problem is not None:
            return problem
    if not override.is_hydra_override() and path != "hydra":
        return None
    shown = override.get_value_string() if override.is_sweep_override() else value
    if override.is_delete():
        shown = None
    if override.is_delete() or not (path in GROUPS or _below(path, KEYS)):
        rule = "is not a key of Hydra that may be set"
        return Problem(path, shown, rule, f"leave it out; those that may be: {', '.join((*GROUPS, *KEYS))}")
    if override.is_sweep_override():
        rule = "has several values, and a sweep is over the experiment's keys"
        return Problem(path, override.get_value_string(), rule, "choose one value")
    if path == "hydra.sweeper.params" and not isinstance(value, dict):
        fix = "use '+hydra.sweeper.params={seed:\"1,2\"}'"
        return Problem(path, value, "is not a mapping of keys to values", fix)
    if path == "hydra.verbose" and not isinstance(value, bool | str):
        return Problem(path, value, "is not true, false or a logger's name", "use hydra.verbose=true")
    if path == "hydra.searchpath":
        return _searchpath_problem(value)
    return None


def _option_problem(override: Override, group: str, options: list[str]) -> Problem | None:
    """Return a problem if the value cannot be an option of the group."""
    value = override.value()
    if override.package is not None:
        rule = "would put a group's option into another place of the tree"
        return Problem(f"{group}@{override.package}", value, rule, f"use {group}={value}")
    if override.is_delete():
        rule = "is what an experiment takes one option from"
        fix = f"use one of {', '.join(options)}" if options else "leave it out"
        return Problem(group, None, f"cannot be deleted: it {rule}", fix) if group != "recipes" else None
    if override.is_sweep_override() or isinstance(value, dict):  # reported when composing
        return None
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            fix = f"use one of {', '.join(options)}" if options else "name one"
            if group == "recipes" and value is None:
                fix = "leave it out"
            return Problem(group, value, f"is not an option of the group {group}", fix)
        if not is_inside(name):
            rule = "leaves the folders that hold the options"
            fix = "name an option of the group; --config-dir=<folder> adds options of your own"
            return Problem(group, value, rule, fix)
    return None


def is_inside(path: str) -> bool:
    """Return whether the path of a configuration file stays below the search folders."""
    parts = PurePosixPath(path.replace("\\", "/"))
    return ".." not in parts.parts and not parts.is_absolute() and "://" not in path


def _searchpath_problem(value: Any) -> Problem | None:
    key, fix = "hydra.searchpath", "use --config-dir=<folder>, or 'hydra.searchpath=[file://<folder>]'"
    if not isinstance(value, list) or not all(isinstance(folder, str) for folder in value):
        return Problem(key, value, "is not a list of folders", fix)
    for folder in value:
        scheme, _, path = folder.rpartition("://")
        if scheme not in ("", "file"):
            return Problem(key, folder, "is not a folder of files", fix)
        if not is_folder(path):
            return Problem(key, folder, f"is no folder (looked in {Path.cwd()})", fix)
    return None


def section_problems(composed: DictConfig, overrides: Mapping[str, str]) -> Iterator[Problem]:
    """Yield problems for values in the section `hydra` that come from neither conf/config.yaml nor the command line.

    Args:
        composed: the tree, including that section.
        overrides: maps each override of the command line to the key or group that it names.
    """
    now = dict(_flat(OmegaConf.to_container(composed.hydra, resolve=False), "hydra"))
    before = _reference()
    asked = tuple(name.replace("/", ".") for name in overrides.values() if name in GROUPS or _below(name, KEYS))
    for path in sorted(now.keys() | before.keys()):
        value = now.get(path)
        if _below(path, NOT_CHECKED):
            continue
        if _below(path, OVERRIDES):  # Hydra adds the command line's overrides to them, and applies all to each job
            value = [word for word in value if word not in overrides] if isinstance(value, list) else value
        if path.endswith("._target_") and value is not None and not _is_known(path, str(value)):
            rule = "is not a launcher or sweeper of Hydra's"
            yield Problem(path, value, rule, "leave it out; hydra/launcher and hydra/sweeper choose one")
        elif value != before.get(path) and not _below(path, (*FILE_KEYS, *asked)):
            rule = "is set by a file, which may set no key of Hydra but " + ", ".join(FILE_KEYS)
            yield Problem(path, value, rule, "remove it from that file")
    if now["hydra.sweep.dir"] != before["hydra.sweep.dir"]:
        problem = _sweep_dir_problem(composed)
        if problem is not None:
            yield problem
    yield from _sweep_problems(composed)


def _sweep_dir_problem(composed: DictConfig) -> Problem | None:
    """Return a problem if the folder of a sweep is not below the output folder."""
    key = "hydra.sweep.dir"
    try:
        folder, above = composed.hydra.sweep.dir, Path(composed.output_dir)
    except OmegaConfBaseException as error:
        rule = f"cannot be resolved ({str(error).splitlines()[0]})"
        return Problem(key, None, rule, f"leave {key} out")
    if Path(folder).absolute().is_relative_to(above.absolute()) and ".." not in Path(folder).parts:
        return None
    return Problem(key, folder, f"is not below output_dir={above}", f"use {key}={above / 'multiruns' / 'my_sweep'}")


def _sweep_problems(composed: DictConfig) -> Iterator[Problem]:
    empty = [section for section in BASIC if OmegaConf.is_missing(composed.hydra, section)]
    if empty:
        rule, fix = "has no option", "choose one, such as hydra/{0}=basic, or leave hydra/{0} out"
        yield from (Problem(f"hydra/{section}", [], rule, fix.format(section)) for section in empty)
        return
    for section, takes in BASIC.items():
        node = composed.hydra[section]
        unknown = set(node) - {"_target_", *takes} if "_internal" in node["_target_"] else ()
        for name in sorted(unknown):
            rule, fix = f"is not a key of Hydra's basic {section}", f"leave it out, or choose another hydra/{section}"
            yield Problem(f"hydra.{section}.{name}", node[name], rule, fix)
    size = composed.hydra.sweeper.get("max_batch_size")
    if size is not None and (not isinstance(size, int) or size < 1):
        yield Problem("hydra.sweeper.max_batch_size", size, "is not a whole number of at least 1", "use 1 or more")
    params = composed.hydra.sweeper.get("params")
    if params is not None and not OmegaConf.is_dict(params):
        yield Problem("hydra.sweeper.params", params, "is not a mapping of keys to values", 'use {seed: "1,2"}')


def n_values(override: Override) -> float:
    """Return the number of values of a sweep over one key, without listing them; 1 if it is not a sweep.

    Raises:
        ValueError: they cannot be listed.
    """
    if not override.is_sweep_override():
        return 1
    if override.is_interval_sweep():
        raise ValueError("is an interval, and the sweeper runs listed values")
    found = override._value
    if isinstance(found, RangeSweep):
        start, stop, step = (float(x) for x in (found.start or 0, found.stop or 0, found.step))
        if not step or not all(math.isfinite(x) for x in (start, stop, step)):
            raise ValueError("never ends")
        return max(0, math.ceil((stop - start) / step))
    if isinstance(found, Glob):
        return len(list(override.sweep_iterator()))
    assert isinstance(found, ChoiceSweep)  # the only other kind of sweep
    return len(found.list)


def sweep_problems(parsed: Sequence[Override]) -> Iterator[Problem]:
    """Yield a problem if a sweep has no jobs, or more than can be run."""
    n_jobs, longest = 1.0, ("", 0.0)
    last = {o.get_key_element(): o for o in parsed}  # if a key occurs twice, the last one counts
    for override in last.values():
        path = str(override.key_or_group)
        if path in ("tracking", "tracking.backend") and override.is_sweep_override():
            rule = "cannot be swept over, since the jobs of a sweep share one table"
            yield Problem(path, override.get_value_string(), rule, f"use one value for {path}")
            return
        try:
            n = n_values(override)
        except ValueError as error:
            fix = f"list the values, as in {path}=a,b or {path}=range(1,5)"
            yield Problem(path, override.get_value_string(), str(error), fix)
            return
        if n == 0:
            fix = "use two values or more, as in seed=1,2"
            yield Problem(path, override.get_value_string(), "makes a sweep of no jobs", fix)
            return
        n_jobs, longest = n_jobs * n, max(longest, (override.get_value_string(), n), key=lambda x: x[1])
    if n_jobs > MAX_JOBS:
        words = " ".join(str(o.input_line) for o in last.values() if o.is_sweep_override())
        rule = f"makes {n_jobs:,.0f} jobs, and a sweep has {MAX_JOBS:,} at most"
        yield Problem("sweep", words, rule, "sweep over fewer values at a time")


def _below(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == p or path.startswith(f"{p}.") for p in prefixes)


def _is_known(path: str, target: str) -> bool:
    if path.startswith("hydra.callbacks."):
        return _reference().get(path) == target
    return _below(path, ("hydra.launcher", "hydra.sweeper")) and re.fullmatch(TARGETS, target) is not None


@cache
def _reference() -> dict[str, Any]:
    """Return the leaves of the section `hydra` as set by conf/config.yaml and Hydra's own files."""
    tree = OmegaConf.to_container(OmegaConf.structured(HydraConf()), resolve=False)
    assert isinstance(tree, dict)
    logging = {"job_logging": "stdout", "hydra_logging": "none"}
    folder = files("hydra.conf") / "hydra"
    merged = [OmegaConf.create({k: v for k, v in tree.items() if k not in ("defaults", *logging)})]
    for group, option in logging.items():
        text = (folder / group / f"{option}.yaml").read_text(encoding="utf-8")
        merged.append(OmegaConf.create({group: OmegaConf.create(text)}))
    basic = "hydra._internal.core_plugins.basic_"
    launcher = {"_target_": f"{basic}launcher.BasicLauncher"}
    sweeper = {"_target_": f"{basic}sweeper.BasicSweeper", "max_batch_size": None, "params": None}
    merged.append(OmegaConf.create({"launcher": launcher, "sweeper": sweeper}))
    merged.append(OmegaConf.create({"env": {}}))
    merged.append(OmegaConf.load(ROOT / "conf" / "config.yaml").hydra)
    return dict(_flat(OmegaConf.to_container(OmegaConf.merge(*merged), resolve=False), "hydra"))


def _flat(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree with their full keys. Empty mappings and lists are leaves."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _flat(value, f"{path}.{name}")
    elif isinstance(tree, list) and any(isinstance(x, dict | list) for x in tree):
        for i, value in enumerate(tree):
            yield from _flat(value, f"{path}.{i}")
    else:
        yield path, tree
