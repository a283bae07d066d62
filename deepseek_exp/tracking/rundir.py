"""The files next to the journal that the training process and its sender share.

tracking.json (`Spec`) describes the run, journal.offset (`Progress`) how much of it has arrived; both are replaced
atomically, so a reader never sees a partial file.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deepseek_exp.config import Tracker, TrackingConfig

JOURNAL = "journal.jsonl"
LOG = "sender.log"
SENDER_LOCK = "sender.lock"
FACTS = "facts.json"
# The file in a sweep's folder with its run id and the keys that it sweeps over.
SWEEP_FILE = "sweep.json"
_SPEC = "tracking.json"
_PROGRESS = "journal.offset"
# The spec of a resume until it is certain to start: a resume that fails leaves the folder unchanged.
_PENDING_SPEC = "tracking.json.new"


@dataclass(frozen=True)
class Spec:
    """Description of a run; times in milliseconds since 1970, absolute paths, also in `tracking.uri`."""

    tracking: TrackingConfig
    name: str
    params: dict[str, str]
    config_yaml: str
    tags: dict[str, str]
    source_dir: str
    source_name: str
    artifact_dir: str
    run_id: str | None
    start_ms: int

    def save(self, run_dir: Path, *, pending: bool = False) -> None:
        """Write it into the run's folder; if `pending`, next to the current one until `settle`."""
        write_json(run_dir / (_PENDING_SPEC if pending else _SPEC), asdict(self))

    @staticmethod
    def settle(run_dir: Path, *, keep: bool) -> None:
        """Replace the current spec by the pending one, if any; if not `keep`, remove the pending one."""
        with suppress(FileNotFoundError):
            if keep:
                (run_dir / _PENDING_SPEC).replace(run_dir / _SPEC)
            else:
                (run_dir / _PENDING_SPEC).unlink()

    @classmethod
    def load(cls, run_dir: Path, *, pending: bool = False) -> Spec:
        """Read it from the run's folder; if `pending`, prefer the pending one."""
        path = run_dir / _PENDING_SPEC
        if not pending or not path.exists():
            path = run_dir / _SPEC
        fields = json.loads(path.read_text(encoding="utf-8"))
        tracking = TrackingConfig(**fields["tracking"])
        return cls(**{**fields, "tracking": replace(tracking, backend=Tracker(tracking.backend))})


@dataclass
class Progress:
    """How much of a run has reached the store.

    Metrics, parameters and tags are sent before artifacts, so that a broken artifact store blocks no metric: each has
    its own byte offset in the journal.
    """

    run_id: str | None = None
    values_offset: int = 0
    artifacts_offset: int = 0
    facts_sent: bool = False
    end: dict[str, Any] | None = None
    closed: bool = False
    trouble: str | None = None
    refused: list[str] = field(default_factory=list)
    experiment_id: str | None = None

    def save(self, run_dir: Path) -> None:
        """Write it into the run's folder."""
        write_json(run_dir / _PROGRESS, asdict(self))

    @classmethod
    def load(cls, run_dir: Path) -> Progress:
        """Read it from the run's folder; empty if the run was never sent."""
        path = run_dir / _PROGRESS
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()


def write_json(path: Path, content: Any) -> None:
    """Replace a file by a JSON document, atomically; only the user may read it (a store's URL may hold a password)."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file)
    Path(name).replace(path)


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a file's lock; the kernel releases it when the process dies.

    Raises:
        BlockingIOError: another process holds it and `wait` is false.
    """
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
