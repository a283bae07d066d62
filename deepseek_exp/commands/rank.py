"""One rank of a run: `python -m deepseek_exp.commands.rank JOB_FILE`.

Started by run.py, or by torchrun on several machines.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deepseek_exp import console
from deepseek_exp.launch import worker


def main() -> int:
    """Run this rank's part of the job and return the exit code."""
    console.protect()
    job_file = Path(sys.argv[1])
    worker.enter(job_file.parent)

    def work() -> worker.RankResult:
        from deepseek_exp.commands import spawn
        from deepseek_exp.parallel.groups import disconnect

        ended = spawn.run_rank(job_file)
        disconnect()
        return ended

    return worker.report(job_file.parent, work)


if __name__ == "__main__":
    sys.exit(main())
