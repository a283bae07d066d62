"""Random command lines that are accepted, run for a few steps: `python -m tests.fuzz.training N SEED`.

N command lines of random kinds are checked; each that starts a training or a verification small enough for
this machine is run as `run.py` runs it, in a separate process. A run that ends neither with status 0 nor with one of
our errors is a defect: what was accepted could not run.
"""

from __future__ import annotations

import os
import random
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.utils import get_args_parser

from deepseek_exp import planner
from deepseek_exp.config import ROOT, Do, ExperimentConfig, compose
from deepseek_exp.config.topology import degrees
from deepseek_exp.errors import UserError
from deepseek_exp.experiment.command_line import check_command_line
from deepseek_exp.experiment.job import Job, make_job
from tests.fuzz import config
from tests.fuzz.config import Counts

SECONDS = 300  # compiling the blocks of deepseek_v3 takes 100 on two cores
# a random command line comes after these and may change them
SMALL = [
    "size=tiny",
    "device=cpu",
    "trainer.max_steps=2",
    "trainer.global_batch_seqs=4",
    "trainer.micro_batch_seqs=4",
    "verify.steps=1",
]
MOST_FLOPS = 2e12
MOST_RANKS = 4
# what changes a training; the other kinds of `config` are almost always refused
KINDS = [
    *(config._typed, config._typed, config._extreme, config._group, config._interpolated),
    *(config._layout, config._shape, config._shape, config._entry, config._entry),
]


def command_line(rng: random.Random) -> list[str]:
    """Return a random command line that trains or verifies."""
    words = [word for _ in range(rng.choice([1, 1, 1, 2, 2, 3])) for word in rng.choice(KINDS)(rng)]
    return [word for word in words if word != "do=plan"]


def is_small(exp: ExperimentConfig) -> bool:
    """Return whether a run takes seconds on two cores."""
    if exp.do not in (Do.train, Do.verify) or degrees(exp).world_size > MOST_RANKS:
        return False
    steps = exp.trainer.max_steps if exp.do is Do.train else 2 * exp.verify.steps
    n_seqs = exp.trainer.global_batch_seqs + exp.trainer.eval_seqs / min(steps, exp.trainer.eval_every_steps)
    per_token = planner.flops_per_token(exp.model, exp.data.seq_len)
    return steps <= 50 and steps * n_seqs * exp.data.seq_len * per_token < MOST_FLOPS


def accepted(argv: list[str]) -> Job | None:
    """Return the job of a command line, None if it is refused or asks for something other than a job."""
    try:
        check_command_line(argv)
        args = get_args_parser().parse_args(argv)
        if args.multirun or args.cfg or args.info or args.help or args.hydra_help or args.shell_completion:
            return None
        return make_job(compose.compose_tree(args.overrides)[0], args.overrides, "tiny", None)
    except (UserError, SystemExit):
        return None


def outcome(argv: list[str], log: Path) -> str:
    """Run a command line in a separate process; return how it ended."""
    child = os.fork()
    if child == 0:
        _run(argv, log)
    deadline = time.monotonic() + SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang"
        time.sleep(0.05)
    if status == 0:
        return "ran"
    said = log.read_text(encoding="utf-8", errors="replace")
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    in_words = os.WEXITSTATUS(status) in (1, 2) and "Traceback" not in said
    return "refused while it ran" if in_words and ". Fix: " in said else "failed"


def _run(argv: list[str], log: Path) -> None:
    """Be `python run.py ARGV`, with all output in a file."""
    code = 1
    try:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", encoding="utf-8", errors="replace") for n in (1, 2))
        sys.argv = ["run.py", *argv]
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(n: int, seed: int, folder: Path, *, show: bool = False) -> Counts:
    """Check random command lines in a folder, and run those that are accepted and small.

    Args:
        n: how many.
        seed: of the generator; each case has a separate generator, so that one can be repeated.
        folder: where the runs and their logs go; what a run wrote is removed when it has ended well.
        show: print each defect when it is found.
    """
    counts = Counts()
    for i in range(n):
        line = command_line(random.Random(f"training {seed} {i}"))
        records = any("tracking" in word for word in line)  # the others are spared the process that sends to MLflow
        tracking = f"tracking.uri=sqlite:///{folder / 'mlflow.db'}" if records else "tracking=none"
        shared = [f"data.cache_dir={folder / 'cache'}", tracking]
        argv = [*(w for w in SMALL if w != "size=tiny" or not any(o.startswith("size=") for o in line)), *shared, *line]
        with config._place_to_work():
            job = accepted(argv)
        if job is None or not is_small(job.cfg):
            counts.outcomes["refused" if job is None else "not run here"] += 1
            continue
        case = folder / f"{seed}-{i}"
        case.mkdir(parents=True)
        (case / "README.md").write_text("some text\n" * 400, encoding="utf-8")
        with _inside(case):
            what = outcome(argv, case / "log")
        counts.outcomes[what] += 1
        if what not in ("ran", "refused while it ran"):
            said = (case / "log").read_text(encoding="utf-8", errors="replace")
            counts.defects.append((argv, f"{what} in case {i} of seed {seed}, in {case}\n{said[-1500:]}"))
            if show:
                sys.stdout.write(f"{[w[:300] for w in argv]}\n{counts.defects[-1][1]}\n")
        elif what == "refused while it ran" and show:
            said = (case / "log").read_text(encoding="utf-8", errors="replace")
            sys.stdout.write(f"case {i}: {[w[:100] for w in argv]}\n    {said.strip().splitlines()[-1][:400]}\n")
        if what in ("ran", "refused while it ran"):
            shutil.rmtree(case)
        sys.stdout.flush()
    return counts


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def main() -> int:
    """Print what became of N command lines of a seed, and each defect; return 1 if there is one."""
    n, seed = int(sys.argv[1]), int(sys.argv[2])
    folder = Path(sys.argv[3] if len(sys.argv) > 3 else "outputs/fuzz").absolute()
    counts = run(n, seed, folder, show=True)
    sys.stdout.write(f"seed {seed}, {n:,} command lines: {counts}\n")
    return 1 if counts.defects else 0


if __name__ == "__main__":
    sys.exit(main())
