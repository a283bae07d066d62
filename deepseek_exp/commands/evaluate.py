"""do=eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_exp.checkpoint import manifest
from deepseek_exp.commands.summary import validation_lines
from deepseek_exp.commands.train import log_inputs
from deepseek_exp.console import say
from deepseek_exp.errors import CheckpointError, Problem
from deepseek_exp.experiment.job import Job
from deepseek_exp.tracking.run import RunLog

if TYPE_CHECKING:
    from deepseek_exp.evaluate.tasks import Task
    from deepseek_exp.train.build import Parts

TABLE, NUMBERS = "evaluation.txt", "evaluation.json"


def evaluate(job: Job, tracked: RunLog, run_id: str) -> float:
    """Return the validation loss of a checkpoint, ours or the one that `init_from` names, and measure it on tasks."""
    base, tasks = _compared_with(job), []
    if job.cfg.evaluate.tasks or job.cfg.evaluate.texts:
        from deepseek_exp.evaluate import make_tasks

        tasks = make_tasks(job.cfg.evaluate)
    from deepseek_exp.train import build

    parts = build.build_parts(job.cfg, job.checkpoint)
    log_inputs(parts, tracked)
    parts.lit.steps_done = manifest.read_manifest(job.checkpoint).step if job.checkpoint is not None else 0
    trainer, _, _ = build.build_trainer(job.cfg, parts, tracked, run_id, {})
    say(f"evaluating {job.checkpoint or job.cfg.init_from} on {parts.data.n_valid_tokens:,} tokens")
    trainer.validate(parts.lit, datamodule=parts.datamodule, verbose=False)
    say("\n".join(validation_lines(trainer.callback_metrics)))
    if tasks:
        _measure(job, tracked, parts, tasks, base)
    return float(trainer.callback_metrics["val/loss"])


def _measure(job: Job, tracked: RunLog, parts: Parts, tasks: list[Task], base: Path | None) -> None:
    """Measure the model on tasks; print the table, and record it as metrics and as artifacts."""
    from deepseek_exp.evaluate import Scorer, as_json, as_metrics, run_tasks, table

    cfg, model = job.cfg.evaluate, parts.lit.model.to(parts.device)  # Lightning has moved it to the CPU
    found = run_tasks(tasks, Scorer(model, parts.data.tokenizer, cfg.batch_seqs), cfg, base, say)
    say("\n" + table(found))
    tracked.log_metrics(as_metrics(found), parts.lit.steps_done)
    tracked.log_text(table(found) + "\n", TABLE)
    tracked.log_text(as_json(found), NUMBERS)


def _compared_with(job: Job) -> Path | None:
    """Return the checkpoint that evaluate.agree_with names, or the folder of a Hugging Face checkpoint.

    Raises:
        CheckpointError: it names none.
    """
    name = job.cfg.evaluate.agree_with
    if name is None:
        return None
    if (Path(name) / "config.json").is_file():
        return Path(name)
    try:
        folder, skipped = manifest.locate(name, Path(job.cfg.output_dir))
    except CheckpointError as error:
        problems = [Problem("evaluate.agree_with", p.value, p.rule, p.fix) for p in error.problems]
        raise CheckpointError(*problems) from error
    for sentence in skipped:
        say(sentence)
    return folder
