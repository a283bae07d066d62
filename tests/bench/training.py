"""Whole training steps on one GPU: ours in several settings, and the peers, one after the other in rounds.

    python tests/bench/training.py dense|moe [--size 1b] [--rounds 2] [--only "NAME;NAME"] [--json FILE] [overrides ...]

dense: v1's sizes without a window, so that Llama of transformers computes the same; moe: v2's. bf16, fp32 masters and
fp32 Adam moments for all, random tokens, real routing. Ours is the platform's own step: data loading, Lightning and
MLflow are inside the time. The peers are bare loops at their best settings: the same masters, fused AdamW, PyTorch's
clipping over all tensors at once, and the fastest attention that PyTorch has; see peers.py. A peer that cannot run is
told in one line and left out. Per row: the median of the rounds' medians over the steps after the first ones, MFU by
`planner.flops_per_token` (989e12 FLOP/s), the peak of memory, and the spread of the rounds. On a CPU, for a check of
this script: --size tiny device=cpu.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp import build
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.planner import flops_per_token
from tests.bench.peers import PEERS, attention_order, peer, synchronize
from tests.bench.platform_tax import Clock, track
from tests.test_config import composed

PEAK = 989e12
WARM, STEPS = 6, 16
BASE = (
    "data=synthetic", "trainer.precision=bf16", "trainer.deterministic=false", f"trainer.max_steps={STEPS}",
    "trainer.eval_every_steps=1000", "trainer.checkpoint_every_steps=1000", "trainer.keep_checkpoints=0",
    "trainer.log_every_steps=1", "optim.warmup_steps=2", "data.seq_len=2048", "trainer.global_batch_seqs=8",
    "trainer.micro_batch_seqs=8",
)  # fmt: skip
KINDS = {
    "dense": ("model=v1_dense", "model.window=0", "model.n_global_tokens=0"),
    "moe": ("model=v2_moe", "model.moe.n_routed_experts=64", "model.moe.top_k=6", "model.moe.n_shared_experts=2",
            "model.moe.capacity_factor=0", "model.moe.d_expert=1408", "model.n_layers=6"),
}  # fmt: skip
OURS = {
    "ours, torch, eager": ("kernels=torch",),
    "ours, torch, compiled": ("kernels=torch", "trainer.compile=true"),
    "ours, fused, eager": ("kernels=fused",),
    "ours, fused, compiled": ("kernels=fused", "trainer.compile=true"),
    "ours, fused, compiled, selective": (
        "kernels=fused", "trainer.compile=true", "trainer.activation_checkpointing=selective",
    ),
    "ours, fused, compiled, full": ("kernels=fused", "trainer.compile=true", "trainer.activation_checkpointing=full"),
    "ours, fp32, eager": ("kernels=torch", "trainer.precision=fp32"),
}  # fmt: skip


def ours(cfg: ExperimentConfig, folder: Path) -> list[float]:
    """Give the seconds of each step of the platform."""
    tracked = track(cfg, folder / f"run{time.time_ns()}")
    parts, clock = build.build_parts(cfg), Clock()
    trainer, _, _ = build.build_trainer(cfg, parts, tracked, tracked.wait_ready(60), {})
    trainer.callbacks += [Synchronized(parts.device), clock]
    trainer.limit_val_batches = 0
    trainer.fit(parts.lit, datamodule=parts.datamodule)
    tracked.finish("FINISHED", None)
    return [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]


class Synchronized(Clock):
    """Waits for the device at the end of a step, so that the clock behind it reads the step's own time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def on_train_batch_end(self, *_: Any) -> None:
        synchronize(self.device)


def rounds_of(arguments: argparse.Namespace, given: list[str]) -> dict[str, list[dict[str, float]]]:
    """Measure every row in every round; one that fails is told and left out."""
    found: dict[str, list[dict[str, float]]] = {}
    only = arguments.only.split(";") if arguments.only else None
    names = [n for n in (*OURS, *PEERS[arguments.kind]) if only is None or n in only]
    with tempfile.TemporaryDirectory() as top:
        for _ in range(arguments.rounds):
            for name in names:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                torch._dynamo.reset()
                try:
                    cfg = composed(*given, f"output_dir={top}", *OURS.get(name, ()))
                    seconds = ours(cfg, Path(top)) if name in OURS else peer(cfg, STEPS, *PEERS[arguments.kind][name])
                except Exception as error:  # a peer or kernel that this machine lacks must not end the others
                    say(f"{name}: {type(error).__name__}: {error}"[:300])
                    continue
                peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
                found.setdefault(name, []).append({"seconds": statistics.median(seconds[WARM:]), "peak": peak})
    return found


def versions() -> dict[str, str]:
    """Give the versions of what the peers are made of, where it is installed."""
    found = {}
    for name in ("triton", "transformers", "liger-kernel", "torchao"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--size", default="1b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only")
    parser.add_argument("--json", type=Path)
    arguments, overrides = parser.parse_known_args()
    given = [f"size={arguments.size}", *BASE, *KINDS[arguments.kind], *overrides]
    cfg = composed(*given)
    tokens = cfg.trainer.global_batch_seqs * cfg.data.seq_len
    flops = flops_per_token(cfg.model, cfg.data.seq_len)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    say(f"{where}, torch {torch.__version__}, {arguments.kind} {arguments.size}, {tokens:,} tokens a step")
    order = attention_order()
    say(f"attention that PyTorch takes by itself, the first that can: {', '.join(order)}")
    found = rounds_of(arguments, given)
    say("\n| | tokens/s | MFU | step, ms | peak, GB | spread of rounds |\n|---|---|---|---|---|---|")
    for name, rounds in found.items():
        seconds = [r["seconds"] for r in rounds]
        middle = statistics.median(seconds)
        cells = [f"{tokens / middle:,.0f}", f"{tokens / middle * flops / PEAK:.3f}", f"{middle * 1e3:.1f}"]
        cells += [f"{max(r['peak'] for r in rounds) / 1e9:.2f}", f"{(max(seconds) - min(seconds)) / middle:.1%}"]
        say(f"| {name} | {' | '.join(cells)} |")
    if arguments.json:
        facts = {"device": where, "torch": torch.__version__, "overrides": given, "flops_per_token": flops}
        facts |= {"attention": order, "versions": versions()}
        arguments.json.write_text(json.dumps(facts | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
