"""A sweep's jobs as children of one MLflow run, with a table of what they found.

Hydra calls these hooks; jobs may run in this process or, with another launcher, in processes of their own.
"""

from __future__ import annotations

import atexit
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from deepseek_exp import streams, tracking
from deepseek_exp.config import TrackingConfig
from deepseek_exp.errors import UserError
from deepseek_exp.redact import redact, redact_tree

SWEEP_FILE = "sweep.json"
# in the folder of a job that failed, whether or not it got as far as a run in MLflow
FAILED_FILE = "failed.txt"
# Hydra's own record of a sweep
HYDRA_FILE = "multirun.yaml"


class SweepRun(Callback):
    """Opens the parent run of a sweep and closes it with the summary table.

    Its id and the swept keys lie in the sweep's folder, where each job finds them (`job.make_job`): Hydra gives a job
    its own copy of the configuration before any hook could change it.
    """

    def __init__(self) -> None:
        self.parent_run_id: str | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Create the parent run before the first job."""
        cfg, overrides = _tracking(config), list(config.hydra.overrides.task)
        parser = OverridesParser.create()
        swept = [o for o in overrides if parser.parse_overrides([o])[0].is_sweep_override()]
        name = cfg.run_name or f"sweep {' '.join(map(redact, swept))}"
        folder = Path(config.hydra.sweep.dir)
        with _leaving_on_error():
            self.parent_run_id = tracking.start_sweep(
                cfg,
                name=name,
                tags={"overrides": " ".join(map(redact, overrides))},
                artifact_dir=Path(config.output_dir) / "artifacts",
                on_repair=lambda note: streams.write(sys.stderr, note + "\n"),
            )
            folder.mkdir(parents=True, exist_ok=True)
            content = {"run_id": self.parent_run_id, "keys": [o.lstrip("+").split("=")[0] for o in swept]}
            (folder / HYDRA_FILE).touch(0o600)  # Hydra fills it in next
            (folder / SWEEP_FILE).write_text(json.dumps(content), encoding="utf-8")
        atexit.register(self._abandon, cfg)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Hide what is secret in the configuration that Hydra has written into the sweep's folder."""
        _redact_file(Path(config.hydra.sweep.dir) / HYDRA_FILE)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print and log the table; leave with status 1 if a job failed."""
        if self.parent_run_id is None:
            return
        cfg, parent_run_id = _tracking(config), self.parent_run_id
        self.parent_run_id = None
        n_failed = len(list(Path(config.hydra.sweep.dir).glob(f"*/{FAILED_FILE}")))
        with _leaving_on_error():
            rows = tracking.sweep_table(cfg, parent_run_id)
            n_failed = max(n_failed, sum(row.status != "FINISHED" for row in rows))
            tracking.finish_sweep(cfg, parent_run_id, rows, n_failed > 0)
        sys.stdout.write(f"\n{tracking.render_table(rows)}\n\n{n_failed} of the sweep's jobs failed; ")
        sys.stdout.write(f"MLflow run {parent_run_id}\n")
        if n_failed:
            raise SystemExit(1)

    def _abandon(self, cfg: TrackingConfig) -> None:
        """Close the parent run of a sweep that was interrupted."""
        if self.parent_run_id is not None:
            tracking.finish_sweep(cfg, self.parent_run_id, tracking.sweep_table(cfg, self.parent_run_id), True)


@contextmanager
def _leaving_on_error() -> Iterator[None]:
    """Tell an error and leave with status 1: Hydra would turn it into a warning."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            streams.write(sys.stderr, traceback.format_exc())
        streams.write(sys.stderr, f"{error}\n")
        raise SystemExit(1) from error


def _redact_file(path: Path) -> None:
    """Hide what is secret in a YAML file."""
    if path.exists():
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(redact_tree(tree))), encoding="utf-8")


def _tracking(config: DictConfig) -> TrackingConfig:
    return OmegaConf.to_object(config.tracking)
