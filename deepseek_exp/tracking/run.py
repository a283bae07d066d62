"""A run as the training process sees it: events go to the journal, a second process sends them to MLflow."""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deepseek_exp.config import ROOT, Tracker, TrackingConfig
from deepseek_exp.errors import Problem, TrackingError
from deepseek_exp.redact import redact, redact_tree
from deepseek_exp.tracking.journal import JournalWriter, copy_metrics, encode_float, metric_events, read_events
from deepseek_exp.tracking.metrics import check_names
from deepseek_exp.tracking.params import flatten
from deepseek_exp.tracking.rundir import JOURNAL, LOG, Progress, Spec
from deepseek_exp.tracking.uri import absolute_uri

_SENDER = "deepseek_exp.tracking.sender"
_EXIT_SECONDS = 2.0


@dataclass(frozen=True)
class Delivery:
    """Whether everything that a run logged is in the store; if not, `message` says what is where and how to send it."""

    arrived: bool
    run_id: str | None
    message: str


class RunLog:
    """What a training process logs. It writes lines to a file, never waits for MLflow and never fails with it."""

    def __init__(self, run_dir: Path, journal: JournalWriter) -> None:
        """Internal; use `attach` or `TrackedRun.start`."""
        self.run_dir = run_dir
        self._journal = journal
        self._known: set[tuple[str, int, float | str]] = set()

    @classmethod
    def attach(cls, run_dir: Path, *, records: bool) -> RunLog:
        """Log to the run of another process, which started it, waits, and will finish it.

        Args:
            run_dir: the run's folder.
            records: if False, discard what is logged, because another process records the same.
        """
        run_dir = run_dir.resolve()
        return cls(run_dir, JournalWriter(run_dir / JOURNAL if records else Path(os.devnull), held_by_another=True))

    def skip_known_after(self, step: int) -> None:
        """After a resume, skip metrics for later steps that the journal already holds with the same value.

        Args:
            step: the step that a resumed run continues from; its earlier life has logged the steps that it repeats.
        """
        for event in metric_events(self.run_dir / JOURNAL):
            if event["step"] > step:
                self._known.update((name, event["step"], value) for name, value in event["values"].items())

    def logged(self, name: str) -> dict[int, float]:
        """Return what was logged of a metric: step -> the last value."""
        events = metric_events(self.run_dir / JOURNAL)
        return {e["step"]: float(e["values"][name]) for e in events if name in e["values"]}

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics of a step; their names are in `METRICS`.

        Raises:
            ValueError: a name is not in the table.
        """
        check_names(values)
        self.log_foreign_metrics(values, step)

    def log_foreign_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record metrics whose names third-party code chose."""
        numbers = {name: float(value) for name, value in values.items()}
        if self._known:
            numbers = {k: v for k, v in numbers.items() if (k, step, encode_float(v)) not in self._known}
        if numbers:
            self._journal.metrics(numbers, step)

    def log_params(self, values: dict[str, Any]) -> None:
        """Record further parameters; trees become dotted names."""
        self._journal.params(flatten(values))

    def log_tags(self, values: dict[str, str]) -> None:
        """Record tags; the tag `description` begins the run's description."""
        self._journal.tags(redact_tree(values))

    def log_text(self, text: str, artifact_path: str) -> None:
        """Record a text as an artifact."""
        self._journal.text(redact(text), artifact_path)

    def log_file(self, path: Path, artifact_folder: str | None = None) -> None:
        """Record a file as an artifact; it must not be moved until it has been sent."""
        self._journal.file(path.resolve(), artifact_folder)

    def log_dataset(self, name: str, context: str, digest: str, source: str, profile: dict[str, Any]) -> None:
        """Record a dataset that the run uses.

        Args:
            name: its name.
            context: its use, such as `training` or `validation`.
            digest: hash of its content; MLflow keeps the first 36 characters.
            source: path or address that it came from.
            profile: its size in numbers.
        """
        fields = {"name": name, "context": context, "digest": digest, "source": source, "profile": profile}
        self._journal.dataset(redact_tree(fields))


class TrackedRun(RunLog):
    """A run that is recorded, from its start to its end: a separate process sends the journal to MLflow.

    With `tracking.backend=none` there is no such process, and the journal is the only record.

    Attributes:
        notes: remarks about the store after `wait_ready` has returned, one sentence each.
    """

    def __init__(self, run_dir: Path, spec: Spec, journal: JournalWriter) -> None:
        """Internal; use `start`."""
        super().__init__(run_dir, journal)
        self._spec = spec
        self.notes: list[str] = []
        self._taken_back = False
        self._began_at = journal.size_before
        log = run_dir / LOG
        self._log_size = log.stat().st_size if log.exists() else 0
        self._process = _start_sender(run_dir) if spec.tracking.backend is Tracker.mlflow else None

    @classmethod
    def start(
        cls,
        cfg: TrackingConfig,
        *,
        run_dir: Path,
        name: str,
        params: dict[str, Any],
        config_yaml: str,
        tags: dict[str, str],
        source_dir: Path,
        artifact_dir: Path,
        run_id: str | None = None,
        continues: tuple[str, int] | None = None,
    ) -> TrackedRun:
        """Begin to record a run; returns at once, see `wait_ready`.

        Args:
            cfg: the store, the experiment, further tags and the parent run.
            run_dir: folder of this run only; the journal goes there, and a resumed run uses it again.
            name: name of the run.
            params: the configuration as a tree or with dotted names; each leaf becomes a parameter.
            config_yaml: the composed configuration, stored as config.yaml.
            tags: tags of the run; those of `cfg` take precedence.
            source_dir: folder whose git state is recorded.
            artifact_dir: where a database store keeps artifacts; a server decides that itself.
            run_id: run to continue; None means a new one. `run_dir` is unchanged if it cannot be continued.
            continues: MLflow run and step that a new run continues from; become tags. `copy_history` can begin its
                journal beforehand.

        Raises:
            TrackingError: `run_dir` belongs to another run, or a process is writing there.
        """
        run_dir = run_dir.resolve()
        run_dir.mkdir(parents=True, exist_ok=True)
        _check_owner(run_dir, run_id)
        try:
            journal = JournalWriter(run_dir / JOURNAL)
        except BlockingIOError as error:
            fix = "wait for that process to end, or stop it"
            raise TrackingError(Problem("run_dir", str(run_dir), "is in use by another process", fix)) from error
        spec = Spec(
            tracking=replace(cfg, uri=absolute_uri(cfg.uri)),
            name=redact(name),
            params=flatten(params),
            config_yaml=redact(config_yaml),
            tags=redact_tree({**tags, **cfg.tags}) | _continues_tags(continues),
            source_dir=str(source_dir.resolve()),
            source_name=sys.argv[0],
            artifact_dir=str(artifact_dir.resolve()),
            run_id=run_id,
            start_ms=time.time_ns() // 1_000_000,
        )
        spec.save(run_dir, pending=run_id is not None)
        journal.start()
        return cls(run_dir, spec, journal)

    def wait_ready(self, timeout_seconds: float) -> str:
        """Wait until the run is in the store, if there is one; return its run id.

        Raises:
            TrackingError: the store cannot be reached or used, the run to continue does not exist, or there is no
                answer within `timeout_seconds`. Nothing is being sent then, and the folder of a run that was to be
                continued is as it was before `start`.
        """
        if self._process is None:
            run_id = self._spec.run_id or uuid.uuid4().hex
            replace(Progress.load(self.run_dir), run_id=run_id).save(self.run_dir)
            Spec.settle(self.run_dir, keep=True)
            return run_id
        try:
            run_id = self._answer(timeout_seconds)
        except TrackingError:
            if self._spec.run_id is not None:
                self._take_back()
            raise
        if self._spec.run_id is not None:
            Spec.settle(self.run_dir, keep=True)
            with suppress(BrokenPipeError):  # the sender has died: `finish` reports it
                self._process.stdin.write(b"\n")  # type: ignore[union-attr]
                self._process.stdin.flush()  # type: ignore[union-attr]
        return run_id

    def _take_back(self) -> None:
        """Restore the folder of a run that cannot be continued."""
        self._process.kill()
        self._process.wait()
        Spec.settle(self.run_dir, keep=False)
        os.truncate(self.run_dir / LOG, self._log_size)
        self._journal.take_back()
        self._taken_back = True

    def _answer(self, timeout_seconds: float) -> str:
        """Wait for the sender's answer; return the run id."""
        uri = redact(self._spec.tracking.uri)
        answers = self._process.stdout
        assert answers is not None
        if not select.select([answers], [], [], timeout_seconds)[0]:
            self._process.kill()
            rule, fix = f"did not answer within {timeout_seconds:g} seconds", "see whether that store is up"
            raise TrackingError(Problem("tracking.uri", uri, rule, f"{fix}; {self.run_dir / LOG} has the details"))
        line = answers.readline()
        answers.close()
        if not line:
            rule = "could not be opened (the sending process ended)"
            raise TrackingError(Problem("tracking.uri", uri, rule, f"read {self.run_dir / LOG}"))
        answer = json.loads(line)
        if "problem" in answer:
            raise TrackingError(Problem(**answer["problem"]))
        self.notes = answer["notes"]
        return str(answer["run_id"])

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"], error: str | None) -> Delivery:
        """End the run; wait until everything is in the store, or nothing has arrived there for `drain_seconds`.

        Args:
            status: how the run ended.
            error: what went wrong; becomes the tag `error`.
        """
        if not self._taken_back:
            self._journal.end(status, None if error is None else redact(error))
        self._journal.close()
        if self._process is None:
            return Delivery(True, Progress.load(self.run_dir).run_id, "")
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._taken_back:
            return Delivery(True, None, "")
        self._wait_for_sender()
        return self._delivery(Progress.load(self.run_dir))

    def _wait_for_sender(self) -> None:
        """Wait for the sender to end; terminate it if nothing has arrived for longer than it may wait itself."""
        patience = self._spec.tracking.drain_seconds + _EXIT_SECONDS
        seen, since = None, time.monotonic()
        while self._process.poll() is None:
            progress = Progress.load(self.run_dir)
            if progress != seen:
                seen, since = progress, time.monotonic()
            if time.monotonic() - since > patience:
                self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)

    def _delivery(self, progress: Progress) -> Delivery:
        size = (self.run_dir / JOURNAL).stat().st_size
        sent = progress.closed and progress.facts_sent
        sent = sent and min(progress.values_offset, progress.artifacts_offset) == size
        parts = []
        if not sent:
            if progress.run_id is None and not any(_count_from(self.run_dir / JOURNAL, self._began_at, self._began_at)):
                return Delivery(False, None, "")  # the store did not open, as `wait_ready` said; nothing is lost
            values, artifacts = _count_from(self.run_dir / JOURNAL, progress.values_offset, progress.artifacts_offset)
            parts.append(
                f"{values} metric values and {artifacts} artifacts have not reached "
                f"{redact(self._spec.tracking.uri)} ({progress.trouble or 'no time left'}). "
                f"They are in {self.run_dir / JOURNAL}. Send them later with: {_command(self.run_dir)}"
            )
        if progress.refused:
            parts.append("The store refused for good: " + "; ".join(progress.refused))
        return Delivery(sent and not progress.refused, progress.run_id, "\n".join(parts))


def copy_history(old_run_dir: Path, new_run_dir: Path, last_step: int) -> None:
    """Begin the journal of a new run with the metrics of the run that it continues, so that it shows the whole curve.

    Times and values are those of the old run; its parameters, tags and artifacts are left out. A checkpoint that was
    copied without its run's folder has no such metrics, and the new run begins with its own.

    Args:
        old_run_dir: folder of the run that is continued.
        new_run_dir: folder of the new run; created if missing. An existing journal is left unchanged.
        last_step: step that the new run continues from; metrics of later steps are left out.
    """
    new_run_dir.mkdir(parents=True, exist_ok=True)
    source, target = old_run_dir / JOURNAL, new_run_dir / JOURNAL
    if source.is_file() and not target.exists():  # the ranks of a job file may be started a second time
        copy_metrics(source, target, last_step)


def _continues_tags(continues: tuple[str, int] | None) -> dict[str, str]:
    if continues is None:
        return {}
    run_id, step = continues
    return {"continues.run_id": run_id, "continues.step": str(step)}


def _check_owner(run_dir: Path, run_id: str | None) -> None:
    owner = Progress.load(run_dir).run_id
    if owner not in (None, run_id):
        fix = f"use another folder, or continue that run (resume={owner})"
        raise TrackingError(Problem("run_dir", str(run_dir), f"is the folder of MLflow run {owner}", fix))


def _start_sender(run_dir: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", _SENDER, str(run_dir), "--live", str(os.getpid())]
    (run_dir / LOG).touch(0o600)
    with (run_dir / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )


def _command(run_dir: Path) -> str:
    return f"cd {shlex.quote(str(ROOT))} && {shlex.quote(sys.executable)} -m {_SENDER} {shlex.quote(str(run_dir))}"


def _count_from(journal: Path, values_offset: int, artifacts_offset: int) -> tuple[int, int]:
    """Count the metric values and the artifacts in the journal after two byte offsets."""
    values = artifacts = 0
    offset, events = values_offset, [{"kind": "begin"}]
    while events:
        events, offset = read_events(journal, offset)
        values += sum(len(event["values"]) for event in events if event["kind"] == "metrics")
    offset, events = artifacts_offset, [{"kind": "begin"}]
    while events:
        events, offset = read_events(journal, offset)
        artifacts += sum(event["kind"] in ("text", "file", "dataset") for event in events)
    return values, artifacts
