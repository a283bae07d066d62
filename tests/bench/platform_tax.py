"""What the platform costs a step: the same parts in a bare loop and under Lightning, Hydra's values and MLflow.

    python tests/bench/platform_tax.py [steps] [rounds] [overrides ...]

The bare loop does what a step must: batch, forward, backward, clip, optimizer, schedule. The other logs 20 metrics
every step into a real sqlite MLflow store, whose sender runs beside it. The two take turns (A B A B ...) in one
process; a round's figure is its wall time over its steps, so that whatever the sender takes is in it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.config import ROOT
from deepseek_exp.tracking import TrackedRun
from deepseek_exp.train import build
from deepseek_exp.train.optim import build_optimizer, clip_gradients
from deepseek_exp.train.schedule import lr_factor
from tests.config.test_config import composed

WARM_UP = 20
N_METRICS = 20


class MoreMetrics(Callback):
    """Tops the step's own metrics up to 20."""

    def on_train_batch_end(self, trainer, *_):
        own = len(trainer.callbacks[0].last)
        trainer.logger.log_metrics({f"extra/{i}": float(i) for i in range(N_METRICS - own)}, trainer.global_step)


class Clock(Callback):
    """Notes when each step ended."""

    def __init__(self):
        self.ends = []

    def on_train_batch_end(self, *_):
        self.ends.append(time.perf_counter())


def bare(cfg) -> float:
    """Seconds a step of the bare loop."""
    parts = build.build_parts(cfg)
    model, steps = parts.lit.model, cfg.trainer.max_steps
    optimizer = build_optimizer(cfg.optim, model, cfg.kernels.adamw)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, cfg.optim.warmup_steps, steps, 0.1))
    batches, ends = iter(parts.datamodule.train_dataloader()), []
    for _ in range(steps):
        micro_batches = next(batches).tokens.to(parts.device).split(cfg.trainer.micro_batch_seqs)
        for tokens in micro_batches:
            (loss, _), _ = model.losses(tokens)
            (loss / len(micro_batches)).backward()
        clip_gradients(optimizer, cfg.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ends.append(time.perf_counter())
    return (ends[-1] - ends[WARM_UP]) / (steps - 1 - WARM_UP)


def track(cfg, run_dir: Path) -> TrackedRun:
    """Start to record a run."""
    return TrackedRun.start(
        cfg.tracking,
        run_dir=run_dir,
        name="bench",
        params={},
        config_yaml="",
        tags={},
        source_dir=ROOT,
        artifact_dir=run_dir / "artifacts",
    )


def platform(cfg, folder: Path) -> float:
    """Seconds a step of the whole platform, without validation and checkpoints, which a bare loop has not."""
    tracked = track(cfg, folder / f"run{time.time_ns()}")
    parts, clock = build.build_parts(cfg), Clock()
    run_id = tracked.wait_ready(60)
    trainer, _, _ = build.build_trainer(cfg, parts, tracked, run_id, {})
    trainer.callbacks += [MoreMetrics(), clock]
    trainer.limit_val_batches = 0
    trainer.fit(parts.lit, datamodule=parts.datamodule)
    assert tracked.finish("FINISHED", None).arrived
    return (clock.ends[-1] - clock.ends[WARM_UP]) / (len(clock.ends) - 1 - WARM_UP)


def main() -> None:
    """Print each pair and the medians."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as top:
        cfg = composed(
            "size=tiny",
            "data=synthetic",
            f"output_dir={top}",
            f"trainer.max_steps={steps}",
            "trainer.log_every_steps=1",
            f"trainer.eval_every_steps={10 * steps}",
            f"trainer.checkpoint_every_steps={10 * steps}",
            *sys.argv[3:],
        )
        build.build_parts(cfg)
        pairs = [(bare(cfg), platform(cfg, Path(top))) for _ in range(rounds)]
    for a, b in pairs:
        sys.stdout.write(f"bare {1e3 * a:8.3f} ms/step, platform {1e3 * b:8.3f}, tax {1e3 * (b - a):7.3f}\n")
    a, b, tax = (statistics.median(x) for x in zip(*((a, b, b - a) for a, b in pairs), strict=True))
    sys.stdout.write(
        f"median of {rounds} rounds of {steps} steps, {torch.get_num_threads()} threads: bare {1e3 * a:.3f} ms/step, "
        f"platform {1e3 * b:.3f}, tax {1e3 * tax:.3f} ms with {N_METRICS} metrics a step\n"
    )


if __name__ == "__main__":
    main()
