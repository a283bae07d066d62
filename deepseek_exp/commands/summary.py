"""The text printed before and after a run: the plan, the results, and the follow-up commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_exp import planner
from deepseek_exp.checkpoint import manifest
from deepseek_exp.commands.next_commands import next_commands
from deepseek_exp.config.batch_sizes import batch_sizes
from deepseek_exp.config.enums import Do, Tracker
from deepseek_exp.config.schema import TrackingConfig
from deepseek_exp.console import shown

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from deepseek_exp.experiment.job import Job
    from deepseek_exp.train.build import Parts

PART = "val/loss/"


def plan_text(job: Job, parts: Parts, run_id: str) -> str:
    """Return a description of what will be trained, on which data, and how long it will take."""
    cfg, data, m, t = job.cfg, parts.data, job.cfg.model, job.cfg.trainer
    done = manifest.read_manifest(job.checkpoint).step if job.checkpoint else 0
    steps, sizes = t.max_steps - done, batch_sizes(t)
    n_seqs = sizes.total(done, t.max_steps)
    tokens = n_seqs * cfg.data.seq_len
    counted = planner.parameters(m)
    n_params = counted.total + counted.mtp
    meets = f" ({counted.active:,} active)" if m.moe.n_routed_experts or m.d_ff_active else ""
    mask = f"window {m.window} + {m.n_global_tokens} global tokens" if m.window else "full causal attention"
    ramp = f"{sizes.seqs_from(sizes.total(0, done))} to " if done < sizes.n_ramp_steps else ""
    rows = {
        "run": f"{job.name}, {_recorded_as(cfg.tracking, run_id)}",
        "model": f"{m.version}, {n_params:,} parameters{meets}: {m.n_layers} layers, d_model {m.d_model}, {mask}",
        **({"adapters": planner.coverage(cfg).sentence()} if cfg.lora.rank else {}),
        "data": f"{_source(parts)}, {data.n_train_tokens:,} tokens (valid {data.n_valid_tokens:,}), "
        f"vocabulary {data.tokenizer.vocab_size:,}",
        **_supervised(parts),
        "training": f"{steps:,} steps x {ramp}{t.global_batch_seqs} sequences x {cfg.data.seq_len} tokens = {tokens:,} "
        f"tokens ({_epochs(parts, n_seqs):.2f} epochs), {t.precision.value}",
        "device": _device_name(parts),
        **_how_it_runs(job, parts, n_seqs / t.global_batch_seqs),
    }
    if job.checkpoint is not None:
        rows["resumes"] = str(job.checkpoint)
    elif cfg.init_from is not None:
        rows["starts"] = f"from {cfg.init_from}"
    return "\n".join(f"{key:9} {value}" for key, value in rows.items())


def _epochs(parts: Parts, n_seqs: int) -> float:
    """Return the passes over the data: of text by its tokens, of padded rows by their number."""
    if parts.data.parts:
        return n_seqs * parts.lit.cfg.data.seq_len / parts.data.n_train_tokens
    return n_seqs / parts.datamodule.n_train_sequences


def _supervised(parts: Parts) -> dict[str, str]:
    """Return how many tokens are supervised of instruction data."""
    rows = {}
    for split, s in parts.datamodule.supervision.items():
        text = f"{s.n_supervised:,} tokens of {s.n_rows:,} rows (per row mean {s.mean:,.1f}, least {s.least})"
        text += f" in {s.n_sequences:,} sequences, {s.fill:.1%} full"
        long, cfg = parts.lit.cfg.data.on_long_row.value, parts.lit.cfg.data
        what = "truncated to" if long == "truncate" else "dropped for"
        text += f"; {s.n_long:,} rows {what} data.seq_len={cfg.seq_len}" * bool(s.n_long)
        text += f"; {s.n_empty:,} rows dropped that have none" * bool(s.n_empty)
        rows["supervised" if split == "train" else "validated"] = text
    return rows


def _recorded_as(tracking: TrackingConfig, run_id: str) -> str:
    """Return the run id, and the store that has the run."""
    if tracking.backend is Tracker.none:
        return f"run {run_id[:12]}, not in MLflow"
    return f"MLflow run {run_id[:12]} in {tracking.uri}"


def _how_it_runs(job: Job, parts: Parts, steps: float) -> dict[str, str]:
    """Return the parallel layout, or the expected time of one process for this number of steps of the whole batch."""
    if job.n_ranks > 1:
        d, cfg = job.degrees, job.cfg
        ends = planner.stage_bounds(cfg, d.pp)
        blocks = [min(b, cfg.model.n_layers) - a for a, b in zip([0, *ends], ends, strict=False)]
        experts = f", experts divided over {d.ep}" if d.ep > 1 else ""
        mtp = f" and {cfg.model.n_mtp_layers} for multi-token prediction" if cfg.model.n_mtp_layers else ""
        stages = f"; blocks per stage {', '.join(map(str, blocks))}{mtp}" if d.pp > 1 else ""
        return {"layout": f"{d.world_size} ranks: {d}{experts}{stages}"}
    if job.cfg.do is Do.grpo:  # most of the time goes into sampling, whose length is not known
        return {}
    from deepseek_exp.train.probe import step_seconds

    return {"expected": f"about {duration(step_seconds(job.cfg, parts) * steps)}, excluding validation"}


def _source(parts: Parts) -> str:
    """Return the source of the text; for a mixture, also the parts with their shares."""
    cfg, data = parts.lit.cfg.data, parts.data
    total = sum(part.weight for part in data.parts)
    shares = ", ".join(f"{part.name} {part.weight / total:.1%}" for part in data.parts if part.name)
    return f"{cfg.source.value} of {shares}" if shares else cfg.source.value


def _device_name(parts: Parts) -> str:
    import torch

    if parts.device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(parts.device)}"
    n_threads, n_cores, load = torch.get_num_threads(), os.cpu_count() or 1, os.getloadavg()[0]
    words = f"cpu, {n_threads} threads"
    if n_threads > 1 and load > n_cores:  # every other process slows down threads that wait for each other
        words += f"; other processes are using this machine (load {load:.1f} on {n_cores} cores), so "
        words += "trainer.n_threads=1 may be faster"
    return words


def summary(
    job: Job, parts: Parts, run_id: str, saved: Path | None, speed: float | None, text: str | None, seconds: float
) -> str:
    """Return the results of a training and the follow-up commands.

    Args:
        job: the job that trained.
        parts: parts of the training.
        run_id: its run.
        saved: its last checkpoint, if any.
        speed: tokens per second, mean over all steps.
        text: a sample, if any.
        seconds: duration of the training.
    """
    trainer = parts.lit.trainer
    lines = [f"\ndone in {duration(seconds)}"]
    step, last_step = trainer.global_step, job.cfg.last_step
    if step < last_step:
        lines.append(f"stopped     after step {step:,} of {last_step:,} by {_what_stopped(job, trainer)}")
    lines += validation_lines(trainer.callback_metrics)
    if speed is not None:
        lines.append(f"speed       {speed:,.0f} tokens/s (mean over all steps, excluding validation)")
    lines.append(f"checkpoint  {shown(saved or job.checkpoint)}")
    if text is not None:
        lines.append("sample      " + text.replace("\n", "\n            "))
    if job.in_sweep:
        return "\n".join(lines) + "\n"
    commands = list(next_commands(job, run_id))
    width = max((len(line) for line, _ in commands if len(line) <= 80), default=0)
    return "\n".join([*lines, "\nnext:", *(f"  {line:{width}}  # {what}" for line, what in commands)])


def _what_stopped(job: Job, trainer: Trainer) -> str:
    """Return what ended a training before its last step."""
    from deepseek_exp.train.patience import Patience

    waited = next((c for c in trainer.callbacks if isinstance(c, Patience)), None)
    if waited is None or waited.n_waited < waited.patience:
        return f"a callback (trainer.callbacks: {', '.join(job.cfg.trainer.callbacks)})"
    best = job.run_dir / manifest.FOLDER / manifest.checkpoint_name(waited.best_step)
    where = f", {shown(best)}" if best.is_dir() else ""
    return f"trainer.patience={waited.patience}\nbest        loss {waited.best:.3f} at step {waited.best_step:,}{where}"


def validation_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines for the results of a validation; none if there was no validation."""
    if "val/loss" not in metrics:
        return []
    if "val/pass_at_1" in metrics:
        reward, passed = float(metrics["val/reward"]), float(metrics["val/pass_at_1"])
        return [f"validation  pass@1 {passed:.1%}, mean reward {reward:.3f}, most likely tokens"]
    if "val/preference_accuracy" in metrics:
        loss, right, margin = (float(metrics[f"val/{n}"]) for n in ("loss", "preference_accuracy", "reward_margin"))
        return [f"validation  preference accuracy {right:.1%}, reward margin {margin:.3f}, loss {loss:.3f}"]
    loss, bits, unigram = (float(metrics[f"val/{n}"]) for n in ("loss", "bits_per_byte", "unigram_bits_per_byte"))
    parts = [
        f"{name.removeprefix(PART)} {float(value):.3f}" for name, value in metrics.items() if name.startswith(PART)
    ]
    by_part = [f"            loss by part: {', '.join(parts)}"] if parts else []
    return [
        f"validation  {bits:.3f} bits per byte (unigram model: {unigram:.3f}), loss {loss:.3f} nats per token",
        *by_part,
    ]


def duration(seconds: float) -> str:
    """Return a duration as text in a suitable unit."""
    if seconds < 120:
        return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
