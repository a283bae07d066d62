"""A sweep's jobs as children of one MLflow run, with a table of what they found.

Hydra calls these hooks; jobs may run in this process or, with another launcher, in processes of their own.
"""

from __future__ import annotations

import atexit
import json
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from deepseek_exp import tracking
from deepseek_exp.config import TrackingConfig
from deepseek_exp.errors import TrackingError

SWEEP_FILE = "sweep.json"


class SweepRun(Callback):
    """Opens the parent run of a sweep and closes it with the summary table.

    Its id lies in the sweep's folder, where each job finds it (`do.make_job`): Hydra gives a job its own copy of the
    configuration before any hook could change it.
    """

    def __init__(self) -> None:
        self.parent_run_id: str | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Create the parent run before the first job."""
        cfg, overrides = _tracking(config), " ".join(config.hydra.overrides.task)
        name = cfg.run_name or f"sweep {overrides}"
        try:
            self.parent_run_id = tracking.start_sweep(
                cfg, name=name, tags={"overrides": overrides}, artifact_dir=Path(config.output_dir) / "artifacts"
            )
        except TrackingError as error:
            sys.stderr.write(f"{error}\n")
            raise SystemExit(1) from error
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SWEEP_FILE).write_text(json.dumps({"run_id": self.parent_run_id}))
        atexit.register(self._abandon, cfg)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print and log the table; leave with status 1 if a job failed."""
        if self.parent_run_id is None:
            return
        cfg = _tracking(config)
        rows = tracking.sweep_table(cfg, self.parent_run_id)
        failed = [row for row in rows if row.status != "FINISHED"]
        tracking.finish_sweep(cfg, self.parent_run_id, rows, bool(failed))
        sys.stdout.write(f"\n{tracking.render_table(rows)}\n")
        sys.stdout.write(f"\n{len(rows) - len(failed)} of {len(rows)} jobs finished; MLflow run {self.parent_run_id}\n")
        self.parent_run_id = None
        if failed:
            raise SystemExit(1)

    def _abandon(self, cfg: TrackingConfig) -> None:
        """Close the parent run of a sweep that was interrupted."""
        if self.parent_run_id is not None:
            tracking.finish_sweep(cfg, self.parent_run_id, tracking.sweep_table(cfg, self.parent_run_id), True)


def _tracking(config: DictConfig) -> TrackingConfig:
    return OmegaConf.to_object(config.tracking)
