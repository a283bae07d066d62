"""Low-rank adapters on one GPU: ours, all weights trained, and peft on transformers' Llama, from the same weights.

    python tests/bench/lora.py [--size 150m] [--rank 16] [--steps 30] [--only "NAME;NAME"] [--json FILE]

Every row starts from the same Llama with the same adapters of all seven linear layers of a block, sees the same random
tokens, and has bf16 weights, fp32 masters of what it trains, and fused AdamW without clipping. Each runs in a
separate process. Printed: the median of the steps' tokens/s without the first fifth of the steps, peak memory, and the
losses of the first and the last step, which are the same for all rows except the one that trains all weights. To check
it on a CPU: --size tiny --device cpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.adapt import initial_adapters
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.config.matrices import adapted
from deepseek_exp.huggingface.adapters import Pair, write_peft
from deepseek_exp.huggingface.read import read_release
from deepseek_exp.inference.pretrained import model_config
from deepseek_exp.models import MicroBatch, NextTokenObjective
from deepseek_exp.train.build import build_model
from deepseek_exp.train.cuda_graphs import CudaGraphs
from deepseek_exp.train.optim import build_optimizer
from tests.config.test_config import composed

# Sizes: width, layers, heads, hidden units, vocabulary, sequences per step and their length.
SIZES = {
    "tiny": (64, 2, 4, 128, 512, 2, 64),
    "150m": (768, 16, 12, 2048, 32768, 16, 1024),
    "1b": (2048, 22, 16, 5632, 32768, 8, 2048),
}
FUSED, GRAPHS = ("kernels=fused", "trainer.compile=true"), "trainer.cuda_graphs=true"
ROWS: dict[str, tuple[str, ...]] = {
    "ours, adapters, torch, eager": ("kernels=torch",),
    "ours, adapters, fused, compiled": FUSED,
    "ours, adapters, fused, compiled, graphs": (*FUSED, GRAPHS),
    "ours, all weights, fused, compiled, graphs": (*FUSED, GRAPHS, "lora.rank=0"),
    "peft, eager": (),
    "peft, compiled": ("trainer.compile=true",),
    "peft, compiled, graphs": ("trainer.compile=true", GRAPHS),
}


def save_base(folder: Path, size: str) -> None:
    """Save transformers' Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    d_model, n_layers, n_heads, d_ff, vocab, _, length = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=d_model, intermediate_size=d_ff, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, num_key_value_heads=n_heads, max_position_embeddings=length,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def experiment(folder: Path, rank: int, words: tuple[str, ...]) -> ExperimentConfig:
    """Compose the experiment of a row."""
    lora = ("lora=default", f"lora.rank={rank}", f"lora.alpha={2 * rank}")
    cfg = composed(*lora, "trainer.precision=bf16", "optim.lr=1e-3", *(word for word in words if word != GRAPHS))
    model, trainer = (
        model_config(read_release(folder).model),
        dataclasses.replace(cfg.trainer, cuda_graphs=GRAPHS in words),
    )
    return dataclasses.replace(cfg, model=model, trainer=trainer, init_from=str(folder))


def ours(cfg: ExperimentConfig, device: torch.device) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Build our model; returns it with the function that sends tokens forward and back, and returns the loss."""
    model, objective = build_model(cfg, device, None).train(), NextTokenObjective(0.0)
    graphs = CudaGraphs(model, lambda batch: objective.from_tokens(model, batch))
    if cfg.trainer.cuda_graphs:
        return model, lambda tokens: graphs(MicroBatch(tokens, None), 1, Tensor.backward).loss

    def pass_of(tokens: Tensor) -> Tensor:
        loss = objective.from_tokens(model, MicroBatch(tokens, None)).loss
        loss.backward()
        return loss

    return model, pass_of


def peft(cfg: ExperimentConfig, device: torch.device) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Build peft's model with our adapters; as `ours`."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pairs = {n: Pair(*pair) for n, pair in initial_adapters(adapted(cfg.model, cfg.lora), cfg.lora, cfg.seed).items()}
    base = AutoModelForCausalLM.from_pretrained(cfg.init_from, dtype=torch.bfloat16, attn_implementation="sdpa")
    with tempfile.TemporaryDirectory() as folder:
        write_peft(cfg.model, pairs, cfg.lora.rank, cfg.lora.alpha, Path(folder), None)
        # with fp32 adapters peft would compute their products in fp32
        model = PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=False)
    model = model.to(device, torch.bfloat16).train()
    how = "reduce-overhead" if cfg.trainer.cuda_graphs else "default"  # PyTorch's way to record graphs
    step = torch.compile(model, mode=how) if cfg.trainer.compile else model

    def pass_of(tokens: Tensor) -> Tensor:
        targets = tokens[:, 1:].contiguous()
        loss = step(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets).loss
        loss.backward()
        return loss

    return model, pass_of


def measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one row."""
    cfg, device = experiment(folder, args.rank, ROWS[name]), torch.device(args.device)
    *_, n_seqs, length = SIZES[args.size]
    model, pass_of = (peft if name.startswith("peft") else ours)(cfg, device)
    optimizer = build_optimizer(cfg.optim, model, cfg.kernels.adamw)
    draws, losses, seconds = torch.Generator().manual_seed(1), [], []
    for _ in range(args.steps):
        # a copy of half of each sequence, so that there is something to learn
        half = torch.randint(0, cfg.model.vocab_size, (n_seqs, length // 2), generator=draws)
        tokens = torch.cat([half, half, half[:, :1]], 1).to(device)
        _wait(device)
        started = time.perf_counter()
        if name.startswith("peft") and cfg.trainer.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        loss = pass_of(tokens)
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    speed = n_seqs * length / statistics.median(seconds[max(1, args.steps // 5) :])
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"tokens/s": speed, "peak GB": peak / 1e9, "trained": n_trained, "first": losses[0], "last": losses[-1]}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="150m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=";".join(ROWS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--base", type=Path, help="set for the process of one row")
    args = parser.parse_args()
    if args.base is not None:
        sys.stdout.write(json.dumps(measure(args.only, args.base, args)) + "\n")
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder), args.size)
        for name in args.only.split(";"):
            same = ["--size", args.size, "--rank", str(args.rank), "--steps", str(args.steps), "--device", args.device]
            command = [sys.executable, __file__, *same, "--only", name, "--base", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stdout.write(f"{name:44} cannot run: {done.stderr.strip().splitlines()[-1]}\n")
                continue
            found[name] = row = json.loads(done.stdout.strip().splitlines()[-1])
            sys.stdout.write(
                f"{name:44} {row['tokens/s']:12,.0f} tokens/s {row['peak GB']:7.2f} GB {row['trained']:12,} trained  "
                f"loss {row['first']:.4f} -> {row['last']:.4f}\n"
            )
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
