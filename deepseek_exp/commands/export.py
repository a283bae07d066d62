"""do=export."""

from __future__ import annotations

import json
from pathlib import Path

from deepseek_exp.checkpoint import manifest, saved_config
from deepseek_exp.config.enums import ExportFormat
from deepseek_exp.console import say, shown
from deepseek_exp.disk import check_writable, disk_error, expand, new_folder
from deepseek_exp.experiment.init_from import is_release
from deepseek_exp.experiment.job import Job


def export(job: Job) -> None:
    """Export a checkpoint for other programs, and print how to load it. Not recorded in MLflow."""
    wanted = job.cfg.export
    if wanted.path is not None:
        target = expand(wanted.path)
    else:
        target = manifest.run_dir_of(job.checkpoint, "set export.path to a new folder") / wanted.format.value
    check_writable("export.path", target.parent)
    try:
        names = (_model if wanted.format is ExportFormat.hf else _adapters)(job, target)
    except Exception as error:
        worded = disk_error(error, "export.path", str(target))
        if worded is None:
            raise
        raise worded from error
    size = sum((target / name).stat().st_size for name in names)
    say(f"wrote     {shown(target)}, {size / 1e6:,.1f} MB: {', '.join(names)}")
    say(f"from      {shown(job.checkpoint)}, a {job.cfg.model.version}")
    say(f"load it   {_loaded_by(job, json.dumps(shown(target)))}")
    m, lora = job.cfg.model, job.cfg.lora
    if wanted.format is not ExportFormat.hf:
        return
    if lora.rank:
        say(f"adapters  of rank {lora.rank} are added to the weights")
    if m.n_mtp_layers:
        last = f" to {m.n_layers + m.n_mtp_layers - 1}" if m.n_mtp_layers > 1 else ""
        say(f"note      layer {m.n_layers}{last} is for multi-token prediction. transformers ignores it")
        say(f"          and reports its weights, model.layers.{m.n_layers}.*, as UNEXPECTED; init_from loads them")


def _model(job: Job, target: Path) -> list[str]:
    """Write the whole model, with its adapters added, and return the files' names."""
    from deepseek_exp import adapt, inference

    with adapt.merged(job.checkpoint, target, use_ema=job.cfg.use_ema) as checkpoint:
        return inference.export_hf(job.cfg.model, checkpoint, target)


def _adapters(job: Job, target: Path) -> list[str]:
    """Write the adapters alone, and return the files' names."""
    from deepseek_exp.adapt import files
    from deepseek_exp.huggingface.adapters import write_peft
    from deepseek_exp.inference.adapters import stored_adapters

    m, lora = job.cfg.model, job.cfg.lora
    base = saved_config.read(job.checkpoint).get("init_from")
    adapters = stored_adapters(job.checkpoint, use_ema=job.cfg.use_ema)
    with new_folder(target, "export.path") as folder:
        if job.cfg.export.format is ExportFormat.adapter:
            files.write_adapter(folder, adapters, lora.rank, lora.alpha, m.version)
        else:
            release = base if base is not None and is_release(base) else None
            write_peft(m, adapters, lora.rank, lora.alpha, folder, release)
        return sorted(path.name for path in folder.iterdir())


def _loaded_by(job: Job, target: str) -> str:
    lora = job.cfg.lora
    match job.cfg.export.format:
        case ExportFormat.hf:
            return f"transformers.AutoModelForCausalLM.from_pretrained({target})"
        case ExportFormat.peft:
            return f"peft.PeftModel.from_pretrained(model, {target})"
        case _:
            return (
                f"init_from=<its model> lora=default lora.rank={lora.rank} lora.alpha={lora.alpha:g} lora.path={target}"
            )
