"""Entry point: compose and check the command line, make the job, and run its verb."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig

from deepseek_exp import config, console, planner
from deepseek_exp.commands.chain import run_chain
from deepseek_exp.commands.export import export
from deepseek_exp.commands.recorded import record
from deepseek_exp.commands.sample import sample
from deepseek_exp.commands.spawn import ACTIONS, hand_out, in_ranks
from deepseek_exp.commands.sweep import FAILED_FILE
from deepseek_exp.commands.verify import verify
from deepseek_exp.config import ROOT, Do, Launcher
from deepseek_exp.config.compose import hydra_ready
from deepseek_exp.config.help import register_help
from deepseek_exp.config.machine import Machine
from deepseek_exp.console import say
from deepseek_exp.disk import check_writable, disk_error
from deepseek_exp.errors import ConfigError, UserError
from deepseek_exp.experiment import command_line
from deepseek_exp.experiment.command_line import Composed
from deepseek_exp.experiment.job import Job, make_job
from deepseek_exp.redact import redact


def run(job: Job) -> float | None:
    """Run the job's verb and return the validation loss, if any."""
    if job.cfg.do is Do.plan:
        return say(planner.report(job.cfg))
    if job.cfg.do in (Do.sample, Do.export):
        return sample(job) if job.cfg.do is Do.sample else export(job)
    check_writable("output_dir", Path(job.cfg.output_dir))
    check_writable("run_dir", job.run_dir)
    if job.cfg.launch.launcher is not Launcher.local:
        return say(hand_out(job))
    if job.cfg.do is Do.verify:
        return record(job, verify)
    return record(job, in_ranks if job.n_ranks > 1 else ACTIONS[job.cfg.do])


def run_single(composed: Composed, machine: Machine) -> None:
    """Run the one job of a command line, from the tree that was composed and validated to check it."""
    section, output_dir = composed.hydra, str(composed.tree.output_dir)
    assert section is not None
    HydraConfig.instance().set_config(section)
    configure_log(section.hydra.job_logging, section.hydra.verbose)
    overrides, size = list(section.hydra.overrides.task), section.hydra.runtime.choices["size"]
    try:
        if composed.stages:
            with hydra_ready(composed.config_dir):
                return run_chain(composed.stages, composed.exp, section.hydra.runtime.choices["recipes"], overrides)
        with hydra_ready(composed.config_dir):  # a checkpoint's tree is merged with what the command line composes
            job = make_job(composed.tree, overrides, size, None, machine, composed.exp)
        run(job)
    except Exception as error:
        worded = in_words(error, output_dir)
        if worded is None:
            raise
        end(worded)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def run_swept(cfg: DictConfig) -> float | None:
    """Run one job of a sweep. If it fails, its error is printed and the other jobs still run."""
    context = HydraConfig.get()
    sweep_dir = Path(context.runtime.output_dir)
    try:
        return run(make_job(cfg, context.overrides.task, context.runtime.choices["size"], sweep_dir))
    except Exception as error:
        worded = in_words(error, str(cfg.output_dir))
        if worded is None:
            console.write(sys.stderr, traceback.format_exc())
        console.write(sys.stderr, f"job {context.job.num} failed: {worded or error}\n")
        text = f"{type(worded or error).__name__}: {worded or error}\n"
        (sweep_dir / FAILED_FILE).write_text(redact(text), encoding="utf-8", errors="backslashreplace")
        return float("nan")


def in_words(error: Exception, output_dir: str) -> UserError | None:
    """Return the error as a UserError, or None if it is a bug of this program, which needs its traceback."""
    return error if isinstance(error, UserError) else disk_error(error, "output_dir", output_dir)


def end(error: UserError) -> NoReturn:
    """Print the error and exit with status 2 for a configuration error, 1 for any other."""
    console.write(sys.stderr, f"{error}\n")
    sys.exit(2 if isinstance(error, ConfigError) else 1)


def main() -> None:
    """Run the command line. Configuration errors are reported before anything else is imported."""
    console.protect()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # makes Hydra raise errors instead of printing them
    config.register()
    register_help()
    sys.argv[1:] = argv = command_line.with_text_run_ids(sys.argv[1:])
    try:
        machine = Machine.here()
        composed = command_line.check_command_line(argv, machine)
        if composed is not None:
            run_single(composed, machine)
        else:  # a sweep, or Hydra prints something
            with console.redacted(command_line.prints_configuration(argv)):
                run_swept()
    except KeyboardInterrupt:
        console.write(sys.stderr, "\nstopped by SIGINT before there was anything to save\n")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        worded = in_words(error, ".")
        if worded is None:
            raise
        end(worded)
