"""Sends journal events to one MLflow run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

from deepseek_exp.tracking.connect import TAG_CHARACTERS, connect, create_run, find_run, reason, store_errors
from deepseek_exp.tracking.journal import Event
from deepseek_exp.tracking.metrics import describe
from deepseek_exp.tracking.params import cut
from deepseek_exp.tracking.rundir import Progress, Spec

_DIGEST_CHARACTERS = 36
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_Entity = Metric | Param | RunTag


class Outbox:
    """A run in the store, as the receiver of events.

    Sending an event twice is harmless. What the store rejects permanently (a name with a forbidden character, say) goes
    to `refused` and blocks nothing; every other failure is raised, for the caller to retry.

    Args:
        client: the open store.
        run: the run as it is in the store.
        refused: list that rejections are appended to, one text each.
    """

    def __init__(self, client: MlflowClient, run: Run, refused: list[str]) -> None:
        self._client = client
        self._run_id = run.info.run_id
        self._refused = refused
        self._params = dict(run.data.params)
        self._names = set(run.data.metrics)
        self._tags = dict(run.data.tags)
        self._description = self._tags.get("description", "")
        self._described = self._tags.get("mlflow.note.content")

    def send_values(self, events: Sequence[Event]) -> None:
        """Send the metrics, parameters and tags among the events."""
        metrics = [
            Metric(name, float(value), event["t"], event["step"])
            for event in events
            if event["kind"] == "metrics"
            for name, value in event["values"].items()
        ]
        self.send_metrics(metrics)
        for event in events:
            if event["kind"] == "params":
                self.send_params(event["values"])
            elif event["kind"] == "tags":
                self.send_tags(event["values"])
            elif event["kind"] == "unreadable":
                self._refused.append(f"journal line {event['line']!r}: not readable")
        self._describe()

    def send_artifacts(self, events: Sequence[Event]) -> None:
        """Send the texts, files and datasets among the events."""
        for event in events:
            if event["kind"] == "text":
                self.send_text(event["text"], event["path"])
            elif event["kind"] == "file":
                self._send_file(Path(event["path"]), event["folder"])
            elif event["kind"] == "dataset":
                self._send(
                    [event], lambda part: self._client.log_inputs(self._run_id, [_dataset(part[0])]), _event_name
                )

    def send_metrics(self, metrics: Sequence[Metric]) -> None:
        """Send metric values."""
        for part in _parts(metrics, MAX_METRICS_PER_BATCH):
            self._send(part, lambda some: self._client.log_batch(self._run_id, metrics=some), _key)
        self._names.update(metric.key for metric in metrics)

    def send_params(self, values: dict[str, str]) -> None:
        """Send parameters; one that the run has with another value is kept, and the change is recorded in a tag.

        MLflow never changes a parameter. The tag `changed_on_resume` has a line `name: old -> new` per change.
        """
        values = {name: cut(value, MAX_PARAM_VAL_LENGTH) for name, value in values.items()}
        changed = [f"{k}: {self._params[k]} -> {v}" for k, v in values.items() if self._params.get(k, v) != v]
        new = [Param(name, value) for name, value in values.items() if name not in self._params]
        for part in _parts(new, MAX_PARAMS_TAGS_PER_BATCH):
            self._send(part, lambda some: self._client.log_batch(self._run_id, params=some), _key)
        self._params.update({param.key: param.value for param in new})
        self._note_changes(changed)

    def send_tags(self, values: dict[str, str]) -> None:
        """Send tags; `description` also begins the run's description."""
        tags = [RunTag(name, cut(value, TAG_CHARACTERS)) for name, value in values.items()]
        for part in _parts(tags, MAX_PARAMS_TAGS_PER_BATCH):
            self._send(part, lambda some: self._client.log_batch(self._run_id, tags=some), _key)
        self._description = values.get("description", self._description)

    def send_text(self, text: str, path: str) -> None:
        """Write a text as the artifact `path`."""
        self._send([path], lambda part: self._client.log_text(self._run_id, text, part[0]), str)

    def go_on(self, git_tags: dict[str, str]) -> None:
        """Set an ended run back to running; the code's tags stay those of the first life, a change is noted."""
        self._client.update_run(self._run_id, status="RUNNING")
        if "error" in self._tags:
            self._client.delete_tag(self._run_id, "error")
        self._note_changes([f"{k}: {self._tags.get(k)} -> {v}" for k, v in git_tags.items() if self._tags.get(k) != v])

    def close(self, end: Event) -> None:
        """Set the final status of the run, and the error if any."""
        if end["error"]:
            self.send_tags({"error": end["error"]})
        self._client.set_terminated(self._run_id, end["status"], end["t"])

    def _note_changes(self, changes: list[str]) -> None:
        if changes:
            before = self._tags.get("changed_on_resume", "").splitlines()
            self._tags["changed_on_resume"] = "\n".join(dict.fromkeys([*before, *changes]))
            self.send_tags({"changed_on_resume": self._tags["changed_on_resume"]})

    def _describe(self) -> None:
        """Update the run's description to the metrics that it logged."""
        text = cut("\n\n".join(filter(None, [self._description, describe(self._names)])), TAG_CHARACTERS)
        if text and text != self._described:
            self.send_tags({"mlflow.note.content": text})
            self._described = text

    def _send_file(self, path: Path, folder: str | None) -> None:
        if path.is_file():
            self._send([str(path)], lambda part: self._client.log_artifact(self._run_id, part[0], folder), str)
        else:
            self._refused.append(f"file {path}: not there any more")

    def _send(self, items: list[Any], call: Callable[[list[Any]], object], name: Callable[[Any], str]) -> None:
        """Send items in one call; if the store rejects some permanently, find them by bisection."""
        try:
            call(items)
        except MlflowException as error:
            if error.error_code not in _REFUSALS or self._is_deleted():
                raise
            if len(items) == 1:
                self._refused.append(f"{name(items[0])}: {reason(error)}")
                return
            half = len(items) // 2
            self._send(items[:half], call, name)
            self._send(items[half:], call, name)

    def _is_deleted(self) -> bool:
        """Return whether the run was deleted: MLflow then rejects everything, with the same error code."""
        return bool(self._client.get_run(self._run_id).info.lifecycle_stage != "active")


def open_run(
    run_dir: Path,
    spec: Spec,
    progress: Progress,
    git_tags: dict[str, str],
    *,
    live: bool,
    on_repair: Callable[[str], object] | None = None,
) -> tuple[Outbox, int]:
    """Create the run, or find the one to continue, and send it the parameters and tags.

    Args:
        run_dir: the run's folder.
        spec: what the run is.
        progress: receives the run id; for a new run it is saved at once.
        git_tags: current git state of the source.
        live: the training process is running; a run to continue is set back to running.
        on_repair: called with a sentence if a sqlite database was incomplete.

    Returns:
        The outbox and when the run was created, milliseconds since 1970.

    Raises:
        TrackingError: the store or the run cannot be used.
    """
    client, experiment_id = connect(spec.tracking, Path(spec.artifact_dir), on_repair)
    with store_errors(spec.tracking.uri):
        progress.experiment_id = experiment_id
        if not (progress.run_id or spec.run_id):
            tags = {**_source_tags(spec), **git_tags}
            progress.run_id = create_run(client, experiment_id, spec.name, tags, spec.start_ms)
            progress.save(run_dir)
        run = find_run(client, spec.tracking, progress.run_id or str(spec.run_id))
        progress.run_id = str(run.info.run_id)
        outbox = Outbox(client, run, progress.refused)
        if live and spec.run_id:
            outbox.go_on(git_tags)
        outbox.send_tags(spec.tags)
        outbox.send_params(spec.params)
    return outbox, run.info.start_time


def _source_tags(spec: Spec) -> dict[str, str]:
    parent = {"mlflow.parentRunId": spec.tracking.parent_run_id} if spec.tracking.parent_run_id else {}
    return {"mlflow.source.name": spec.source_name, **parent}


def _parts(items: Sequence[_Entity], size: int) -> list[list[_Entity]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def _key(entity: _Entity) -> str:
    return f"{type(entity).__name__.removeprefix('Run').lower()} {entity.key!r}"


def _event_name(event: Event) -> str:
    return f"{event['kind']} {event['name']!r}"


def _dataset(event: Event) -> DatasetInput:
    dataset = Dataset(
        name=event["name"],
        digest=event["digest"][:_DIGEST_CHARACTERS],
        source_type="local",
        source=json.dumps({"uri": event["source"]}),
        profile=json.dumps(event["profile"]),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])
