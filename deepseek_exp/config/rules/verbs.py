"""Rules of the sections that a single verb reads: `sample`, `export` and `verify`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from deepseek_exp.config.enums import Do, ExportFormat, Launcher
from deepseek_exp.config.rules.values import is_folder
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.errors import Problem

LOWEST_TEMPERATURE = 1e-6


def sample_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem if the model does not have the domain, or the prompt is no message for do=sample."""
    if exp.sample.as_message and exp.do is not Do.sample:
        yield Problem("sample.as_message", True, "is for do=sample", "set sample.as_message=false")
    domain, names = exp.sample.domain, exp.model.moe.domains
    if domain is not None and domain not in names:
        rule = f"is not one of model.moe.domains={names}"
        yield Problem("sample.domain", domain, rule, f"use one of {', '.join(names)}" if names else "leave it out")


def temperature_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem if the temperature is too small to divide float32 logits by."""
    t = exp.sample.temperature
    if 0 < t < LOWEST_TEMPERATURE:  # logits divided by it overflow float32
        rule = f"must be 0 or at least {LOWEST_TEMPERATURE:g}"
        yield Problem("sample.temperature", t, rule, "use 0 for the most likely token")


def export_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem if the export folder cannot be created, or there are no adapters to export."""
    if exp.do is Do.export and exp.export.format in (ExportFormat.adapter, ExportFormat.peft) and not exp.lora.rank:
        rule, fix = "is for a run with adapters, and this one has lora.rank=0", "set export.format=hf"
        yield Problem("export.format", exp.export.format.value, rule, fix)
    if exp.do is not Do.export or exp.export.path is None or not exp.export.path.strip():
        return
    path = Path(exp.export.path)
    if path.name in ("", ".."):
        rule = "is no name of a folder that is still to be made"
        yield Problem("export.path", exp.export.path, rule, "name a new folder, as in export.path=my_model")
        return
    above = next((p for p in path.absolute().parents if os.path.lexists(p)), Path("/"))
    if not is_folder(above):
        rule, fix = f"lies below {above}, which is no folder", "name a new folder below an existing one"
        yield Problem("export.path", exp.export.path, rule, fix)


def average_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem if nothing that the verb reads can hold a moving average of weights."""
    if exp.use_ema and exp.init_from is None and exp.do not in (Do.eval, Do.sample, Do.export):
        rule = f"is not read by do={exp.do.value} without init_from"
        yield Problem("use_ema", True, rule, "set use_ema=false, or start from the average with init_from=<run>")


def verify_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems that prevent a layout from being compared with one process."""
    if exp.do is not Do.verify:
        return
    if exp.verify.steps > exp.trainer.max_steps:
        rule = f"is more than trainer.max_steps={exp.trainer.max_steps}"
        yield Problem("verify.steps", exp.verify.steps, rule, f"use {exp.trainer.max_steps} or less")
    if exp.resume is not None:
        rule = "is not read by do=verify, whose two runs start from scratch"
        yield Problem("resume", exp.resume, rule, "leave resume out")
    if exp.launch.launcher is not Launcher.local:
        rule = "cannot be used with do=verify, which runs both of its runs on this machine"
        yield Problem("launch.launcher", exp.launch.launcher.value, rule, "use launch=local")
