"""do=verify."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import OmegaConf

from deepseek_exp.checkpoint import saved_config
from deepseek_exp.commands.spawn import in_ranks
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.console import say, shown
from deepseek_exp.errors import Problem, VerifyError
from deepseek_exp.experiment.job import Job
from deepseek_exp.tracking.run import RunLog


def verify(job: Job, tracked: RunLog, run_id: str) -> None:
    """Train a few steps in one process and in the requested layout, and compare the two runs.

    Raises:
        VerifyError: a difference exceeds its bound.
    """
    from deepseek_exp.commands import certificate

    n_steps = job.cfg.verify.steps
    one, other = _alone(job), _compared(job, f"ranks-{job.n_ranks}" if job.n_ranks > 1 else "again")
    for run in (one, other):
        ranks = f"{run.n_ranks} ranks" if run.n_ranks > 1 else "one process"
        say(f"{ranks}, {n_steps} steps, in {shown(run.run_dir)}")
        in_ranks(run, tracked, run_id)
    found = certificate.compare(job.cfg, one.run_dir, other.run_dir)
    for row in found.rows:
        for step, difference in row.by_step(n_steps).items():
            tracked.log_metrics({row.metric: difference}, step)
    for file, content in {"certificate.md": found.markdown, "certificate.json": found.json}.items():
        (job.run_dir / file).write_text(content + "\n", encoding="utf-8")
        tracked.log_text(content, file)
    say(f"\n{found.markdown}")
    if not found.holds:
        raise VerifyError(_not_verified(job, found.first_difference))


def _alone(job: Job) -> Job:
    """Return the single-process job that the layout is compared with."""
    one = {"auto": False, "dp": 1, "tp": 1, "pp": 1, "ep": 1, "zero_stage": 0, "sequence_parallel": False}
    return _compared(job, "one", parallel=one)


def _compared(job: Job, folder: str, **sections: Any) -> Job:
    """Return one of the two jobs that are compared. It logs every step and saves the last one."""
    n_steps = job.cfg.verify.steps
    every = {"log_every_steps": 1, "eval_every_steps": n_steps, "checkpoint_every_steps": n_steps}
    saved = saved_config.literal(saved_config.parse(job.yaml))
    changed = {"trainer": {**every, "keep_checkpoints": 1}, **sections}
    tree = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), saved, changed)
    yaml, run_dir = saved_config.dump(tree), job.run_dir / folder
    return dataclasses.replace(job, cfg=OmegaConf.to_object(tree), yaml=yaml, run_dir=run_dir)


def _not_verified(job: Job, first_difference: str) -> Problem:
    fix = f"read {shown(job.run_dir / 'certificate.md')}"
    rule = f"does not compute the same as one process: {first_difference}"
    if job.n_ranks > 1:
        fix += ", and train with another layout until that is fixed"
    elif not job.cfg.trainer.deterministic:
        fix += ", and set trainer.deterministic=true"
    return Problem("parallel", str(job.degrees), rule, fix)
