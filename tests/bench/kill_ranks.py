"""Kill the ranks of a training in parts, resume it, and compare with the unbroken run bit for bit.

    python tests/bench/kill_ranks.py [N] [M] [seed]

N times one random rank after a random step: the job has to end within 30 s with an error that names that rank first,
its MLflow run is FAILED, and no process is left. M times all ranks and their parent while they save: every checkpoint
that is there is whole. Either way `resume=last` reaches the losses, gradient norms, validation losses, weights and
optimizer states of the unbroken run, and MLflow has all that was ever logged. Results: README.md beside this file.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.shards import State, open_state
from deepseek_exp.errors import CheckpointError
from tests import runs

STEPS, SAVES_EVERY = 24, 4
FOUR = ("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.zero_stage=1", "trainer.micro_batch_seqs=2")
WORDS = (
    *(word for word in runs.TRACKED if "micro_batch_seqs" not in word),
    "model=v3_moe",
    "device=cpu",
    f"trainer.max_steps={STEPS}",
    f"trainer.checkpoint_every_steps={SAVES_EVERY}",
    "trainer.eval_every_steps=12",
)
TRACES = ("train/loss", "train/mtp_loss", "optim/grad_norm", "optim/lr", "val/loss")
END_SECONDS = 30.0


@dataclass(frozen=True)
class Death:
    """What a kill led to.

    Attributes:
        killed_at: seconds since 1970.
        end_seconds: from the kill to the parent's end.
        what: in words.
        wrong: what should not be; [] is as it has to be.
    """

    killed_at: float
    end_seconds: float
    what: str
    wrong: list[str]


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Wait for something that a run does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"waited in vain:\n{process.communicate()[1][-3000:]}")
        time.sleep(0.001)


def has_done(folder: Path, step: int, lives: int) -> bool:
    """Say whether the newest run in a folder has logged a step in a given life."""
    dirs = runs.run_dirs(folder)
    events = [json.loads(x) for x in _lines(dirs[-1] / "journal.jsonl")] if dirs else []
    starts = [i for i, event in enumerate(events) if event["kind"] == "start"]
    if len(starts) < lives:
        return False
    return any(e["kind"] == "metrics" and e["step"] >= step for e in events[starts[lives - 1] :])


def _lines(journal: Path) -> list[str]:
    return [line for line in journal.read_text().splitlines() if line.endswith("}")] if journal.exists() else []


def ranks_of(parent: int) -> dict[int, int]:
    """Give the process id of each rank."""
    found = {}
    for child in psutil.Process(parent).children():
        if "deepseek_exp.commands.rank" in child.cmdline():
            found[int(child.environ()["RANK"])] = child.pid
    return found


def left_over(folder: Path) -> list[str]:
    """List the processes that still work in a folder, after a moment's grace."""
    deadline = time.monotonic() + 10
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder.resolve():
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def kill_one(folder: Path, process: subprocess.Popen[str], rank: int) -> Death:
    """Kill a rank of a run, and look at how the run ends."""
    pids = ranks_of(process.pid)
    killed_at = time.time()
    os.kill(pids[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    seconds = time.time() - killed_at
    named = re.findall(r"^rank=(\d+) of (\d+) (.*?)\. Fix:", err, re.M)
    wrong = [] if seconds < END_SECONDS else [f"ended after {seconds:.0f} s"]
    if named[:1] != [(str(rank), str(len(pids)), "was killed by SIGKILL")] or process.returncode != 1:
        wrong.append(f"exit code {process.returncode} and {named}: {err[-1500:]}")
    status, error = _recorded(folder)
    if status != "FAILED" or not error.startswith(f"rank={rank} of {len(pids)} was killed by SIGKILL"):
        wrong.append(f"MLflow says {status}, {error!r}")
    wrong += [f"left over: {name}" for name in left_over(folder)]
    return Death(killed_at, seconds, f"rank {rank}", wrong)


def kill_all_saving(folder: Path, process: subprocess.Popen[str], delay: float) -> Death:
    """Kill the ranks and the parent `delay` seconds after they began to save, and look at what is on disk."""
    (checkpoints,) = (folder / "outputs" / "runs").glob("*/checkpoints")
    pids = [process.pid, *ranks_of(process.pid).values()]
    wait_until(lambda: any(checkpoints.glob(".step-*.part")), process)
    time.sleep(delay)
    killed_at = time.time()
    for pid in reversed(pids):  # the parent last: ranks die with it, and may be gone then
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    seconds = time.time() - killed_at
    parts = [path.name for path in checkpoints.glob(".step-*.part")]
    wrong = [f"left over: {name}" for name in left_over(folder)]
    whole = manifest.list_checkpoints(checkpoints.parent)
    if len(whole) < 1:
        wrong.append("no checkpoint is left")
    for path in whole:
        try:
            manifest.verify(path)
        except CheckpointError as error:
            wrong.append(str(error))
    what = f"all, {delay * 1000:.0f} ms into a save ({', '.join(parts) or 'which had just ended'})"
    return Death(killed_at, seconds, what, wrong)


def resume(folder: Path, death: Death) -> tuple[float, list[str]]:
    """Go on to the end; gives the seconds from the kill to the first step that is done again, and what is wrong."""
    done = runs.run(folder, "resume=last")
    if done.returncode:
        return 0.0, [f"resume failed: {done.stderr[-2000:]}"]
    events = [json.loads(line) for line in _lines(runs.run_dirs(folder)[-1] / "journal.jsonl")]
    last = max(i for i, event in enumerate(events) if event["kind"] == "start")
    first = next(e["t"] for e in events[last:] if e["kind"] == "metrics")
    return first / 1000 - death.killed_at, []


def differences(run_dir: Path, reference: Path) -> list[str]:
    """Name what is not as in the unbroken run, or is not in MLflow."""
    found = [name for name in TRACES if runs.trace(run_dir, name) != runs.trace(reference, name)]
    ours, theirs = (open_state(manifest.list_checkpoints(folder)[-1]) for folder in (run_dir, reference))
    for name in theirs.names:
        found += [f"{kind} of {name}" for kind in theirs.kinds(name) if not _same(ours, theirs, name, kind)]
    found += [name for name in theirs.buffers if not torch.equal(ours.buffer(name), theirs.buffer(name))]
    with sqlite3.connect(run_dir.parents[1] / "mlflow.db") as database:
        for name in TRACES:
            sent = dict(database.execute("select step, value from metrics where key = ?", (name,)))
            found += [] if sent == runs.trace(run_dir, name) else [f"{name} in MLflow"]
    return found + ([] if _recorded(run_dir.parents[2])[0] == "FINISHED" else ["status in MLflow"])


def _same(ours: State, theirs: State, name: str, kind: str) -> bool:
    return torch.equal(ours.read(name, kind), theirs.read(name, kind))


def _recorded(folder: Path) -> tuple[str, str]:
    """Give the status and the tag `error` of the only run in MLflow."""
    with sqlite3.connect(folder / "outputs" / "mlflow.db") as database:
        ((status,),) = database.execute("select status from runs").fetchall()
        errors = database.execute("select value from tags where key = 'error'").fetchall()
    return status, errors[0][0] if errors else ""


def unbroken(folder: Path, words: Sequence[str]) -> Path:
    """Train without interruption; gives the run's folder."""
    folder.mkdir(parents=True)
    done = runs.run(folder, *words)
    assert done.returncode == 0, done.stderr
    return runs.run_dirs(folder)[0]


def one_kill(folder: Path, reference: Path, step: int, how: Callable[[subprocess.Popen[str]], Death]) -> list[str]:
    """Kill a new run after a step, resume it, print a line, and name what is wrong."""
    folder.mkdir(parents=True)
    process = runs.start(folder, *WORDS, *FOUR)
    wait_until(lambda: has_done(folder, step, 1), process)
    death = how(process)
    back, wrong = resume(folder, death)
    wrong = [*death.wrong, *wrong] or differences(runs.run_dirs(folder)[-1], reference)
    line = f"after step {step}, killed {death.what}: ended in {death.end_seconds:.1f} s, back in {back:.1f} s"
    sys.stdout.write(f"{line}: {wrong or 'equal'}\n")
    sys.stdout.flush()
    return wrong


def main() -> None:
    """Print one line a kill and how many were as they have to be."""
    n, m, seed = (int(x) for x in [*sys.argv[1:], *("10", "10", "0")[len(sys.argv) - 1 :]])
    draw, good = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as top:
        reference = unbroken(Path(top) / "reference", (*WORDS, *FOUR))
        for i in range(n):
            folder, rank = Path(top) / f"one-{i}", draw.randrange(4)
            step = draw.randrange(SAVES_EVERY + 1, STEPS - 4)
            good += not one_kill(folder, reference, step, lambda p, f=folder, r=rank: kill_one(f, p, r))
        for i in range(m):
            folder, delay = Path(top) / f"all-{i}", draw.uniform(0, 0.06)
            step = draw.randrange(SAVES_EVERY + 1, STEPS - SAVES_EVERY)
            good += not one_kill(folder, reference, step, lambda p, f=folder, d=delay: kill_all_saving(f, p, d))
    sys.stdout.write(f"{good} of {n + m} as they have to be\n")
    sys.exit(good != n + m)


if __name__ == "__main__":
    main()
