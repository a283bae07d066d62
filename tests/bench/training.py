"""Whole training steps on one GPU: ours in several settings, and the peers, one after the other in rounds.

    python tests/bench/training.py dense|moe [--size 1b] [--rounds 2] [--only "NAME;NAME"] [--json FILE] [overrides ...]

dense: v1's sizes without a window, so that Llama of transformers computes the same; moe: v2's. bf16, fp32 masters and
fp32 Adam moments for all, random tokens, real routing. Ours is the platform's own step: data loading, Lightning and
MLflow are inside the time. The peers are bare loops with the same masters and optimizer. Per row: the median of the
rounds' medians over the steps after the first ones, MFU by `planner.flops_per_token` (989e12 FLOP/s), the peak of
memory, and the spread of the rounds. On a CPU, for a check of this script: --size tiny device=cpu.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp import build
from deepseek_exp.config import ExperimentConfig, ModelConfig
from deepseek_exp.optim import build_optimizer, clip_gradients
from deepseek_exp.planner import flops_per_token
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
    "ours, fp8, fused, compiled": ("kernels=fused", "trainer.compile=true", "trainer.precision=fp8"),
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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def llama(m: ModelConfig) -> nn.Module:
    """Build transformers' Llama of the same sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=m.vocab_size, hidden_size=m.d_model, intermediate_size=m.d_ff, num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads, num_key_value_heads=m.n_kv_heads, head_dim=m.head_dim,
        max_position_embeddings=m.max_seq_len, rms_norm_eps=m.norm_eps, tie_word_embeddings=m.tie_embeddings,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)


def deepseek_v2(experts: str) -> Callable[[ModelConfig], nn.Module]:
    """Make the builder of transformers' DeepSeek-V2 with the same experts; its attention is MLA."""

    def make(m: ModelConfig) -> nn.Module:
        from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

        config = DeepseekV2Config(
            vocab_size=m.vocab_size, hidden_size=m.d_model, intermediate_size=m.d_ff, num_hidden_layers=m.n_layers,
            num_attention_heads=m.n_heads, num_key_value_heads=m.n_heads, n_routed_experts=m.moe.n_routed_experts,
            num_experts_per_tok=m.moe.top_k, n_shared_experts=m.moe.n_shared_experts,
            moe_intermediate_size=m.moe.d_expert, first_k_dense_replace=m.moe.n_dense_layers, n_group=1, topk_group=1,
            topk_method="greedy", max_position_embeddings=m.max_seq_len, q_lora_rank=None,
        )  # fmt: skip
        config._experts_implementation = experts
        return DeepseekV2ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)

    return make


def with_liger(m: ModelConfig) -> nn.Module:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = llama(m)
    apply_liger_kernel_to_llama(model=model)
    return model


Peer = tuple[Callable[[ModelConfig], nn.Module], bool]
PEERS: dict[str, dict[str, Peer]] = {
    "dense": {
        "transformers Llama, eager": (llama, False),
        "transformers Llama, compiled": (llama, True),
        "transformers Llama + Liger, compiled": (with_liger, True),
    },
    "moe": {
        "transformers DeepSeek-V2, expert loop": (deepseek_v2("eager"), False),
        "transformers DeepSeek-V2, grouped_mm": (deepseek_v2("grouped_mm"), False),
        "transformers DeepSeek-V2, grouped_mm, compiled": (deepseek_v2("grouped_mm"), True),
    },
}


def peer(cfg: ExperimentConfig, make: Callable[[ModelConfig], nn.Module], compiled: bool) -> list[float]:
    """Give the seconds of each step of a bare loop."""
    device = build.pick_device(cfg.device)
    model = make(cfg.model).to(device).train()
    optimizer = build_optimizer(cfg.optim, model)
    step, seconds = torch.compile(model) if compiled else model, []
    for tokens in random_tokens(cfg, device):
        began = time.perf_counter()
        for rows in tokens.split(cfg.trainer.micro_batch_seqs):
            loss = step(input_ids=rows, labels=rows, use_cache=False).loss  # they shift the labels themselves
            (loss * len(rows) / len(tokens)).backward()
        clip_gradients(optimizer, cfg.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def random_tokens(cfg: ExperimentConfig, device: torch.device) -> Iterator[Tensor]:
    shape = cfg.trainer.global_batch_seqs, cfg.data.seq_len
    for _ in range(STEPS):
        yield torch.randint(0, cfg.model.vocab_size, shape, device=device)


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
                cfg = composed(*given, f"output_dir={top}", *OURS.get(name, ()))
                try:
                    seconds = ours(cfg, Path(top)) if name in OURS else peer(cfg, *PEERS[arguments.kind][name])
                except Exception as error:  # a peer that this machine lacks must not end the others
                    say(f"{name}: {type(error).__name__}: {error}"[:300])
                    continue
                peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
                found.setdefault(name, []).append({"seconds": statistics.median(seconds[WARM:]), "peak": peak})
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
        arguments.json.write_text(json.dumps(facts | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
