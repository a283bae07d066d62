"""Whether fast settings learn what the slow and exact ones do: curves over the same batches of real text.

    python tests/bench/parity.py [--steps 300] [--size small] [--models v1_dense,v3_moe] [--only "NAME;NAME"]
        [--json FILE] [overrides ...]

The text is Python's own standard library, seed and order of batches are the same for all. The reference is fp32 with
PyTorch's operations; "again" is the same in other micro batches, which differs by rounding alone: what such a training
makes of that. Per row: the mean loss of the last 50 steps and the validation loss at the end, both with their
distance from the reference's in percent, and the largest distance of a running mean over 20 steps on the way.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.train import build
from tests import runs
from tests.bench.platform_tax import track
from tests.bench.training import say
from tests.config.test_config import composed

REFERENCE = "torch, fp32"
SETTINGS = {
    REFERENCE: ("trainer.precision=fp32", "kernels=torch"),
    "torch, fp32, again": ("trainer.precision=fp32", "kernels=torch", "trainer.micro_batch_seqs=2"),
    "torch, bf16": ("trainer.precision=bf16", "kernels=torch"),
    "fused, fp32": ("trainer.precision=fp32", "kernels=fused"),
    "fused, bf16": ("trainer.precision=bf16", "kernels=fused"),
    "fused, fp8": ("trainer.precision=fp8", "kernels=fused"),
    "fused, bf16, 8-bit moments": ("trainer.precision=bf16", "kernels=fused", "optim.state_bits=8"),
}
LAST, SMOOTH = 50, 20


def run(overrides: tuple[str, ...], top: Path) -> tuple[list[float], float]:
    """Train; give the loss of each step and the validation loss at the end."""
    cfg = composed(*overrides, f"output_dir={top}")
    folder = Path(tempfile.mkdtemp(dir=top)) / "run"
    tracked, parts = track(cfg, folder), build.build_parts(cfg)
    trainer, _, _ = build.build_trainer(cfg, parts, tracked, tracked.wait_ready(60), {})
    trainer.fit(parts.lit, datamodule=parts.datamodule)
    tracked.finish("FINISHED", None)
    losses = runs.trace(folder, "train/loss")  # of the journal: on a GPU they come some steps late
    return [losses[step] for step in sorted(losses)], float(trainer.callback_metrics["val/loss"])


def smooth(losses: list[float]) -> list[float]:
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(b - a) / SMOOTH for a, b in zip(sums, sums[SMOOTH:], strict=False)]


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", default="small")
    parser.add_argument("--models", default="v1_dense,v3_moe")
    parser.add_argument("--only")
    parser.add_argument("--json", type=Path)
    arguments, overrides = parser.parse_known_args()
    names = [
        REFERENCE,
        *(n for n in SETTINGS if n != REFERENCE and (not arguments.only or n in arguments.only.split(";"))),
    ]
    given = (
        f"size={arguments.size}", "data=stdlib", f"trainer.max_steps={arguments.steps}", "trainer.log_every_steps=1",
        f"trainer.eval_every_steps={arguments.steps}", "trainer.checkpoint_every_steps=100000",
        "trainer.keep_checkpoints=0", *overrides,
    )  # fmt: skip
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    say(f"{where}, torch {torch.__version__}, {arguments.steps} steps, {' '.join(given)}")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as top:
        for model in arguments.models.split(","):
            say(f"\n| {model} | last {LAST} steps | gap | validation | gap | largest gap on the way |\n{'|---' * 6}|")
            for name in names:
                losses, val = run((f"model={model}", *given, *SETTINGS[name]), Path(top))
                found.setdefault(model, {})[name] = {"losses": losses, "val_loss": val}
                exact = found[model][REFERENCE]
                end, exact_end = mean(losses[-LAST:]), mean(exact["losses"][-LAST:])
                way = max(abs(a / b - 1) for a, b in zip(smooth(losses), smooth(exact["losses"]), strict=True))
                gaps = f"{end / exact_end - 1:+.3%} | {val:.4f} | {val / exact['val_loss'] - 1:+.3%} | {way:.3%}"
                say(f"| {name} | {end:.4f} | {gaps} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": where, "overrides": given, "models": found}) + "\n")


if __name__ == "__main__":
    main()
