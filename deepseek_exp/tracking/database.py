"""Creates a sqlite store completely or not at all.

MLflow creates its tables by dozens of migrations, which sqlite cannot roll back together: a killed process, or a full
disk, leaves a file with some of them, which MLflow rejects from then on. So a new database is created under another
name and renamed, and an incomplete one is replaced.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import mlflow.store.db.utils as mlflow_db
import sqlalchemy

from deepseek_exp.disk import fsync_path
from deepseek_exp.errors import Problem, TrackingError
from deepseek_exp.tracking.uri import sqlite_path, with_path

_VERSION = "alembic_version"
# MLflow fills these itself.
_SEEDED = {_VERSION, "experiments", "workspaces"}
# Finds experiments that MLflow did not create itself; those are created after the last migration.
_OWN_EXPERIMENTS = "SELECT 1 FROM experiments WHERE experiment_id <> 0 LIMIT 1"


def make_whole(uri: str) -> str | None:
    """Create the database of a sqlite address if it is missing or incomplete; the caller holds its lock.

    Returns:
        What became of an incomplete database, as a sentence; None if there was none.

    Raises:
        TrackingError: the database is of another version of MLflow, or incomplete but with runs or experiments.
    """
    path = sqlite_path(uri)
    if path is None:
        return None
    if not path.exists() or path.stat().st_size == 0:
        _make(uri, path)
        return None
    if not _is_half_made(path, uri):
        return None
    kept = path.with_name(f"{path.name}.half-made-{time.strftime('%Y-%m-%dT%H-%M-%S')}")
    path.rename(kept)
    _make(uri, path)
    return f"{path} was left half made, without runs; it was made again, and the old file is {kept}"


def _make(uri: str, path: Path) -> None:
    """Run MLflow's migrations on a file next to the database, and rename it."""
    new = path.with_name(f".{path.name}.new")
    _remove(new)
    engine = mlflow_db.create_sqlalchemy_engine(with_path(uri, new))
    # An incomplete file is useless, so only the end is synced to disk.
    sqlalchemy.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    try:
        mlflow_db._initialize_tables(engine)
        engine.dispose()
        fsync_path(new)
        new.rename(path)
        fsync_path(path.parent)
    finally:
        engine.dispose()
        _remove(new)


def _remove(path: Path) -> None:
    """Remove an incomplete database, and the journal of its last transaction."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _is_half_made(path: Path, uri: str) -> bool:
    """Return whether a database has some of MLflow's tables, no runs, and no experiments but MLflow's own.

    Raises:
        TrackingError: it has some of the tables, and runs or experiments.
    """
    try:
        with closing(sqlite3.connect(path)) as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not names & {_VERSION, "experiments"}:
                return False  # not MLflow's
            version = (
                connection.execute(f"SELECT version_num FROM {_VERSION}").fetchone() if _VERSION in names else None
            )
            if version == (mlflow_db._get_latest_schema_revision(),):
                return False
            rows = {n: f'SELECT 1 FROM "{n}" LIMIT 1' for n in names - _SEEDED}
            rows |= {"experiments": _OWN_EXPERIMENTS} if "experiments" in names else {}
            filled = [n for n, query in rows.items() if connection.execute(query).fetchone()]
    except sqlite3.DatabaseError:  # MLflow reports what is wrong with it
        return False
    if filled:
        rule = f"is an MLflow store of another version, or half made (revision {version[0] if version else 'none'})"
        fix = f"copy the file, then: mlflow db upgrade {uri}; or set tracking.uri=... to another store"
        raise TrackingError(Problem("tracking.uri", uri, rule, fix))
    return True
