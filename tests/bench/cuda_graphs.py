"""Steps whose micro-batches are CUDA graphs, compared with ordinary steps, on one GPU.

    python tests/bench/cuda_graphs.py [--steps 20] [--only "NAME;NAME"]

Both train the same model from the same weights on the same random tokens. Printed per model: whether all losses and
all weights afterwards are equal bit for bit, the median time of a step in ms with and without graphs, without the first
fifth of the steps, and peak memory. The steps of a row take turns: ordinary, then recorded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.models import Losses, MicroBatch, NextTokenObjective
from deepseek_exp.parallel.runtime import set_up_torch
from deepseek_exp.train.build import build_model
from deepseek_exp.train.cuda_graphs import WARM_UP, CudaGraphs
from deepseek_exp.train.optim import build_optimizer, clip_gradients
from tests.config.test_config import composed

# Name -> overrides, micro-batches per step, sequences of each, and whether they are packed documents.
FUSED = ("kernels=fused", "trainer.precision=bf16")
BASE = ("size=base", "data.seq_len=512")
LORA = ("lora=default", "optim.lr=1e-3")
ROWS: dict[str, tuple[tuple[str, ...], int, int, bool]] = {
    "v1 tiny, fp32, torch": (("size=tiny", "kernels=torch", "data.seq_len=64"), 2, 4, False),
    "v1 base": ((*BASE, *FUSED), 1, 16, False),
    "v1 base, 4 micro-batches": ((*BASE, *FUSED), 4, 4, False),
    "v1 base, compiled": ((*BASE, *FUSED, "trainer.compile=true"), 1, 16, False),
    "v1 base, recomputed": ((*BASE, *FUSED, "trainer.activation_checkpointing=full"), 1, 16, False),
    "v1 base, documents": ((*BASE, *FUSED, "kernels.local_global_attention=torch"), 1, 16, True),
    "v1 base, adapters": ((*BASE, *FUSED, *LORA), 1, 16, False),
    "v2_5 base, windows": (("model=v2_5_sparse", *BASE, *FUSED, "model.memory_len=0"), 1, 16, False),
    "v3 base, experts and MTP": (("model=v3_moe", *BASE, *FUSED), 2, 8, False),
    "v5 base, domains": (("model=v5_domain_moe", *BASE, *FUSED), 1, 16, False),
}


class Training(NamedTuple):
    """What one of the two trainings of a row needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward_and_back: Callable[[MicroBatch, int], Losses]


def build(cfg: ExperimentConfig, *, use_graphs: bool) -> Training:
    """Build a model from the seed."""
    model, objective = build_model(cfg, torch.device("cuda"), None).train(), NextTokenObjective(0.3)
    graphs = CudaGraphs(model, lambda batch: objective.from_tokens(model, batch))

    def plain(batch: MicroBatch, n: int) -> Losses:
        losses = objective.from_tokens(model, batch)
        loss = losses.loss / n
        loss.backward()
        return losses._replace(loss=loss.detach())

    def recorded(batch: MicroBatch, n: int) -> Losses:
        return graphs(batch, n, Tensor.backward)

    return Training(model, build_optimizer(cfg.optim, model, cfg.kernels.adamw), recorded if use_graphs else plain)


def step(training: Training, batches: list[MicroBatch]) -> tuple[Tensor, float]:
    """Do one optimizer step; returns its losses and its seconds."""
    torch.cuda.synchronize()
    started, losses = time.perf_counter(), []
    for batch in batches:
        found = training.forward_and_back(batch, len(batches))
        losses += [found.loss, found.nll.sum()]
    clip_gradients(training.optimizer, 1.0)
    training.optimizer.step()
    training.optimizer.zero_grad()
    torch.cuda.synchronize()
    return torch.stack([x.float() for x in losses]), time.perf_counter() - started


def some_batches(
    cfg: ExperimentConfig, n: int, n_seqs: int, draws: torch.Generator, *, packed: bool
) -> list[MicroBatch]:
    """Draw the micro-batches of a step."""
    batches = []
    for _ in range(n):
        tokens = torch.randint(0, cfg.model.vocab_size, (n_seqs, cfg.data.seq_len + 1), generator=draws).cuda()
        domain = torch.randint(-1, 4, (n_seqs,), generator=draws).cuda() if cfg.model.moe.domains else None
        batch = MicroBatch(tokens, domain)
        if packed:
            starts = torch.rand(n_seqs, cfg.data.seq_len, generator=draws).cuda() < 0.01
            document = starts.cumsum(1).int()
            mask = torch.rand(n_seqs, cfg.data.seq_len, generator=draws).cuda() < 0.7
            batch = batch._replace(document=document, loss_mask=mask, mean_targets=mask.sum())
        batches.append(batch)
    return batches


def measure(name: str, n_steps: int) -> str:
    """Train both ways; returns the row."""
    words, n, n_seqs, packed = ROWS[name]
    cfg = composed(*words, "tracking=none")
    set_up_torch(cfg)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    ways = [build(cfg, use_graphs=False), build(cfg, use_graphs=True)]
    seconds: list[list[float]] = [[], []]
    draws, equal, peaks = torch.Generator().manual_seed(1), True, [0, 0]
    for _ in range(n_steps):
        batches, losses = some_batches(cfg, n, n_seqs, draws, packed=packed), []
        for way, training in enumerate(ways):
            torch.cuda.reset_peak_memory_stats()
            found, taken = step(training, batches)
            peaks[way] = max(peaks[way], torch.cuda.max_memory_allocated())
            losses.append(found)
            seconds[way].append(taken)
        equal &= torch.equal(*losses)
    states = [training.model.state_dict() for training in ways]
    equal &= all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    plain, graph = (statistics.median(s[max(WARM_UP + 2, n_steps // 5) :]) * 1e3 for s in seconds)
    gb = " ".join(f"{peak / 1e9:.2f}" for peak in peaks)
    return f"{name:28} {'equal' if equal else 'DIFFERENT':10} {plain:8.1f} {graph:8.1f} {plain / graph:6.2f}x   {gb}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default=";".join(ROWS))
    args = parser.parse_args()
    sys.stdout.write(f"{'':28} {'bits':10} {'ms':>8} {'graph ms':>8} {'':7}   peak GB, both trainings in memory\n")
    for name in args.only.split(";"):
        try:
            row = measure(name, args.steps)
        except Exception as error:
            row = f"{name:28} cannot run: {error}"
        sys.stdout.write(row + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
