"""Where the time of a step goes on every GPU of a layout: what `step_profile.py` tells, of each rank.

    python tests/bench/layout_profile.py OVERRIDES, such as model=v1_dense size=1b parallel.tp=2 parallel.zero_stage=1
        cluster=h200_8 kernels=fused trainer.precision=bf16 trainer.deterministic=false data=synthetic
        trainer.max_steps=12 optim.warmup_steps=1

Starts run.py with these overrides, on one machine with a GPU for each rank. "Exchanges between ranks" last until the
slowest rank has come: on the others that is waiting. A rank's launches that come late show as time with nothing to do.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def start_all() -> None:
    """Do what run.py does, with this script in the place of a rank's module."""
    from deepseek_exp.launch import local

    start = local._start
    local._start = lambda command, *rest: start([command[0], __file__, *command[3:]], *rest)
    sys.argv[0] = str(ROOT / "run.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


def be_a_rank() -> int:
    """Do a rank's part of the job, and watch some steps of it."""
    from deepseek_exp.commands import rank
    from deepseek_exp.train import build
    from tests.bench.step_profile import Profiler, kernels_of, table
    from tests.bench.training import say

    watch, build_trainer = Profiler(), build.build_trainer

    def watched(*args: Any, **kwargs: Any) -> Any:
        trainer, *rest = build_trainer(*args, **kwargs)
        trainer.callbacks.append(watch)
        return trainer, *rest

    build.build_trainer = watched
    code = rank.main()
    if not torch.cuda.is_available():
        say("no GPU, so there is nothing to tell")
    elif not code:
        names, wall = kernels_of(watch.profile)
        text = "\n".join(table(names, wall))
        where = Path(sys.argv[1]).parent / f"profile_{os.environ['RANK']}.md"
        where.write_text(text + "\n")
        if os.environ["RANK"] == "0":
            say(f"rank 0, other ranks in {where.parent}\n\n{text}")
    return code


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(be_a_rank())
    start_all()
