"""Record the jobs of a sweep as children of one MLflow run, with a summary table.

Hydra calls these hooks. Jobs may run in this process or, with another launcher, in separate processes.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from deepseek_exp import console, tracking
from deepseek_exp.commands import sweep_rest
from deepseek_exp.commands.next_commands import OUTPUTS, override, words
from deepseek_exp.config import Tracker, TrackingConfig
from deepseek_exp.console import command, say
from deepseek_exp.disk import check_writable, disk_error
from deepseek_exp.errors import UserError
from deepseek_exp.redact import redact, redact_tree
from deepseek_exp.tracking.rundir import SWEEP_FILE

# A file in the folder of a failed job, whether or not it has a run in MLflow.
FAILED_FILE = "failed.txt"
# Hydra's own record of a sweep.
HYDRA_FILE = "multirun.yaml"
# Verbs that are not recorded in MLflow.
UNRECORDED = ("plan", "sample", "export")


class SweepRun(Callback):
    """Open the parent run of a sweep, and close it with the summary table.

    Its id and the swept keys are in a file in the sweep's folder, where each job finds them (`job.make_job`), because
    Hydra copies the configuration for each job before any hook could change it.
    """

    def __init__(self) -> None:
        self.parent_run_id: str | None = None
        self.is_local = False  # the jobs are recorded in their folders only
        self.n_started = 0
        self.ended = False

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Create the parent run before the first job, if the jobs are recorded."""
        cfg, overrides = _tracking(config), list(config.hydra.overrides.task)
        swept = [o for o in overrides if _parsed(o).is_sweep_override()]
        name = cfg.run_name or f"sweep {' '.join(map(redact, swept))}"
        folder = Path(config.hydra.sweep.dir)
        with _leaving_on_error(config.output_dir):
            check_writable("hydra.sweep.dir", folder)
            self.is_local = _recorded(overrides) and cfg.backend is Tracker.none
            if _recorded(overrides) and not self.is_local:
                self.parent_run_id = tracking.start_sweep(
                    cfg,
                    name=name,
                    tags={"overrides": " ".join(map(redact, overrides))},
                    artifact_dir=Path(config.output_dir) / "artifacts",
                    on_repair=lambda note: console.write(sys.stderr, note + "\n"),
                )
            folder.mkdir(parents=True, exist_ok=True)
            content = {"run_id": self.parent_run_id, "keys": [o.lstrip("+").split("=")[0] for o in swept]}
            (folder / HYDRA_FILE).touch(0o600)  # Hydra writes to it next
            with (folder / SWEEP_FILE).open("x", encoding="utf-8") as file:  # no two sweeps share a folder
                json.dump(content, file)
        atexit.register(self._abandon, config)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Redact the configuration that Hydra has written into the sweep's folder."""
        if OmegaConf.is_missing(config.hydra.job, "num"):  # Hydra calls this for a run without a sweep too
            return
        self.n_started = config.hydra.job.num + 1
        _redact_file(Path(config.hydra.sweep.dir) / HYDRA_FILE)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print and log the table. Exit with status 1 if a job failed."""
        if self.ended:
            return
        self.ended = True
        rows: list[tracking.SweepRow] = []
        n_failed = len(list(Path(config.hydra.sweep.dir).glob(f"*/{FAILED_FILE}")))
        if self.parent_run_id is not None:
            with _leaving_on_error(config.output_dir):
                cfg, rows = _tracking(config), tracking.sweep_table(_tracking(config), self.parent_run_id)
                n_failed = max(n_failed, sum(row.status != "FINISHED" for row in rows))
                tracking.finish_sweep(cfg, self.parent_run_id, rows, n_failed > 0)
        elif self.is_local:
            rows = tracking.local_sweep_table(Path(config.hydra.sweep.dir))
            n_failed = max(n_failed, sum(row.status != "FINISHED" for row in rows))
        if self.parent_run_id is not None or self.is_local:
            say(f"\n{tracking.render_table(rows)}\n")
        if self.parent_run_id is not None or self.is_local or n_failed:
            recorded = f"; MLflow run {self.parent_run_id}" if self.parent_run_id is not None else ""
            n_jobs = sweep_rest.n_jobs(list(config.hydra.overrides.task))
            say(f"{f'{n_failed} of {n_jobs} jobs failed' if n_failed else f'all {n_jobs} jobs finished'}{recorded}")
            say(_next_words(config, rows))
        if n_failed:
            raise SystemExit(1)

    def _abandon(self, config: DictConfig) -> None:
        """Close an interrupted sweep: print its results so far, and the commands that run the remaining jobs."""
        if self.ended:
            return
        self.ended = True
        if self.parent_run_id is not None:
            cfg, rows = _tracking(config), tracking.sweep_table(_tracking(config), self.parent_run_id)
            tracking.finish_sweep(cfg, self.parent_run_id, rows, True)
            say(f"\n{tracking.render_table(rows)}\n")
        elif self.is_local:
            say(f"\n{tracking.render_table(tracking.local_sweep_table(Path(config.hydra.sweep.dir)))}\n")
        say(self._interrupted(config))

    def _interrupted(self, config: DictConfig) -> str:
        """Return in which job a sweep was interrupted, and the commands that run the remaining jobs."""
        overrides = list(config.hydra.overrides.task)
        n_jobs, n_done = sweep_rest.n_jobs(overrides), self.n_started
        saved = (Path(config.hydra.sweep.dir) / str(n_done - 1)).glob("checkpoints/step-*")
        if n_done and not any(saved):
            n_done -= 1  # the job has no checkpoint to resume from, so it must run again
        head = f"the sweep was interrupted in job {max(1, self.n_started)} of {n_jobs}; {n_jobs - n_done} remain"
        if n_done == n_jobs or any(random in o for o in overrides for random in sweep_rest.RANDOM):
            return head
        further = [o for o in config.hydra.overrides.hydra if o.startswith("hydra.searchpath=")]
        rest = (f"  {command()} -m {words([*further, *some])}" for some in sweep_rest.rest(overrides, n_done))
        return "\n".join([f"{head}. Run them with", *rest])


@contextmanager
def _leaving_on_error(output_dir: str) -> Iterator[None]:
    """Print an error and exit with status 1. Hydra would turn it into a warning."""
    try:
        yield
    except Exception as error:
        worded = error if isinstance(error, UserError) else disk_error(error, "output_dir", output_dir)
        if worded is None:
            console.write(sys.stderr, traceback.format_exc())
        console.write(sys.stderr, f"{worded or error}\n")
        raise SystemExit(1) from error


def _next_words(config: DictConfig, rows: list[tracking.SweepRow]) -> str:
    """Return the commands that continue the best job of a sweep that trained, or an empty string."""
    best = tracking.best_row(rows)
    if best is None or str(config.do) != "train" or not config.trainer.keep_checkpoints:
        return ""
    epochs = config.trainer.get("max_epochs")
    longer = (
        f"trainer.max_steps={2 * config.trainer.max_steps}" if epochs is None else f"trainer.max_epochs={2 * epochs:g}"
    )
    where = [] if config.output_dir == OUTPUTS else [override("output_dir", config.output_dir)]
    start = " ".join([command(), f"resume={best.run_id[:12]}", *where])
    commands = {
        f"{start} do=sample": "generate text from the best run",
        f"{start} {longer}": "continue training it",
    }
    return "\n".join(["\nnext:", *(f"  {line}  # {what}" for line, what in commands.items())])


def _redact_file(path: Path) -> None:
    """Redact a YAML file atomically, because other jobs may read it at the same time."""
    if path.exists():
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.touch(0o600)
        part.write_text(OmegaConf.to_yaml(OmegaConf.create(redact_tree(tree))), encoding="utf-8")
        part.replace(path)


def _parsed(word: str) -> Override:
    return OverridesParser.create().parse_override(word)


def _recorded(overrides: Sequence[str]) -> bool:
    """Return whether any job of the sweep is recorded in MLflow."""
    what = next((_parsed(o) for o in reversed(overrides) if o.startswith("do=")), None)
    if what is None:
        return True
    values = what.sweep_string_iterator() if what.is_sweep_override() else [what.get_value_element_as_str()]
    return any(value not in UNRECORDED for value in values)


def _tracking(config: DictConfig) -> TrackingConfig:
    return OmegaConf.to_object(config.tracking)
