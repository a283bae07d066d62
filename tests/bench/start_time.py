"""How long from typing `python run.py` to the first optimizer step, to a config error, and to the help text.

    python tests/bench/start_time.py [rounds]

Warm: the tokenizer and the packed tokens are in the cache and the MLflow database exists, as in every run but the
first.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import runs


def seconds_to_first_step(folder: Path) -> float:
    """Start the default run, and stop it once its first step is logged."""
    before = set(runs.run_dirs(folder))
    started = time.time()
    process = runs.start(folder)
    while process.poll() is None:
        new = set(runs.run_dirs(folder)) - before
        if new and runs.last_step(new.pop()) >= 1:
            seconds = time.time() - started
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return seconds
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


def seconds_of(*overrides: str) -> float:
    """Time a whole `python run.py`."""
    started = time.perf_counter()
    subprocess.run([sys.executable, str(runs.ROOT / "run.py"), *overrides], capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Print the median, least and most of each."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as top:
        cold = seconds_to_first_step(Path(top))
        rows = {
            "first optimizer step, warm": [seconds_to_first_step(Path(top)) for _ in range(rounds)],
            "configuration error": [seconds_of("optim.lrr=1") for _ in range(rounds)],
            "--help": [seconds_of("--help") for _ in range(rounds)],
            "--cfg job": [seconds_of("--cfg", "job") for _ in range(rounds)],
        }
    sys.stdout.write(f"{'first optimizer step, cold':28} {cold:6.2f} s\n")
    for name, seconds in rows.items():
        low, high = min(seconds), max(seconds)
        sys.stdout.write(f"{name:28} {statistics.median(seconds):6.2f} s  ({low:.2f} to {high:.2f}, {rounds} rounds)\n")


if __name__ == "__main__":
    main()
