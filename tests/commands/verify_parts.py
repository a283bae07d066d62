"""run.py whose ranks make a mistake: `python -m tests.commands.verify_parts OVERRIDES` starts them, RANK is one."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_exp.launch import local, worker
from tests.runs import ROOT

RANK = "rank"


def start_broken(
    command: Sequence[str], n_ranks: int, folder: Path, env: Mapping[str, str], **how: Any
) -> worker.RankResult:
    """Do as `launch.run` does; several ranks leave the sums of gradients out."""
    if n_ranks > 1:
        command = [sys.executable, "-m", "tests.commands.verify_parts", RANK, command[-1]]
    return START(command, n_ranks, folder, env, **how)


START: Any = local.run

if __name__ == "__main__":
    if sys.argv[1] == RANK:
        from deepseek_exp.commands import rank
        from deepseek_exp.parallel import engines

        engines.gradient_sums = lambda part, groups: []
        sys.argv[1:] = sys.argv[2:]
        sys.exit(rank.main())
    local.run = start_broken
    sys.argv[0] = str(ROOT / "run.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
