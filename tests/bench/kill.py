"""Kill training at random steps, resume, and compare with the unbroken run bit for bit.

    python tests/bench/kill.py [N] [seed]

Compared: the loss, gradient norm and validation loss of every step, and the final weights.
Results: README.md beside this file.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import runs

STEPS = 40
OVERRIDES = (
    *runs.QUICK,
    f"trainer.max_steps={STEPS}",
    "trainer.checkpoint_every_steps=7",
    "trainer.eval_every_steps=14",
)
TRACES = ("train/loss", "optim/grad_norm", "optim/lr", "val/loss")


def unbroken(folder: Path, by: ModuleType = runs) -> Path:
    """Train without interruption, started by the `run` of a module; return the run's folder."""
    folder.mkdir(parents=True)
    done = by.run(folder, *OVERRIDES)
    assert done.returncode == 0, done.stderr
    return runs.run_dirs(folder)[0]


def differences(folder: Path, reference: Path, step: int, by: ModuleType = runs) -> list[str]:
    """Kill a run once it has logged `step`, resume it to its end, and name what differs from the reference.

    Both are started by the `start` and `run` of a module.
    """
    folder.mkdir(parents=True)
    process = by.start(folder, *OVERRIDES)
    runs.signal_at_step(process, folder, step, signal.SIGKILL)
    process.communicate()
    (run_dir,) = runs.run_dirs(folder)
    has_checkpoint = any((run_dir / "checkpoints").glob("step-*"))
    done = by.run(folder, *(["resume=last"] if has_checkpoint else OVERRIDES))
    if done.returncode:
        return [f"resume failed: {done.stderr[-2000:]}"]
    run_dir = runs.run_dirs(folder)[-1]
    found = [name for name in TRACES if runs.trace(run_dir, name) != runs.trace(reference, name)]
    ours, theirs = runs.weights(run_dir, STEPS), runs.weights(reference, STEPS)
    return found + [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def main() -> None:
    """Print one line a kill and how many were equal."""
    n, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 20, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    draw, equal = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as top:
        reference = unbroken(Path(top) / "reference")
        for i in range(n):
            step = draw.randrange(1, STEPS - 8)  # the last steps pass before the signal arrives
            found = differences(Path(top) / f"kill{i}", reference, step)
            equal += not found
            sys.stdout.write(f"kill {i} after step {step}: {found or 'equal'}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{equal} of {n} equal bit for bit\n")
    sys.exit(equal != n)


if __name__ == "__main__":
    main()
