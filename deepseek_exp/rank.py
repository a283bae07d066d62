"""One rank of a run: `python -m deepseek_exp.rank JOB_FILE`, started by run.py, or by torchrun on several machines."""

from __future__ import annotations

import sys
from pathlib import Path

from deepseek_exp import streams
from deepseek_exp.parallel import member


def main() -> int:
    """Do this rank's part of the job; returns the exit code."""
    streams.protect()
    job_file = Path(sys.argv[1])
    member.enter(job_file.parent)

    def work() -> member.Ended:
        from deepseek_exp import do
        from deepseek_exp.parallel.groups import disconnect

        ended = do.run_rank(job_file)
        disconnect()
        return ended

    return member.report(job_file.parent, work)


if __name__ == "__main__":
    sys.exit(main())
