"""Opening an MLflow store, its experiment and a run; every failure becomes a TrackingError with a fix."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from deepseek_exp.config import TrackingConfig
from deepseek_exp.errors import Problem, TrackingError
from deepseek_exp.redact import redact, redact_tree
from deepseek_exp.tracking.database import make_whole
from deepseek_exp.tracking.params import cut
from deepseek_exp.tracking.rundir import lock
from deepseek_exp.tracking.uri import absolute_uri, sqlite_path

TAG_CHARACTERS = 8000
# The UI then opens the experiment with its training runs instead of with traces of language model calls.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
# MLflow's own retries take minutes; the sender has its own, and the start of a run must fail within seconds.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def connect(
    cfg: TrackingConfig, artifact_dir: Path, on_repair: Callable[[str], object] | None = None
) -> tuple[MlflowClient, str]:
    """Open the store; create a missing sqlite database or experiment.

    Args:
        cfg: `uri` and `experiment` are used.
        artifact_dir: where a database store keeps artifacts; a server decides that itself.
        on_repair: called with a sentence if a sqlite database was incomplete.

    Returns:
        The client and the id of the experiment.

    Raises:
        TrackingError: the store cannot be reached or used, or the experiment is deleted.
    """
    client = open_store(cfg, on_repair)
    with store_errors(cfg.uri), _database_lock(cfg.uri):
        return client, _experiment(client, cfg, artifact_dir)


def open_store(cfg: TrackingConfig, on_repair: Callable[[str], object] | None = None) -> MlflowClient:
    """Open the store of `cfg.uri`; create a sqlite database that is missing or incomplete.

    Args:
        cfg: `uri` is used.
        on_repair: called with a sentence if a database was incomplete.

    Raises:
        TrackingError: the store cannot be reached or used.
    """
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    with store_errors(cfg.uri), _database_lock(cfg.uri):
        note = make_whole(absolute_uri(cfg.uri))
        client = MlflowClient(absolute_uri(cfg.uri))
        client.get_experiment_by_name(cfg.experiment)  # the first request to a server, or schema query
    if note and on_repair:
        on_repair(note)
    return client


def find_run(client: MlflowClient, cfg: TrackingConfig, run_id: str) -> Run:
    """Fetch the run to resume.

    Raises:
        TrackingError: there is no such run, or it is deleted.
    """
    uri = redact(cfg.uri)
    new_run = "or record what follows as a new run with tracking.new_run=true"
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        fix = f"set tracking.uri=... to the store that has it, {new_run}"
        raise TrackingError(Problem("resume", run_id, f"is not an MLflow run of tracking.uri='{uri}'", fix)) from error
    if run.info.lifecycle_stage != "active":
        fix = f"restore it (MLFLOW_TRACKING_URI={uri} mlflow runs restore --run-id {run_id}), {new_run}"
        raise TrackingError(Problem("resume", run_id, f"is a deleted MLflow run of tracking.uri='{uri}'", fix))
    return run


def create_run(client: MlflowClient, experiment_id: str, name: str, tags: dict[str, str], start_ms: int) -> str:
    """Create a run with its name, user and tags; return its id."""
    full = {"mlflow.user": _user(), "mlflow.source.type": "LOCAL", **tags}
    shortened = {key: cut(value, TAG_CHARACTERS) for key, value in redact_tree(full).items()}
    run = client.create_run(experiment_id, start_time=start_ms, tags=shortened, run_name=redact(name))
    return str(run.info.run_id)


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Convert any exception of a store's driver to a TrackingError."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise _store_error(uri, error) from error


def reason(error: BaseException) -> str:
    """Return why a call failed: the operating system's reason if any, else the first line of the message."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConnectionError, TimeoutError)) and type(cause).__module__ == "builtins":
            return (cause.strerror or str(cause) or type(cause).__name__).lower()
        if isinstance(cause, OSError) and type(cause).__module__ == "socket":
            return str(cause.strerror).lower()
        cause = cause.__cause__ or cause.__context__
    first_line = (str(error).strip().splitlines() or [""])[0]
    return redact(first_line) or type(error).__name__


def _store_error(uri: str, error: Exception) -> TrackingError:
    """Return the error for a store failure: the reason below MLflow's wrapping, and a fix."""
    if uri.startswith(("http://", "https://")):
        rule, fix = f"does not answer ({reason(error)})", "start that server"
    else:
        rule, fix = f"cannot be used ({reason(error)})", "check that the database exists and is writable"
    fix += ", or set tracking.uri=sqlite:///outputs/mlflow.db"
    return TrackingError(Problem("tracking.uri", redact(uri), rule, fix))


def _experiment(client: MlflowClient, cfg: TrackingConfig, artifact_dir: Path) -> str:
    found = client.get_experiment_by_name(cfg.experiment)
    if found is None:
        location = None if cfg.uri.startswith(("http://", "https://")) else artifact_dir.resolve().as_uri()
        try:
            created = client.create_experiment(cfg.experiment, artifact_location=location, tags=_EXPERIMENT_TAGS)
            return str(created)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(cfg.experiment)  # another run created it first
    if found.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        fix = f"take another name, or restore it (MLFLOW_TRACKING_URI={redact(cfg.uri)} {restore})"
        raise TrackingError(Problem("tracking.experiment", cfg.experiment, "is deleted in the store", fix))
    return str(found.experiment_id)


def _database_lock(uri: str) -> AbstractContextManager[None]:
    """Let one process at a time create what is missing in a sqlite database, including its folder."""
    database = sqlite_path(uri)
    if database is None:
        return nullcontext()
    database.parent.mkdir(parents=True, exist_ok=True)
    return lock(database.with_name(database.name + ".lock"), wait=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())
