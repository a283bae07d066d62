"""Run a verb in several processes, on this machine or on others."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from deepseek_exp.commands.evaluate import evaluate
from deepseek_exp.commands.recorded import Action, rank_variables, record
from deepseek_exp.commands.train import train, train_briefly
from deepseek_exp.config.enums import Device, Do, Launcher
from deepseek_exp.console import shown
from deepseek_exp.errors import ConfigError, Problem, Stopped
from deepseek_exp.experiment.job import Job
from deepseek_exp.launch import local, multi_node, worker
from deepseek_exp.tracking.run import RunLog


def in_ranks(job: Job, tracked: RunLog, run_id: str) -> float | None:
    """Run the verb in several processes on this machine, which log into the current MLflow run."""
    command = [sys.executable, "-m", "deepseek_exp.commands.rank", str(job.save(run_id))]
    ended = local.run(
        command,
        job.n_ranks,
        job.run_dir / worker.FOLDER,
        rank_variables(job, job.n_ranks),
        saves=job.cfg.do is not Do.eval,
    )
    if ended.stopped_at is not None:
        raise Stopped(ended.signum, ended.stopped_at)
    return ended.loss


def run_rank(job_file: Path) -> worker.RankResult:
    """Run one rank's part. All ranks run the same code; rank 0 records the run."""
    job, run_id = Job.load(job_file)
    action, first = ACTIONS[job.cfg.do], worker.number() == 0
    try:
        if run_id is None and first:
            return worker.RankResult(loss=record(job, _telling_the_run_id(action)))
        run_id = run_id or worker.share(RUN_ID, None)
        return worker.RankResult(loss=action(job, RunLog.attach(job.run_dir, records=first), run_id))
    except Stopped as stopped:
        return worker.RankResult(stopped_at=stopped.step)
    except SystemExit as leaving:
        if not isinstance(leaving.__cause__, Stopped):
            raise
        return worker.RankResult(stopped_at=leaving.__cause__.step)


def hand_out(job: Job) -> str:
    """Write the launch script for other machines, submit it if launch.submit is set, and return instructions."""
    cfg, file = job.cfg.launch, job.save(None)
    variables = rank_variables(job, multi_node.ranks_per_node(cfg, job.n_ranks))
    if cfg.launcher is Launcher.torchrun:
        which = "this machine" if cfg.n_nodes == 1 else f"each of the {cfg.n_nodes} machines"
        return f"run this on {which}:\n\n{multi_node.torchrun_command(cfg, job.n_ranks, file, variables)}\n"
    script = file.with_name("job.sbatch")
    on_gpus = job.cfg.device is not Device.cpu
    script.touch(0o600)
    script.write_text(multi_node.slurm_script(cfg, job.n_ranks, file, variables, on_gpus=on_gpus), encoding="utf-8")
    if not cfg.submit:
        return f"wrote     {shown(script)}\nsubmit it sbatch {shlex.quote(shown(script))}"
    done = subprocess.run(["sbatch", str(script)], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        rule = f"failed: sbatch {shown(script)} said {done.stderr.strip()!r}"
        raise ConfigError(Problem("launch.submit", True, rule, "correct that, or set launch.submit=false"))
    return f"wrote     {shown(script)}\nsubmitted {done.stdout.strip()}"


def _telling_the_run_id(action: Action) -> Action:
    """Wrap the action so that the waiting ranks get the run's id before it begins."""

    def told(job: Job, tracked: RunLog, run_id: str) -> float | None:
        return action(job, tracked, worker.share(RUN_ID, run_id))

    return told


# The action of each verb that runs on several ranks.
ACTIONS: dict[Do, Action] = {
    **{do: train for do in Do if do.is_training},
    Do.eval: evaluate,
    Do.verify: train_briefly,
}


RUN_ID = "deepseek_exp/run_id"
