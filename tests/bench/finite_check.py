"""Measure what it costs to check the loss and the gradient norm of every step.

    python tests/bench/finite_check.py [--rounds 20] [--steps 20] [--device cuda] [--size base] [overrides ...]

One training takes turns, block by block of `--steps` steps: without the check, with trainer.on_nonfinite=stop (both
numbers are copied to the host behind the step and looked at two steps later), and with skip (the host waits for each
step's norm before it starts the optimizer). The device is idle before and after each block. Printed are the medians of
the step times, and the median over the rounds of the ratio to the block without the check in the same round, with the
standard error of the mean ratio. Results: README.md in this folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.config import OnNonfinite
from deepseek_exp.train import build
from tests.config.test_config import composed

WAYS = ("no check", "stop", "skip")
WARM_UP = 30  # steps before the first block


class Turns(Callback):
    """Lets the ways take turns, and takes the time of each block."""

    def __init__(self, cfg: Any, check: Any, steps: int) -> None:
        self.cfg, self.check, self.steps = cfg, check, steps
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.way, self.started = WAYS[0], 0.0
        self.look = check.on_train_batch_end
        check.on_train_batch_end = self.look_or_not

    def look_or_not(self, *args: Any) -> None:
        if self.way != "no check":
            self.look(*args)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        block, left = divmod(trainer.global_step - WARM_UP, self.steps)
        if left or block < 0:
            return
        self.check.check_all()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if block:
            self.seconds[self.way].append((time.perf_counter() - self.started) / self.steps)
        self.way = WAYS[block % len(WAYS)]
        self.cfg.trainer.on_nonfinite = OnNonfinite.skip if self.way == "skip" else OnNonfinite.stop
        self.started = time.perf_counter()


class NoLog:
    """Stands where the tracked run does."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def log_metrics(self, values: Any, step: int) -> None:
        """Drop it."""

    log_foreign_metrics = log_metrics


def measure(args: argparse.Namespace, top: Path) -> dict[str, list[float]]:
    """Train once; returns the step time of each block of each way."""
    n_steps = WARM_UP + args.rounds * len(WAYS) * args.steps
    cfg = composed(
        f"size={args.size or ('base' if args.device == 'cuda' else 'tiny')}",
        *(["trainer.precision=bf16"] if args.device == "cuda" else []),
        "data=synthetic",
        f"device={args.device}",
        f"output_dir={top}",
        f"data.cache_dir={top / 'cache'}",
        f"trainer.max_steps={n_steps}",
        "trainer.log_every_steps=1000000",
        "trainer.eval_every_steps=1000000",
        "trainer.keep_checkpoints=0",
        "optim.warmup_steps=0",
        *args.overrides,
    )
    parts = build.build_parts(cfg)
    trainer, _, _ = build.build_trainer(cfg, parts, NoLog(top), "run", {})
    check = next(c for c in trainer.callbacks if type(c).__name__ == "FiniteSteps")
    turns = Turns(cfg, check, args.steps)
    trainer.callbacks = [*(c for c in trainer.callbacks if type(c).__name__ != "Progress"), turns]
    trainer.limit_val_batches = 0
    trainer.fit(parts.lit, datamodule=parts.datamodule)
    return turns.seconds


def main() -> None:
    """Print the step time of each way, and what the checks add."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", help="option of the group size; by default base, on a CPU tiny")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as top:
        found = measure(args, Path(top))
    for way, seconds in found.items():
        ratios = [100 * (a / b - 1) for a, b in zip(seconds, found["no check"], strict=False)]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        median = statistics.median(seconds) * 1e3
        line = f"{way:9} {median:9.3f} ms a step  {statistics.median(ratios):+.3f}% +- {error:.3f}%\n"
        sys.stdout.write(line)
    where = torch.cuda.get_device_name(0) if args.device == "cuda" else "CPU"
    sys.stdout.write(f"{args.rounds} rounds of {args.steps} steps on {where}, PyTorch {torch.__version__}\n")


if __name__ == "__main__":
    main()
