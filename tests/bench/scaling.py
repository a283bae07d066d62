"""Train a model on one rank and in several layouts, and compare speed, memory and loss, and each with its plan.

    python tests/bench/scaling.py v1_dense single pp2 tp2 dp2 -- size=1b trainer.precision=bf16 cluster=h200_8

One row a layout: the median tokens/s of the steps after the first six, that over the first layout's per rank, the
loss of the last step, the peak memory of the fullest rank; then each beside its plan, calibrated with the first row
and, of a dense model, with the first that has tensor ranks alone: what these give are overrides for the next model.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import runs
from tests.bench import calibrate
from tests.config.test_config import composed

STEPS, WARM = 16, 6
COMMON = (
    f"trainer.max_steps={STEPS}",
    f"trainer.eval_every_steps={STEPS}",
    "trainer.eval_seqs=16",
    "trainer.keep_checkpoints=0",
    "trainer.log_every_steps=1",
    "optim.warmup_steps=5",
)


def overrides_of(layout: str) -> list[str]:
    """Give what sets a layout such as pp2tp2 or dp2ep2."""
    degrees = {"pp": 1, "tp": 1, "dp": 1, "ep": 1} | {k: int(n) for k, n in re.findall(r"(pp|tp|dp|ep)(\d+)", layout)}
    zero = 1 if layout != "single" else 0
    return [*(f"parallel.{k}={n}" for k, n in degrees.items()), f"parallel.zero_stage={zero}"]


def measure(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, and give what the run logged: the median speed of the steps after the first ones, and every loss."""
    done = runs.run(folder, *overrides, timeout=400)
    if done.returncode:
        sys.exit(f"{' '.join(overrides)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    logged = runs.metrics(runs.run_dirs(folder)[-1])
    speeds = [v for k, step, v in logged if k == "perf/tokens_per_second" and WARM < step < STEPS]
    peaks = [v for k, _, v in logged if k.startswith(("parallel/peak_memory_bytes/", "perf/peak_memory_bytes"))]
    losses = [v for k, _, v in logged if k == "train/loss"]
    return {
        "tokens_per_second": statistics.median(speeds),
        "peak_bytes": max(peaks, default=math.nan),
        "losses": losses,
    }


def main() -> None:
    """Print the table as it grows, then the plans beside it."""
    split = sys.argv.index("--")
    model, *layouts = sys.argv[1:split]
    given = [f"model={model}", *COMMON, *sys.argv[split + 1 :]]
    found = {}
    print_line("| layout | tokens/s | per rank / first | loss at the end | peak memory, GB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts:
            found[layout] = row = measure(Path(folder), [*given, *overrides_of(layout)])
            n = composed("do=plan", *given, *overrides_of(layout)).parallel
            ranks, first = n.dp * n.tp * n.pp, found[layouts[0]]["tokens_per_second"]
            speed = row["tokens_per_second"]
            cells = [f"{speed:,.0f}", f"{speed / ranks / first:.3f}", f"{row['losses'][-1]:.5f}"]
            print_line(f"| {model} {layout} | {' | '.join(cells)} | {row['peak_bytes'] / 1e9:.2f} |")
    print_line(json.dumps(found))
    for layout in [layouts[0], *[n for n in layouts[1:] if re.fullmatch(r"tp\d+", n) and "moe" not in model][:1]]:
        exp = composed("do=plan", *given, *overrides_of(layout))
        key, value = calibrate.calibrated(exp, found[layout]["tokens_per_second"])
        given.append(f"{key}={value:.6g}")
        print_line(f"calibrated with {layout}: {given[-1]}")
    print_line(f"\n{calibrate.HEADER}")
    for layout, row in found.items():
        exp = composed("do=plan", *given, *overrides_of(layout))
        seconds = exp.trainer.global_batch_seqs * exp.data.seq_len / row["tokens_per_second"]
        print_line(calibrate.compare(f"{model} {layout}", exp, seconds, row["peak_bytes"]))


def print_line(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
