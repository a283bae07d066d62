"""do=export."""

from __future__ import annotations

import json

from deepseek_exp.checkpoint import manifest
from deepseek_exp.config.enums import ExportFormat
from deepseek_exp.console import say, shown
from deepseek_exp.disk import check_writable, disk_error, expand
from deepseek_exp.experiment.job import Job


def export(job: Job) -> None:
    """Export a checkpoint for other programs, and print how to load it. Not recorded in MLflow."""
    from deepseek_exp import inference
    from deepseek_exp.checkpoint.lightning_io import in_one_file

    wanted = job.cfg.export
    if wanted.path is not None:
        target = expand(wanted.path)
    else:
        target = manifest.run_dir_of(job.checkpoint, "set export.path to a new folder") / "hf"
    check_writable("export.path", target.parent)
    writers = {ExportFormat.hf: inference.export_hf}
    try:
        with in_one_file(job.checkpoint, target) as checkpoint:
            names = writers[wanted.format](job.cfg.model, checkpoint, target)
    except Exception as error:
        worded = disk_error(error, "export.path", str(target))
        if worded is None:
            raise
        raise worded from error
    size = sum((target / name).stat().st_size for name in names)
    say(f"wrote     {shown(target)}, {size / 1e6:,.1f} MB: {', '.join(names)}")
    say(f"from      {shown(job.checkpoint)}, a {job.cfg.model.version}")
    say(f"load it   transformers.AutoModelForCausalLM.from_pretrained({json.dumps(shown(target))})")
    m = job.cfg.model
    if m.n_mtp_layers:
        last = f" to {m.n_layers + m.n_mtp_layers - 1}" if m.n_mtp_layers > 1 else ""
        say(f"note      layer {m.n_layers}{last} is for multi-token prediction. transformers ignores it")
        say(f"          and reports its weights, model.layers.{m.n_layers}.*, as UNEXPECTED; init_from loads them")
