"""Measure what it costs to check the loss and the gradient norm of every step.

    python tests/bench/finite_check.py [--rounds 5] [--steps 100] [--device cuda] [overrides ...]

Trainings that differ in the check alone take turns in one process: without it, with trainer.on_nonfinite=stop (both
numbers are copied to the host behind the step and looked at two steps later), and with skip (the host waits for each
step's norm before it starts the optimizer). Of each round and way the mean step time over the last 80% of the steps is
taken, the device idle before and after; printed are medians over the rounds, their spread, and the difference to no
check. Results: README.md in this folder.
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

from deepseek_exp import build
from tests.test_config import composed

WAYS = {"no check": (), "stop": ("trainer.on_nonfinite=stop",), "skip": ("trainer.on_nonfinite=skip",)}


class Clock(Callback):
    """Takes the time of the steps after the first fifth."""

    def __init__(self, steps: int, device: str) -> None:
        self.first, self.last, self.device = steps // 5, steps, device
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in (self.first, self.last):
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.seconds

    @property
    def step_seconds(self) -> float:
        return self.seconds / (self.last - self.first)


class NoLog:
    """Stands where the tracked run does."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def log_metrics(self, values: Any, step: int) -> None:
        """Drop it."""

    log_foreign_metrics = log_metrics


def step_seconds(args: argparse.Namespace, way: str, top: Path) -> float:
    """Train once in one of the WAYS; returns the mean time of a step."""
    cfg = composed(
        *(["size=base", "trainer.precision=bf16"] if args.device == "cuda" else ["size=tiny"]),
        "data=synthetic",
        f"device={args.device}",
        f"output_dir={top}",
        f"data.cache_dir={top / 'cache'}",
        f"trainer.max_steps={args.steps}",
        "trainer.log_every_steps=1000",
        "trainer.eval_every_steps=100000",
        "trainer.keep_checkpoints=0",
        "optim.warmup_steps=0",
        *WAYS[way],
        *args.overrides,
    )
    parts = build.build_parts(cfg)
    trainer, _, _ = build.build_trainer(cfg, parts, NoLog(top), "run", {})
    clock = Clock(args.steps, args.device)
    dropped = ("Progress", *(["FiniteSteps"] if way == "no check" else []))
    trainer.callbacks = [*(c for c in trainer.callbacks if type(c).__name__ not in dropped), clock]
    trainer.limit_val_batches = 0
    trainer.fit(parts.lit, datamodule=parts.datamodule)
    return clock.step_seconds


def main() -> None:
    """Print the step time of each way, and what the checks add."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as top:
        step_seconds(args, "no check", Path(top))  # compiles kernels and packs the data
        for _ in range(args.rounds):
            for way in WAYS:
                found[way].append(step_seconds(args, way, Path(top)))
    base = statistics.median(found["no check"])
    for way, seconds in found.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds) * 1e3:.3f} to {max(seconds) * 1e3:.3f}"
        sys.stdout.write(f"{way:9} {median * 1e3:9.3f} ms a step ({spread})  {100 * (median / base - 1):+.3f}%\n")
    where = torch.cuda.get_device_name(0) if args.device == "cuda" else "CPU"
    sys.stdout.write(f"{args.rounds} rounds of {args.steps} steps on {where}, PyTorch {torch.__version__}\n")


if __name__ == "__main__":
    main()
