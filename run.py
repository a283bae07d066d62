"""Compose an experiment, check it, and do what it says: `python run.py --help`."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from deepseek_exp import compose, config, do
from deepseek_exp.errors import ConfigError, UserError
from deepseek_exp.job import make_job
from deepseek_exp.sweep import FAILED_FILE


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def run_job(cfg: DictConfig) -> float | None:
    """Run one job; in a sweep a job that fails is told of and the others go on."""
    context = HydraConfig.get()
    sweep_dir = Path(context.runtime.output_dir) if context.mode.name == "MULTIRUN" else None
    try:
        return do.run(make_job(cfg, context.overrides.task, context.runtime.choices["size"], sweep_dir))
    except Exception as error:
        if sweep_dir is not None:
            if not isinstance(error, UserError):
                traceback.print_exc()
            sys.stderr.write(f"job {context.job.num} failed: {error}\n")
            (sweep_dir / FAILED_FILE).write_text(
                f"{type(error).__name__}: {error}\n", encoding="utf-8", errors="backslashreplace"
            )
            return float("nan")
        if isinstance(error, UserError):
            end(error)
        raise


def end(error: UserError) -> NoReturn:
    """Tell what is wrong and leave: status 2 for the configuration, 1 for the rest."""
    sys.stderr.write(f"{error}\n")
    sys.exit(2 if isinstance(error, ConfigError) else 1)


def main() -> None:
    """Answer a mistake in the command line or the configuration before anything else is loaded."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then hands errors on instead of printing them itself
    config.register()
    compose.register_help()
    sys.argv[1:] = [re.sub(r"^resume=([0-9a-f]+)$", r"resume='\1'", arg) for arg in sys.argv[1:]]  # 12e4 is a run id
    try:
        compose.check_command_line(sys.argv[1:])
    except ConfigError as error:
        end(error)
    run_job()


if __name__ == "__main__":
    main()
