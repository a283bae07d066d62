"""What the person in front of a run is told: what it will do, what came out, and how to go on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_exp import planner, streams
from deepseek_exp.layout import degrees
from deepseek_exp.parallel import manifest

if TYPE_CHECKING:
    from deepseek_exp.build import Parts
    from deepseek_exp.job import Job

PART = "val/loss/"


def say(text: str) -> None:
    """Print a line or several; it fails on no terminal, pipe, disk or encoding."""
    streams.write(sys.stdout, text + "\n")


def plan_text(job: Job, parts: Parts, run_id: str) -> str:
    """Say what will be trained, on what, and how long it will take."""
    cfg, data, m, t = job.cfg, parts.data, job.cfg.model, job.cfg.trainer
    steps = t.max_steps - (manifest.read_manifest(job.checkpoint).step if job.checkpoint else 0)
    tokens = steps * t.global_batch_seqs * cfg.data.seq_len
    counted = planner.parameters(m)
    n_params = counted.total + counted.mtp
    meets = f" ({counted.active:,} active)" if m.moe.n_routed_experts or m.d_ff_active else ""
    mask = f"window {m.window} + {m.n_global_tokens} global tokens" if m.window else "full causal attention"
    rows = {
        "run": f"{job.name}, MLflow run {run_id[:12]} in {cfg.tracking.uri}",
        "model": f"{m.version}, {n_params:,} parameters{meets}: {m.n_layers} layers, d_model {m.d_model}, {mask}",
        "data": f"{_source(parts)}, {data.n_train_tokens:,} tokens (valid {data.n_valid_tokens:,}), "
        f"vocabulary {data.tokenizer.vocab_size:,}",
        "training": f"{steps:,} steps x {t.global_batch_seqs} sequences x {cfg.data.seq_len} tokens = {tokens:,} "
        f"tokens ({tokens / data.n_train_tokens:.2f} epochs), {t.precision.value}",
        "device": _device_name(parts),
        **_how_it_runs(job, parts, steps),
    }
    if job.checkpoint is not None:
        rows["resumes"] = str(job.checkpoint)
    elif cfg.init_from is not None:
        rows["starts"] = f"from {cfg.init_from}"
    return "\n".join(f"{key:9} {value}" for key, value in rows.items())


def _how_it_runs(job: Job, parts: Parts, steps: int) -> dict[str, str]:
    """Say how the work is shared out; of one process, how long it will take."""
    if job.n_ranks > 1:
        d, cfg = degrees(job.cfg), job.cfg
        ends = planner.stage_bounds(cfg, d.pp)
        blocks = [min(b, cfg.model.n_layers) - a for a, b in zip([0, *ends], ends, strict=False)]
        experts = f", experts shared out over {d.ep}" if d.ep > 1 else ""
        stages = f", stages of {', '.join(map(str, blocks))} blocks" if d.pp > 1 else ""
        return {"layout": f"{d.world_size} ranks: dp {d.dp} x tp {d.tp} x pp {d.pp}{experts}{stages}"}
    from deepseek_exp.estimate import step_seconds

    minutes = step_seconds(job.cfg, parts) * steps / 60
    return {"expected": f"about {minutes:.1f} minutes" if minutes >= 0.1 else "a few seconds"}


def _source(parts: Parts) -> str:
    """Name the text: its source, and of a mixture the parts with their shares."""
    cfg, data = parts.lit.cfg.data, parts.data
    total = sum(part.weight for part in data.parts)
    shares = ", ".join(f"{part.name} {part.weight / total:.1%}" for part in data.parts if part.name)
    return f"{cfg.source.value} of {shares}" if shares else cfg.source.value


def _device_name(parts: Parts) -> str:
    import torch

    if parts.device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(parts.device)}"
    return f"cpu, {torch.get_num_threads()} threads"


def summary(
    job: Job, parts: Parts, run_id: str, saved: Path | None, last: Mapping[str, float], text: str | None, seconds: float
) -> str:
    """Say how a training went and what can be done with it.

    Args:
        job: what was trained.
        parts: of the training.
        run_id: its MLflow run.
        saved: its last checkpoint, where it saved one.
        last: the metrics that were logged last.
        text: a sample, where there is one.
        seconds: that it took.
    """
    start = command()
    lines = [f"\ndone in {seconds / 60:.1f} minutes", *validation_lines(parts.lit.trainer.callback_metrics)]
    if last:
        lines.append(f"speed       {last['perf/tokens_per_second']:,.0f} tokens/s")
    lines.append(f"checkpoint  {shown(saved or job.checkpoint)}")
    if text is not None:
        lines.append("sample      " + text.replace("\n", "\n            "))
    if job.in_sweep:
        return "\n".join(lines) + "\n"
    if not job.cfg.trainer.keep_checkpoints:
        return "\n".join(lines)
    steps, resume = 2 * job.cfg.trainer.max_steps, resume_words(job, run_id)
    own = "".join(f"{shlex.quote(o)} " for o in job.overrides if not o.startswith(("resume=", "optim.lr=")))
    commands = {
        "make ui": "look at it and compare runs in the MLflow UI",
        f"{start} do=sample {resume}": "more text from it",
        f"{start} {resume} trainer.max_steps={steps}": "go on training",
        f"{start} -m {own}optim.lr=1e-3,3e-4": "a sweep",
    }
    if job.cfg.init_from is not None:
        commands.popitem()  # its model is given
    width = max(len(line) for line in commands if len(line) <= 80)
    lines += ["\nnext:", *(f"  {line:{width}}  # {what}" for line, what in commands.items())]
    return "\n".join(lines)


def validation_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Say what a validation measured; nothing where there was none."""
    if "val/loss" not in metrics:
        return []
    loss, bits, unigram = (float(metrics[f"val/{n}"]) for n in ("loss", "bits_per_byte", "unigram_bits_per_byte"))
    parts = [
        f"{name.removeprefix(PART)} {float(value):.3f}" for name, value in metrics.items() if name.startswith(PART)
    ]
    by_part = [f"            loss by part: {', '.join(parts)}"] if parts else []
    return [
        f"validation  {bits:.3f} bits per byte (unigram model: {unigram:.3f}), loss {loss:.3f} nats per token",
        *by_part,
    ]


def command() -> str:
    """Give the command that starts a run, as it is typed from the project's folder."""
    python = Path(sys.executable)
    return f"{shown(python) if python.is_relative_to(Path.cwd()) else 'python'} run.py"


def resume_words(job: Job, run_id: str) -> str:
    """Give the words of a command line that find this run again."""
    where = job.cfg.output_dir
    return f"resume={run_id[:12]}" + (f" output_dir={where}" if where != "outputs" else "")


def shown(path: Path | None) -> str:
    """Give a path as it is typed from here."""
    return os.path.relpath(path) if path is not None else "none"
