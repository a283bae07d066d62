"""A rank and a parent for the tests: `python -m tests.launch.launch_parts rank|parent FOLDER N_RANKS WHAT`.

The ranks reduce a number over and over; WHAT says what happens in between.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deepseek_exp.errors import DataError, Problem, UserError
from deepseek_exp.launch import local, worker


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def all_reduce(value: float) -> float:
    import torch
    from torch.distributed import all_reduce

    total = torch.tensor([value])
    all_reduce(total)
    return float(total)


def work(folder: Path, what: str) -> worker.RankResult:
    import torch.distributed as dist
    from torch.utils.data import DataLoader

    rank = worker.number()
    say(f"rank {rank} has {os.environ['OMP_NUM_THREADS']} threads")
    loader = iter(DataLoader(list(range(8)), num_workers=1))  # processes below a rank, which it must not leave behind
    next(loader)
    dist.init_process_group("gloo")
    all_reduce(0)
    part = folder / f"{rank}.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{rank}.pid")  # whoever sees the file can read it
    if what == "end":
        return worker.RankResult(loss=all_reduce(rank))
    if what == "leave":
        if rank == 1:
            os._exit(0)
        time.sleep(600)  # does not notice
    if what == "raise" and rank == 1:
        while len(list(folder.glob("*.pid"))) < int(os.environ["WORLD_SIZE"]):  # the others may not have come to that
            time.sleep(0.01)
        raise ValueError("one\ntwo")
    if what == "user_error" and rank == 1:
        raise DataError(Problem("data.path", "x", "is gone", "bring it back"))
    words = [sys.executable, "-c", "import time; time.sleep(600)", str(folder), "rank"]
    child = subprocess.Popen(words) if what == "run with a child" else None
    step = 0
    while not all_reduce(worker.stop_asked()):
        step += 1
        time.sleep(0.01)
    assert child is None or child.poll() is None
    (folder / f"{rank}.stopped").write_text(str(step))
    return worker.RankResult(stopped_at=step)


def parent(folder: Path, n_ranks: int, what: str) -> None:
    command = [sys.executable, "-m", "tests.launch.launch_parts", "rank", str(folder), str(n_ranks), what]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    before = [signal.getsignal(s) for s in worker.ASKING]  # ignored where a shell's job does so
    try:
        env = {"OMP_NUM_THREADS": "1"}
        ended = local.run(command, n_ranks, folder / worker.FOLDER, env, saves=what != "go on and save nothing")
    except UserError as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(1)
    assert [signal.getsignal(s) for s in worker.ASKING] == before
    say(str(ended))


if __name__ == "__main__":
    folder, n_ranks, what = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if sys.argv[1] == "parent":
        parent(folder, n_ranks, what)
    else:
        (folder / worker.FOLDER).mkdir(exist_ok=True)
        worker.enter(folder / worker.FOLDER)
        sys.exit(worker.report(folder / worker.FOLDER, lambda: work(folder, what)))
