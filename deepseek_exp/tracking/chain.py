"""The MLflow run of a chain: the parent of the runs of its stages, with the table of their results.

Used by the process that starts the stages: it talks to MLflow directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_exp.config import TrackingConfig
from deepseek_exp.redact import redact
from deepseek_exp.tracking.params import cut

if TYPE_CHECKING:
    from mlflow import MlflowClient


class ChainRun:
    """The open run of a chain.

    Attributes:
        run_id: its MLflow run, the `parent_run_id` of each stage.
    """

    def __init__(self, client: MlflowClient, cfg: TrackingConfig, experiment_id: str, run_id: str) -> None:
        """Internal; use `open`."""
        self._client, self._cfg, self._experiment_id, self.run_id = client, cfg, experiment_id, run_id

    @classmethod
    def start(
        cls,
        cfg: TrackingConfig,
        *,
        name: str,
        tags: dict[str, str],
        artifact_dir: Path,
        run_id: str | None,
        on_repair: Callable[[str], object],
    ) -> ChainRun:
        """Create the run of a chain, or continue the one of an earlier start if the store still has it.

        Args:
            cfg: the store, the experiment and further tags.
            name: name of the run.
            tags: tags of the run.
            artifact_dir: where a database store keeps artifacts; a server decides that itself.
            run_id: run of an earlier start; None if there was none.
            on_repair: called with a sentence if a sqlite database was incomplete.

        Raises:
            TrackingError: the store cannot be reached or used.
        """
        from mlflow.exceptions import MlflowException

        from deepseek_exp.tracking.connect import connect, create_run, store_errors

        client, experiment_id = connect(cfg, artifact_dir, on_repair)
        with store_errors(cfg.uri):
            if run_id is not None:
                with suppress(MlflowException):  # it was deleted, or is in another store
                    client.update_run(run_id, status="RUNNING")
                    return cls(client, cfg, experiment_id, run_id)
            made = create_run(client, experiment_id, name, {**tags, **cfg.tags}, time.time_ns() // 1_000_000)
        return cls(client, cfg, experiment_id, made)

    def add_reused(self, name: str, tags: dict[str, str], metrics: Mapping[str, float]) -> None:
        """Record a stage that is not run again as a short run with the tag `reused_from`."""
        from deepseek_exp.tracking.connect import create_run, store_errors

        with store_errors(self._cfg.uri):
            tags = {**tags, "mlflow.parentRunId": self.run_id}
            run_id = create_run(self._client, self._experiment_id, name, tags, time.time_ns() // 1_000_000)
            for key, value in metrics.items():
                self._client.log_metric(run_id, key, value)
            self._client.set_terminated(run_id, "FINISHED")

    def register(self, model: str, alias: str, checkpoint: Path, run_id: str) -> str | None:
        """Register a checkpoint as a version of a model, with the stage's name as its alias.

        Returns:
            Why the store does not take it; None if it does.
        """
        from mlflow.exceptions import MlflowException

        from deepseek_exp.tracking.connect import reason

        try:
            with suppress(MlflowException):  # it exists already
                self._client.create_registered_model(model)
            source = checkpoint.resolve().as_uri()
            known = self._client.search_model_versions(f"name='{model}'")
            version = next((v for v in known if v.source == source and v.run_id == run_id), None)
            version = version or self._client.create_model_version(model, source, run_id)
            self._client.set_registered_model_alias(model, alias, version.version)
        except MlflowException as error:
            return reason(error)
        return None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of a stage, whose number is the step."""
        from deepseek_exp.tracking.connect import store_errors

        with store_errors(self._cfg.uri):
            for key, value in metrics.items():
                self._client.log_metric(self.run_id, key, value, step=step)

    def finish(self, status: str, texts: Mapping[str, str], note: str, error: str | None = None) -> None:
        """Store the table and end the run.

        Args:
            status: FINISHED, FAILED or KILLED.
            texts: artifact path -> content.
            note: description of the run.
            error: what went wrong; becomes the tag `error`.
        """
        from deepseek_exp.tracking.connect import TAG_CHARACTERS, store_errors

        with store_errors(self._cfg.uri):
            for path, text in texts.items():
                self._client.log_text(self.run_id, redact(text), path)
            self._client.set_tag(self.run_id, "mlflow.note.content", cut(redact(note), TAG_CHARACTERS))
            if error is not None:
                self._client.set_tag(self.run_id, "error", cut(redact(error), TAG_CHARACTERS))
            self._client.set_terminated(self.run_id, status)
