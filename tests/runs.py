"""Start run.py as a person would, and read what a run left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# a whole run in seconds: tiny model, generated text, one thread
QUICK = (
    "size=tiny",
    "data=synthetic",
    "trainer.max_steps=12",
    "trainer.eval_every_steps=6",
    "trainer.eval_seqs=8",
    "trainer.checkpoint_every_steps=4",
    "trainer.log_every_steps=1",
    "trainer.n_threads=1",
    "trainer.global_batch_seqs=8",
    "trainer.micro_batch_seqs=4",
    "optim.warmup_steps=3",
    "tracking=none",
)
# The same, recorded in MLflow by a second process, which costs seconds: for tests that look at what it records.
TRACKED = (*QUICK[:-1], "tracking.system_metrics=false")


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start `python run.py` in a folder, where its outputs will lie."""
    command = [sys.executable, str(ROOT / "run.py"), *overrides]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, *overrides: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python run.py` in a folder to its end."""
    process = start(folder, *overrides)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def hold_port() -> socket.socket:
    """Hold a free port of this machine for one that binds it with SO_REUSEADDR too, as servers do, and then listens.

    Nobody else is given it as long as the socket is open. Its number is that of `getsockname`.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def run_dirs(folder: Path) -> list[Path]:
    """List the runs in a folder, oldest first."""
    return sorted((folder / "outputs" / "runs").glob("*/"))


def metrics(run_dir: Path) -> list[tuple[str, int, float]]:
    """List the (name, step, value) that a run logged, in order."""
    journal = run_dir / "journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [(k, e["step"], v) for e in events if e["kind"] == "metrics" for k, v in e["values"].items()]


def trace(run_dir: Path, name: str) -> dict[int, float]:
    """Give a metric's value at each step; a step logged twice must have been logged with one value."""
    found: dict[int, float] = {}
    for key, step, value in metrics(run_dir):
        if key == name:
            assert found.setdefault(step, value) == value, f"{name} at step {step}: {found[step]} and {value}"
    return found


def ending(run_dir: Path) -> str | None:
    """Return how the last life of a run ended, None if it did not."""
    events = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return events[-1]["status"] if events[-1]["kind"] == "end" else None


def last_step(run_dir: Path) -> int:
    """Give the last step whose training loss was logged."""
    return max((step for key, step, _ in metrics(run_dir) if key == "train/loss"), default=0)


def weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Load the model's parameters of a checkpoint."""
    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def signal_at_step(process: subprocess.Popen[str], folder: Path, step: int, signum: signal.Signals) -> None:
    """Send a signal as soon as a run that was started in `folder` has logged a step."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        dirs = run_dirs(folder)
        if dirs and last_step(dirs[-1]) >= step:
            process.send_signal(signum)
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached:\n{process.communicate()[1][-2000:]}")
