"""Count the times that a training step on a GPU makes the host wait for the device.

    python tests/bench/host_sync.py [overrides ...]

PyTorch warns at each synchronizing call; those of the steps 10 to 60 are counted, with 20 metrics logged at every step.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.train import build
from tests.bench.platform_tax import MoreMetrics, track
from tests.config.test_config import composed

FIRST, LAST = 10, 60


class Watch(Callback):
    """Turns the warnings on for the steps in between."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == FIRST:
            torch.cuda.set_sync_debug_mode("warn")
        if trainer.global_step == LAST:
            torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    """Print how often, and where, the host waited."""
    with tempfile.TemporaryDirectory() as top, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cfg = composed(
            "size=base",
            "device=cuda",
            "trainer.precision=bf16",
            f"output_dir={top}",
            f"trainer.max_steps={LAST + 1}",
            "trainer.log_every_steps=1",
            "trainer.eval_every_steps=1000",
            "trainer.checkpoint_every_steps=1000",
            *sys.argv[1:],
        )
        tracked = track(cfg, Path(top) / f"run{time.time_ns()}")
        parts = build.build_parts(cfg)
        trainer, _, _ = build.build_trainer(cfg, parts, tracked, tracked.wait_ready(60), {})
        trainer.callbacks += [MoreMetrics(), Watch()]
        trainer.limit_val_batches = 0
        trainer.fit(parts.lit, datamodule=parts.datamodule)
        tracked.finish("FINISHED", None)
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    for where, n in Counter(f"{w.filename}:{w.lineno}" for w in waits).items():
        sys.stdout.write(f"{n:5d} x {where}\n")
    sys.stdout.write(f"{len(waits)} waits in {LAST - FIRST} steps on {torch.cuda.get_device_name(0)}\n")


if __name__ == "__main__":
    main()
