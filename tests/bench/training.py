"""Whole training steps on one GPU: ours in several settings, and the peers, which take turns (A B C A B C ...).

    python tests/bench/training.py dense|moe [--size 1b] [--rounds 2] [--together 2] [--only "NAME;NAME"] [--json FILE]
        [overrides ...]

dense: v1's sizes without a window, so that Llama of transformers computes the same; moe: v2's. bf16, fp32 masters and
fp32 Adam moments for all, random tokens, real routing. Ours is the platform's own step: data loading, Lightning and
MLflow are inside the time. The peers are bare loops at their best settings: the same masters, fused AdamW, PyTorch's
clipping over all tensors at once, and the fastest attention that PyTorch has; see peers.py. Each row has a process of
its own. `together` of them are on the GPU at a time (an MoE of 1b takes 51 GB there, its activations come on top), and
the next ones start meanwhile; one works at a time: first each warms up, then they take turns of some steps. One that
cannot run is told in one line and left out. Per row: the median of the turns, MFU by `planner.flops_per_token` (989e12
FLOP/s) and its share of what this run's matrix product reaches, the peak of memory, and the spread of the turns. On a
CPU, for a check: --size tiny device=cpu data.seq_len=64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.planner import flops_per_token
from deepseek_exp.train import build
from tests.bench.kernels import ceilings
from tests.bench.peers import PEERS, attention_order, peer, synchronize
from tests.bench.platform_tax import track
from tests.bench.turns import Child, Failure, Turns
from tests.config.test_config import composed

PEAK = 989e12
WARM, STEPS = 5, 8
BASE = (
    "data=synthetic", "trainer.precision=bf16", "trainer.deterministic=false",
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
    "ours, fp8, fused, compiled": ("kernels=fused", "trainer.compile=true", "trainer.precision=fp8"),
    "ours, fused, compiled, selective": (
        "kernels=fused", "trainer.compile=true", "trainer.activation_checkpointing=selective",
    ),
    "ours, fused, compiled, full": ("kernels=fused", "trainer.compile=true", "trainer.activation_checkpointing=full"),
    "ours, torch, full": ("kernels=torch", "trainer.activation_checkpointing=full"),
    "ours, torch, fp32": ("kernels=torch", "trainer.precision=fp32"),
    "ours, torch, fp32 with TF32": ("kernels=torch", "trainer.precision=fp32"),
}  # fmt: skip


class Laps(Callback):
    """Times steps in turns with other processes; within a turn the host does not wait for the device.

    Args:
        turns: with whom it takes turns.
        rounds: turns after the one that warms up.
        device: that is waited for.
    """

    def __init__(self, turns: Turns, rounds: int, device: torch.device) -> None:
        self.turns, self.device, self.done = turns, device, 0
        self.ends_of_turns = {WARM + (STEPS + 1) * turn for turn in range(rounds + 1)}
        self.n_steps = max(self.ends_of_turns)

    def begin(self) -> None:
        """Wait for the first turn."""
        self.turns.wait()
        self.began = time.perf_counter()  # of steps that only warm up

    def ended(self) -> None:
        """Count a step; at the end of a turn tell what each took, and wait for the next turn."""
        self.done += 1
        if self.done in self.ends_of_turns:
            synchronize(self.device)
            seconds, on_gpu = (time.perf_counter() - self.began) / STEPS, self.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() if on_gpu else 0
            if on_gpu:
                torch.cuda.empty_cache()  # for those whose turn it is now
            self.turns.give({"seconds": seconds, "peak": peak})
            if self.done < self.n_steps:
                self.turns.wait()
        if self.done - 1 in self.ends_of_turns:  # the first of a turn asks the device for memory again
            synchronize(self.device)
            self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended()


def measure(turns: Turns, name: str, kind: str, given: tuple[str, ...], rounds: int) -> None:
    """Measure one row."""
    with tempfile.TemporaryDirectory() as top:
        cfg = composed(
            *given, f"trainer.max_steps={WARM + (STEPS + 1) * rounds}", f"output_dir={top}", *OURS.get(name, ())
        )
        laps = Laps(turns, rounds, build.pick_device(cfg.device))
        if name in OURS:
            torch.set_float32_matmul_precision("high" if "TF32" in name else "highest")
            ours(cfg, Path(top), laps)
        else:
            peer(cfg, laps, *PEERS[kind][name])


def ours(cfg: ExperimentConfig, folder: Path, laps: Laps) -> None:
    """Train on the platform."""
    initialize = build.init_weights

    def then_wait(*args: Any) -> None:
        initialize(*args)
        laps.begin()  # what comes next takes memory of the GPU

    build.init_weights = then_wait
    tracked = track(cfg, folder / "run")
    parts = build.build_parts(cfg)
    trainer, _, _ = build.build_trainer(cfg, parts, tracked, tracked.wait_ready(60), {})
    trainer.callbacks.append(laps)
    trainer.limit_val_batches = 0
    trainer.fit(parts.lit, datamodule=parts.datamodule)
    tracked.finish("FINISHED", None)


def rounds_of(arguments: argparse.Namespace, given: tuple[str, ...]) -> dict[str, list[dict[str, float]]]:
    """Measure every row; one that fails is told and left out."""
    found: dict[str, list[dict[str, float]]] = {}
    only = arguments.only.split(";") if arguments.only else None
    names = [n for n in (*OURS, *PEERS[arguments.kind]) if only is None or n in only]
    batches = [names[i : i + arguments.together] for i in range(0, len(names), arguments.together)]

    def start(some: list[str]) -> list[Child]:
        return [Child.start(measure, name, arguments.kind, given, arguments.rounds) for name in some]

    following = start(batches[0])
    for batch in range(len(batches)):
        some, following = following, start(batches[batch + 1]) if batch + 1 < len(batches) else []
        alive = list(some)
        for turn in range(arguments.rounds + 1):  # the first warms up
            for child in list(alive):
                child.go()
                result = child.result()
                if isinstance(result, Failure):
                    say(f"{child.name}: {result.reason}")
                    alive.remove(child)
                elif turn:
                    found.setdefault(child.name, []).append(result)
                    ms, peak = result["seconds"] * 1e3, result["peak"] / 1e9
                    say(f"{child.name}, turn {turn}: {ms:.1f} ms a step, peak {peak:.2f} GB")
        for child in some:
            child.process.join()
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
    parser.add_argument("--together", type=int, default=2)
    parser.add_argument("--only")
    parser.add_argument("--json", type=Path)
    arguments, overrides = parser.parse_known_args()
    known = [*OURS, *PEERS[arguments.kind]]
    for name in set(arguments.only.split(";") if arguments.only else ()) - set(known):
        parser.error(f"--only: there is no row {name!r}, but {'; '.join(known)}")
    given = (f"size={arguments.size}", *BASE, *KINDS[arguments.kind], *overrides)
    cfg = composed(*given)
    tokens = cfg.trainer.global_batch_seqs * cfg.data.seq_len
    flops = flops_per_token(cfg.model, cfg.data.seq_len)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    say(f"{where}, torch {torch.__version__}, {arguments.kind} {arguments.size}, {tokens:,} tokens a step")
    order = attention_order()
    say(f"attention that PyTorch takes by itself, the first that can: {', '.join(order)}")
    bandwidth, most = ceilings() if torch.cuda.is_available() else (math.inf, math.inf)
    say(f"copy {bandwidth / 1e12:.2f} TB/s, matrices {most / 1e12:.0f} TFLOP/s; {versions()}")
    found = rounds_of(arguments, given)
    say(f"\n| | tokens/s | MFU | of matrices | step, ms | peak, GB | spread of turns |\n{'|---' * 7}|")
    for name, rounds in found.items():
        seconds = [r["seconds"] for r in rounds]
        middle = statistics.median(seconds)
        reached = tokens / middle * flops
        cells = [f"{tokens / middle:,.0f}", f"{reached / PEAK:.3f}", f"{reached / most:.0%}", f"{middle * 1e3:.1f}"]
        cells += [f"{max(r['peak'] for r in rounds) / 1e9:.2f}", f"{(max(seconds) - min(seconds)) / middle:.1%}"]
        say(f"| {name} | {' | '.join(cells)} |")
    if arguments.json:
        facts = {"device": where, "torch": torch.__version__, "overrides": given, "flops_per_token": flops}
        facts |= {"attention": order, "versions": versions(), "copy_bytes_per_second": bandwidth, "matrix_flops": most}
        arguments.json.write_text(json.dumps(facts | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
