"""Store addresses, made absolute for other processes, and the files of sqlite addresses."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from pathlib import Path
from urllib.parse import unquote

_SQLITE = re.compile(r"(?P<scheme>sqlite(?:\+\w+)?:///)(?P<path>[^?]+)(?P<options>\?.*)?", re.DOTALL)


def absolute_uri(uri: str) -> str:
    """Make the path of a sqlite address independent of the working directory; other addresses are unchanged."""
    path = sqlite_path(uri)
    return uri if path is None else with_path(uri, path)


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a sqlite address, as SQLAlchemy reads it; None if it names no file."""
    match = _SQLITE.fullmatch(uri)
    if match is None or match["path"].startswith(("file:", ":memory:")):
        return None
    return Path(unquote(match["path"]) if _decodes() else match["path"]).resolve()


def with_path(uri: str, path: Path) -> str:
    """Return a sqlite address with another file."""
    match = _SQLITE.fullmatch(uri)
    assert match is not None
    text = str(path).replace("%", "%25").replace("?", "%3F") if _decodes() else str(path)
    return f"{match['scheme']}{text}{match['options'] or ''}"


def runs_page(server: str, experiment_id: str) -> str:
    """Return the address of an experiment's training runs in MLflow's UI, which otherwise opens with traces."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


@functools.cache
def _decodes() -> bool:
    """Return whether SQLAlchemy decodes %20 in a path to a space: it does from version 2.1 on."""
    major, minor = importlib.metadata.version("sqlalchemy").split(".")[:2]
    return (int(major), int(minor)) >= (2, 1)
