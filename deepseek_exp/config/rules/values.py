"""Rules for strings, paths and names: not empty, within file system and database limits, no control characters."""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from collections.abc import Collection, Iterator
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from deepseek_exp.config import ExperimentConfig, Tracker
from deepseek_exp.errors import Problem

# Strings that may be empty.
MAY_BE_EMPTY = ("sample.prompt",)
# Keys that hold a path. Those in `EXPANDED` may begin with ~.
EXPANDED = (
    *("data.path", "data.valid_path", "data.tokenizer", "data.template", "lora.path"),
    "chain.yardstick.path",
    *("evaluate.folder", "evaluate.texts"),
)
PATHS = (*EXPANDED, "output_dir", "resume", "init_from", "data.cache_dir", "export.path", "evaluate.agree_with")
# Names of runs, folders and experiments, with the maximum length of each (MLflow's databases accept 250 characters).
NAMES = {"model.version": 100, "tracking.run_name": 250, "tracking.experiment": 250}
LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes that file systems accept
LONGEST_TAG = 5000  # characters that MLflow's databases accept
TRACKING_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")


def text_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems for strings that would be misread, or that no file system or database accepts."""
    for path, optional, value in _texts(exp, ""):
        if not value.strip() and path not in MAY_BE_EMPTY:
            fix = f"set {path}=null, or leave {path} out" if optional else f"leave {path} out"
            yield Problem(path, value, "is empty", fix)
        elif "\0" in value:
            yield Problem(path, value, "holds a null character, which ends a text", "remove it")
        elif path in PATHS:
            yield from path_problems(path, value)
        elif path in NAMES:
            yield from _name(path, value)
    yield from _tags(exp.tracking.tags)


def _texts(section: Any, prefix: str) -> Iterator[tuple[str, bool, str]]:
    """Yield the strings of a section as (key, whether it may be null, value)."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _texts(value, f"{prefix}{field.name}.")
        elif isinstance(value, str) and not isinstance(value, Enum):
            yield prefix + field.name, "None" in str(field.type), value


def is_file(path: str | Path) -> bool:
    """Return whether a path is a file; False if it cannot be accessed."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder; False if it cannot be accessed."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def path_problems(key: str, path: str) -> Iterator[Problem]:
    """Yield a problem if the text is not a valid path."""
    longest = max((len(os.fsencode(part)) for part in Path(path).parts), default=0)
    total = len(os.fsencode(path))
    if "\0" in path:
        yield Problem(key, path, "holds a null character, which ends a text", "remove it")
    elif longest > LONGEST_NAME:
        rule = f"has a name of {longest:,} bytes, and file systems take {LONGEST_NAME}"
        yield Problem(key, path, rule, "use shorter names")
    elif total > LONGEST_PATH:
        rule = f"has {total:,} bytes, and a path has {LONGEST_PATH:,} at most"
        yield Problem(key, path, rule, "use a shorter path")
    elif path.startswith("~") and key not in EXPANDED:
        rule = "begins with ~, which a shell replaces and this key does not"
        yield Problem(key, path, rule, f"use {key}={os.path.expanduser(path)}")  # noqa: PTH111 - as a shell does


def _name(key: str, name: str) -> Iterator[Problem]:
    if not name.isprintable():
        rule = "holds control characters, which would move the cursor of a terminal"
        yield Problem(key, name, rule, "use letters, digits and punctuation")
    elif len(name) > NAMES[key]:
        rule = f"has {len(name):,} characters, and at most {NAMES[key]} are kept"
        yield Problem(key, name, rule, "use a shorter name; sample text and notes fit into +tracking.tags.note=...")


def _tags(tags: dict[str, str]) -> Iterator[Problem]:
    for tag, value in tags.items():
        key, plain = f"tracking.tags.{tag}", re.fullmatch(r"[\w.\-/ :]{1,250}", str(tag))
        if not plain or posixpath.normpath(tag) != tag or tag.startswith(("/", ".")):
            rule = "is not a name of letters, digits and _-./: within 250 characters, which MLflow asks for"
            yield Problem("tracking.tags", tag, rule, "rename the tag")
        elif len(value) > LONGEST_TAG:
            rule = f"has {len(value):,} characters, and a tag has {LONGEST_TAG:,} at most"
            yield Problem(key, value, rule, "shorten it")


def tracking_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem if tracking.uri is not a valid store address."""
    uri = exp.tracking.uri
    if exp.tracking.backend is Tracker.none:
        return
    if "://" not in uri:  # the text before an @ may be a password
        uri = re.sub(r".*@", "***@", uri, flags=re.DOTALL)
    try:
        parts = urlparse(uri)
        scheme, host = parts.scheme.split("+")[0], parts.hostname
    except ValueError:  # its message may contain a part of the password
        yield Problem("tracking.uri", uri, "is no address", "use the form http://host:port")
        return
    if scheme not in TRACKING_SCHEMES:
        rule = f"has no scheme of {', '.join(TRACKING_SCHEMES)} (MLflow no longer has a file store)"
        fix = "set tracking.uri=sqlite:///outputs/mlflow.db or a server's http address"
        yield Problem("tracking.uri", uri, rule, fix)
    elif scheme in ("http", "https") and not host:
        yield Problem("tracking.uri", uri, "names no host", "use the form http://host:port")
    elif scheme == "sqlite":
        yield from _sqlite(uri)


def untracked_problems(exp: ExperimentConfig, named: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each key of the MLflow store that the command line sets although there is none."""
    if exp.tracking.backend is Tracker.none:
        for name in ("uri", "experiment", "parent_run_id", "system_metrics", "drain_seconds"):
            path = f"tracking.{name}"
            if path in named:
                rule = "has no effect while tracking.backend='none'"
                yield Problem(path, getattr(exp.tracking, name), rule, f"leave {path} out, or set tracking=mlflow")


def _sqlite(uri: str) -> Iterator[Problem]:
    address, _, options = uri.partition("?")
    name = re.sub(r"^sqlite(\+\w+)?:///", "", address)
    fix = "use the form sqlite:///folder/file.db; an absolute path makes it four slashes"
    if options and not re.fullmatch(r"\w+=[^/]*(&\w+=[^/]*)*", options):
        rule = f"is read as the file {address!r} with options, since a `?` begins options"
        yield Problem("tracking.uri", uri, rule, "use a path, and an output_dir, without `?`")
    elif name == address or not name.strip("/") or name == ":memory:":
        yield Problem("tracking.uri", uri, "names no file", fix)
    elif len(os.fsencode(name)) > LONGEST_PATH or any(len(os.fsencode(p)) > LONGEST_NAME for p in Path(name).parts):
        yield from path_problems("tracking.uri", name)
    elif is_folder(name):
        yield Problem("tracking.uri", uri, "is a folder and not a file", fix)
    else:
        there = next((p for p in Path(name).absolute().parents if os.path.lexists(p)), Path("/"))
        if not is_folder(there):
            rule = f"lies below {there}, which is no folder that can be used"
            yield Problem("tracking.uri", uri, rule, "name a file in a folder")
