"""Run a verb inside an MLflow run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_exp import planner
from deepseek_exp.checkpoint import manifest, saved_config
from deepseek_exp.commands.next_commands import training_words
from deepseek_exp.commands.train import check_data
from deepseek_exp.config.schema import ROOT, ExperimentConfig
from deepseek_exp.console import command, say
from deepseek_exp.errors import Stopped, UserError
from deepseek_exp.experiment.job import Job
from deepseek_exp.launch import local
from deepseek_exp.redact import redact
from deepseek_exp.tracking.run import RunLog, TrackedRun, copy_history

READY_SECONDS = 60.0


# Prefixes of environment variables that change how ranks run.
ENVIRONMENT = ("NCCL_", "GLOO_", "TORCH_", "OMP_", "CUDA_VISIBLE_DEVICES")


Action = Callable[[Job, RunLog, str], float | None]


def record(job: Job, action: Action) -> float | None:
    """Run an action inside its MLflow run, which is started before the slow imports and always ended."""
    cfg = job.cfg
    check_data(job)
    resumed = job.checkpoint if cfg.do.is_training and job.continues is None else None
    if job.continues is not None:
        copy_history(job.continues.run_dir, job.run_dir, job.continues.step)
    run_id = manifest.read_manifest(resumed).run_id if resumed is not None else None
    tracked = TrackedRun.start(
        cfg.tracking,
        run_dir=job.run_dir,
        name=job.name,
        params=saved_config.parse(job.shown_yaml) | _sizes(cfg),
        config_yaml=job.shown_yaml,
        tags=_tags(job),
        source_dir=ROOT,
        artifact_dir=Path(cfg.output_dir) / "artifacts",
        run_id=run_id,
        continues=None if job.continues is None else (job.continues.run_id, job.continues.step),
    )
    try:
        from deepseek_exp.train import callbacks  # noqa: F401 - imports torch and Lightning while the store is opened

        run_id = tracked.wait_ready(READY_SECONDS)
        for note in tracked.notes:
            say(note)
        if resumed is None:  # log at once, so that runs that fail early can also be compared
            tracked.log_metrics({"perf/flops_per_token": planner.flops_per_token(cfg.model, cfg.data.seq_len)}, 0)
        try:
            loss = action(job, tracked, run_id)
        except Stopped as stopped:
            if stopped.signum == signal.SIGHUP:  # the exiting shell may send a second one
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            _end(tracked, "KILLED", str(stopped))
            saved = f"; the checkpoint is saved. Continue with: {command()} {training_words(job, run_id)}"
            kept = cfg.do.is_training and cfg.trainer.keep_checkpoints
            say(f"{stopped}{saved if kept else ''}")
            raise SystemExit(128 + stopped.signum) from stopped
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.__cause__, Stopped):
            raise
        if _is_interrupt(error):
            _end(tracked, "KILLED", "stopped by SIGINT")
            raise KeyboardInterrupt from error
        _end(tracked, "FAILED", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise
    _end(tracked, "FINISHED", None)
    return loss


def _is_interrupt(error: BaseException) -> bool:
    """Return whether Ctrl-C ended the run. During validation, Lightning turns it into an exit with status 1."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def _sizes(cfg: ExperimentConfig) -> dict[str, int]:
    """Return the model's numbers of total and active parameters."""
    counted = planner.parameters(cfg.model)
    return {"n_params": counted.total + counted.mtp, "n_active_params": counted.active}


def _end(tracked: TrackedRun, status: Any, error: str | None) -> None:
    delivery = tracked.finish(status, error)
    if delivery.message:
        say(delivery.message)


def _tags(job: Job) -> dict[str, str]:
    made_by = job.history if job.continues is not None and job.history is not None else job.overrides
    overrides = " ".join(map(redact, made_by))
    tags = {"do": job.cfg.do.value, "run_dir": str(job.run_dir)}
    every = os.environ if job.n_ranks == 1 else {**os.environ, **rank_variables(job, job.n_ranks)}
    tags |= {f"env.{name}": value for name, value in sorted(every.items()) if name.startswith(ENVIRONMENT)}
    if job.started_from is not None:
        tags |= {"init_from.run_id": job.started_from.run_id, "init_from.step": str(job.started_from.step)}
    if job.checkpoint is None:
        return {"overrides": overrides, **tags}
    which = "overrides_on_resume" if job.cfg.do.is_training and job.continues is None else "overrides"
    return {which: overrides, "checkpoint": str(job.checkpoint), **tags}


def rank_variables(job: Job, ranks_here: int) -> dict[str, str]:
    """Return the environment variables of the job's ranks on one machine."""
    return local.rank_variables(job.cfg.launch, job.cfg.trainer.n_threads, ranks_here)
