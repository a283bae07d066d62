"""do=eval."""

from __future__ import annotations

from deepseek_exp.checkpoint import manifest
from deepseek_exp.commands.summary import validation_lines
from deepseek_exp.commands.train import log_inputs
from deepseek_exp.console import say
from deepseek_exp.experiment.job import Job
from deepseek_exp.tracking.run import RunLog


def evaluate(job: Job, tracked: RunLog, run_id: str) -> float:
    """Return the validation loss of a checkpoint: one of ours, or the one that `init_from` names."""
    from deepseek_exp.train import build

    parts = build.build_parts(job.cfg, job.checkpoint)
    log_inputs(parts, tracked)
    parts.lit.steps_done = manifest.read_manifest(job.checkpoint).step if job.checkpoint is not None else 0
    trainer, _, _ = build.build_trainer(job.cfg, parts, tracked, run_id, {})
    say(f"evaluating {job.checkpoint or job.cfg.init_from} on {parts.data.n_valid_tokens:,} tokens")
    trainer.validate(parts.lit, datamodule=parts.datamodule, verbose=False)
    say("\n".join(validation_lines(trainer.callback_metrics)))
    return float(trainer.callback_metrics["val/loss"])
