"""do=train."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_exp import planner
from deepseek_exp.checkpoint import manifest, saved_config
from deepseek_exp.commands.sample import sample_text, with_prompt
from deepseek_exp.commands.summary import plan_text, summary
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.config.enums import Do
from deepseek_exp.console import say
from deepseek_exp.errors import CheckpointError, ConfigError, DataError, Problem
from deepseek_exp.experiment.job import COMMAND_FILE, Job
from deepseek_exp.tracking.run import RunLog

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from deepseek_exp.train.build import Parts
    from deepseek_exp.train.callbacks import Checkpoints, Progress

DIGESTS = "data.json"


def train(job: Job, tracked: RunLog, run_id: str) -> float:
    """Train, from scratch or from a checkpoint, print the results, and return the validation loss."""
    started = time.monotonic()
    job = _with_steps(job)
    if job.checkpoint is not None and job.continues is None:
        tracked.skip_known_after(manifest.read_manifest(job.checkpoint).step)
    parts, (trainer, checkpoints, progress) = _ready_to_train(job, tracked, run_id)
    say(plan_text(job, parts, run_id))
    if job.cfg.lora.rank:
        tracked.log_text(planner.coverage(job.cfg).table(), "adapters.txt")
    if job.cfg.do is Do.dpo:
        _report_baseline(parts, tracked)
    if job.n_ranks > 1:
        for path, content in planner.plan_artifacts(job.cfg).items():
            tracked.log_text(content, path)
    trainer.fit(parts.lit, datamodule=parts.datamodule, ckpt_path=job.checkpoint)
    text = None
    if job.n_ranks == 1:  # with several ranks, none has the complete model
        cfg = with_prompt(job.cfg, parts.data.first_words())
        text = sample_text(cfg, parts.lit.model.to(parts.device), parts.data.tokenizer)
        tracked.log_text(text, "sample.txt")
    say(summary(job, parts, run_id, checkpoints.saved, progress.speed, text, time.monotonic() - started))
    return float(trainer.callback_metrics["val/loss"])


def _report_baseline(parts: Parts, tracked: RunLog) -> None:
    """Print and log the preference accuracy that the lengths of the completions alone would have."""
    from deepseek_exp.data import PreparedRows, length_baseline

    assert isinstance(parts.data, PreparedRows)
    which, found = length_baseline(parts.data)
    n = len(parts.data.valid.objects)
    say(f"baseline  preferring the {which} completion is right for {found:.1%} of {n} validation pairs")
    tracked.log_metrics({"val/length_baseline": found}, 0)


def train_briefly(job: Job, tracked: RunLog, run_id: str) -> float:
    """Train one of the two runs that do=verify compares. Prints only the progress."""
    job = _with_steps(job)
    parts, (trainer, _, _) = _ready_to_train(job, tracked, run_id)
    trainer.fit(parts.lit, datamodule=parts.datamodule)
    return float(trainer.callback_metrics["val/loss"])


def with_epochs(cfg: ExperimentConfig) -> ExperimentConfig:
    """Return an experiment with the number of steps that trainer.max_epochs stands for, which depends on its data.

    Raises:
        ConfigError: the warm-up takes all of them.
    """
    epochs = cfg.trainer.max_epochs
    if epochs is None:
        return cfg
    from deepseek_exp.train.build import with_steps

    cfg = with_steps(cfg)
    steps, warmup = cfg.trainer.max_steps, cfg.optim.warmup_steps
    if warmup >= steps:
        rule = f"leaves no step of the {steps} of trainer.max_epochs={epochs:g} at full learning rate"
        raise ConfigError(Problem("optim.warmup_steps", warmup, rule, f"set optim.warmup_steps={steps // 10}"))
    return cfg


def _with_steps(job: Job) -> Job:
    """Return the job with the number of steps that trainer.max_epochs stands for.

    Raises:
        ConfigError: the warm-up takes all of them, or the checkpoint has done them.
    """
    epochs = job.cfg.trainer.max_epochs
    if epochs is None:
        return job
    cfg = with_epochs(job.cfg)
    steps = cfg.trainer.max_steps
    done = 0 if job.checkpoint is None else manifest.read_manifest(job.checkpoint).step
    if done >= steps:
        rule, fix = f"is reached: {job.checkpoint} is at step {done} of {steps}", "set more epochs to continue"
        raise ConfigError(Problem("trainer.max_epochs", epochs, rule, fix))
    return dataclasses.replace(job, cfg=cfg)


def _ready_to_train(job: Job, tracked: RunLog, run_id: str) -> tuple[Parts, tuple[Trainer, Checkpoints, Progress]]:
    from deepseek_exp.train import build

    # Lightning loads the weights from the checkpoint, so they need not be read from init_from first.
    # A reference is made of them, though.
    has_reference = job.cfg.do is Do.dpo or (job.cfg.do is Do.grpo and job.cfg.grpo.kl_beta > 0)
    reads_start = job.checkpoint is None or has_reference
    cfg = job.cfg if reads_start else dataclasses.replace(job.cfg, init_from=None)
    parts = build.build_parts(cfg, None)
    log_inputs(parts, tracked)
    digests = json.dumps(parts.data.digests())
    texts = {saved_config.FILE: job.shown_yaml, COMMAND_FILE: job.command_json, DIGESTS: digests}
    texts |= parts.data.tokenizer.files()
    if parts.data.template is not None:
        texts |= parts.data.template.files()
    return parts, build.build_trainer(job.cfg, parts, tracked, run_id, texts, _lineage(job, parts))


def _lineage(job: Job, parts: Parts) -> manifest.Lineage:
    """Return where the checkpoints of a training come from; a resumed run keeps what its checkpoint says."""
    template = parts.data.template.digest if parts.data.template is not None else None
    contract = manifest.Contract(parts.data.tokenizer.digest, template, job.cfg.model.max_seq_len)
    if job.checkpoint is not None:
        before = manifest.read_manifest(job.checkpoint).lineage
        key = before.stage_key if job.continues is None else None
        return dataclasses.replace(before, contract=contract, stage_key=job.stage_key or key)
    start = Path(job.cfg.init_from) if job.cfg.init_from is not None else None
    inputs = {"start": manifest.digest(start)} if start is not None and manifest.is_checkpoint(start) else {}
    inputs |= {f"branch.{domain}": manifest.digest(Path(folder)) for domain, folder in job.cfg.branches.items()}
    reference = Path(job.cfg.dpo.reference or "") if job.cfg.do is Do.dpo else Path()
    inputs |= {"reference": manifest.digest(reference)} if manifest.is_checkpoint(reference) else {}
    share = planner.coverage(job.cfg).share if job.cfg.lora.rank else 1.0
    return manifest.Lineage(inputs, contract, coverage=share, stage_key=job.stage_key)


def log_inputs(parts: Parts, tracked: RunLog) -> None:
    """Record the datasets of a run in MLflow."""
    for entry in parts.data.inputs:
        profile = {k: v for k, v in entry.items() if k.startswith("n_")}
        tracked.log_dataset(entry["name"], entry["context"], entry["digest"], entry["source"], profile)
    found = parts.datamodule.supervision.get("train")
    if found is not None:
        values = {
            "supervised_tokens": found.n_supervised,
            "supervised_tokens_per_row": found.mean,
            "supervised_tokens_least": found.least,
            "rows_without_supervised_tokens": found.n_empty,
            "rows_longer_than_a_sequence": found.n_long,
        }
        tracked.log_metrics({f"data/{name}": float(value) for name, value in values.items()}, 0)


def _saved_digests(checkpoint: Path) -> dict[str, str]:
    """Return the digests of a checkpoint's tokenizer and text.

    Raises:
        CheckpointError: the file is missing or has other content.
    """
    try:
        found = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
        if isinstance(found, dict) and "tokenizer" in found and all(isinstance(v, str) for v in found.values()):
            return found
        reason = "it is not a mapping of digests"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    fix = "name another checkpoint, or resume=last for the newest whole one"
    raise CheckpointError(Problem("resume", str(checkpoint), f"has no readable {DIGESTS} ({reason})", fix))


def check_data(job: Job) -> None:
    """Raise an error if a checkpoint is used with other text or another tokenizer, before anything is written.

    Raises:
        DataError: a digest differs from the checkpoint's.
    """
    if job.checkpoint is None:
        return
    from deepseek_exp.data import prepare

    saved, now = _saved_digests(job.checkpoint), prepare(job.cfg.data).digests()
    fixed = [name for name in ("tokenizer", "template") if name in saved and (name in now or name == "tokenizer")]
    compared = saved if job.cfg.do.is_training else fixed
    changed = [name for name in compared if saved[name] != now.get(name)]
    changed = [name for name in changed if " tokens" not in name or name.replace(" tokens", "", 1) not in changed]
    if changed:
        d = job.cfg.data
        rule = f"no longer matches the data of {job.checkpoint} (changed: {', '.join(changed)})"
        fix = "restore the text (for stdlib: use the same Python), "
        fix += f"or train on this text in a new run from its weights with init_from={job.checkpoint}"
        if job.cfg.do is Do.eval:
            fix = f"set data.tokenizer={job.checkpoint / 'tokenizer.json'}"
        raise DataError(Problem("data.path" if d.path else "data.source", d.path or d.source.value, rule, fix))
