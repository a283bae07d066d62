"""Where the time of a training step goes on a GPU: every kernel of three steps, by what it is for.

    python tests/bench/step_profile.py dense|moe [--size 3b] [--trace FILE] [overrides ...]

Prints the milliseconds a step of each kind of kernel, its share, and the longest kernels by name; "idle" is the time
in which the GPU had nothing to do. The floor of the products is their FLOPs at the matrix throughput of this run, that
of the whole step `planner.flops_per_token` at the same. --trace writes what torch.profiler saw, for chrome://tracing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.planner import flops_per_token
from deepseek_exp.train import build
from tests.bench.kernels import ceilings
from tests.bench.peers import synchronize
from tests.bench.platform_tax import track
from tests.bench.training import BASE, KINDS, say
from tests.config.test_config import composed

BEFORE, STEPS = 6, 3
# the first kind with a part in a kernel's name takes it
KINDS_OF_KERNELS = {
    "compiled": ("triton_",),
    "exchanges between ranks": ("nccl",),
    "attention": ("cudnn", "flash", "sdpa", "attention", "backward_queries", "backward_keys"),
    "grouped products": ("grouped", "Group"),
    "products": ("gemm", "nvjet", "cutlass", "s16816", "xmma"),
    "loss": ("_cross_entropy", "nll", "log_softmax"),
    "optimizer and gradient norm": ("_update", "adam", "Adam", "foreach", "_square_sums", "multi_tensor"),
    "rounding to 8 bits": ("_cast", "_largest"),
    "copies and fills": ("Memcpy", "Memset", "copy", "fill"),
}  # fmt: skip


class Profiler(Callback):
    """Watches some steps."""

    def __init__(self) -> None:
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == BEFORE:
            synchronize(trainer.strategy.root_device)
            self.profile.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == BEFORE + STEPS:
            synchronize(trainer.strategy.root_device)
            self.profile.stop()


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS_OF_KERNELS.items() if any(p in name for p in parts)), "other kernels")


def table(names: dict[str, list[float]], wall: float) -> list[str]:
    """Give lines by kind, and the longest kernels; names has each kernel's milliseconds."""
    kinds: dict[str, float] = defaultdict(float)
    for name, times in names.items():
        kinds[kind_of(name)] += sum(times)
    kinds["idle"] = wall - sum(kinds.values())
    lines = ["| kind | ms a step | share |", "|---|---|---|"]
    lines += [
        f"| {kind} | {ms / STEPS:.2f} | {ms / wall:.1%} |" for kind, ms in sorted(kinds.items(), key=lambda x: -x[1])
    ]
    lines += ["", "| kernel | ms a step | launches a step |", "|---|---|---|"]
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:40]
    return lines + [f"| {name[:110]} | {sum(t) / STEPS:.2f} | {len(t) / STEPS:.0f} |" for name, t in longest]


def kernels_of(seen: profile) -> tuple[dict[str, list[float]], float]:
    """Give each kernel's milliseconds, and those from the first's start to the last's end."""
    on_gpu = [e for e in seen.events() if e.device_type == DeviceType.CUDA]  # not one object: `is` says no
    kernels = [e for e in on_gpu if not e.is_user_annotation]  # the optimizer's step is marked as a whole, too
    names: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        names[event.name].append(event.time_range.elapsed_us() / 1e3)
    return names, (max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)) / 1e3


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--size", default="3b")
    parser.add_argument("--trace", type=Path)
    arguments, overrides = parser.parse_known_args()
    given = ("kernels=fused", "trainer.compile=true", f"trainer.max_steps={BEFORE + STEPS + 1}")
    cfg = composed(f"size={arguments.size}", *BASE, *KINDS[arguments.kind], *given, *overrides)
    watch = Profiler()
    with tempfile.TemporaryDirectory() as top:
        tracked = track(cfg, Path(top) / "run")
        parts = build.build_parts(cfg)
        trainer, _, _ = build.build_trainer(cfg, parts, tracked, tracked.wait_ready(60), {})
        trainer.callbacks.append(watch)
        trainer.limit_val_batches = 0
        trainer.fit(parts.lit, datamodule=parts.datamodule)
        tracked.finish("FINISHED", None)
    names, wall = kernels_of(watch.profile)
    tokens, flops = cfg.trainer.global_batch_seqs * cfg.data.seq_len, ceilings()[1]
    least = tokens * flops_per_token(cfg.model, cfg.data.seq_len) / flops * 1e3
    say(f"{torch.cuda.get_device_name()}, {arguments.kind} {arguments.size}, {tokens:,} tokens a step")
    say(f"step {wall / STEPS:.2f} ms under the profiler; floor {least:.2f} ms at {flops / 1e12:.0f} TFLOP/s\n")
    say("\n".join(table(names, wall)))
    if arguments.trace:
        watch.profile.export_chrome_trace(str(arguments.trace))


if __name__ == "__main__":
    main()
