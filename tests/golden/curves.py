"""The golden loss curves: 50 steps of the tiny model of each version, fp32, CPU, one thread.

A refactor may not change a digit of them. `make golden` writes them anew after a change that means to.
The digits depend on the processor, through the kernels that PyTorch chooses for it: the first line says which.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path

import torch

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.data import Batch
from deepseek_exp.train import build
from deepseek_exp.train.optim import build_optimizer, clip_gradients
from deepseek_exp.train.schedule import lr_factor
from tests.config.test_config import MODELS, composed

HERE = Path(__file__).parent
STEPS = 50


def curve(version: str, cache_dir: Path, nudge: int | None = None) -> str:
    """Train a version from its seed, and return a line `step loss` per step under a line on the machine.

    Args:
        version: option of the group `model`.
        cache_dir: for the data.
        nudge: seed that decides which initial weights are moved by a unit in the last place; None: none is.
    """
    threads = torch.get_num_threads()
    cfg = composed(
        f"model={version}",
        "size=tiny",
        "data=synthetic",
        f"data.cache_dir={cache_dir}",
        "device=cpu",
        f"trainer.max_steps={STEPS}",
        "trainer.n_threads=1",
        "trainer.global_batch_seqs=8",
        "trainer.micro_batch_seqs=4",
        "optim.warmup_steps=10",
    )
    try:
        losses = list(_losses(cfg, nudge))
    finally:
        torch.set_num_threads(threads)
    lines = [f"{step} {loss:.9g}" for step, loss in enumerate(losses, start=1)]
    return "\n".join([f"# {torch.backends.cpu.get_cpu_capability()}, {_cpu()}", *lines]) + "\n"


def _cpu() -> str:
    """Name the processor, whose kernels PyTorch's libraries choose by."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def _nudge(model: torch.nn.Module, seed: int) -> None:
    """Move each weight by a unit in the last place up, down or not at all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + torch.randint(-1, 2, p.shape, generator=generator) * torch.finfo(p.dtype).eps)


def _losses(cfg: ExperimentConfig, nudge: int | None):
    parts = build.build_parts(cfg)
    model = parts.lit.model
    if nudge is not None:
        _nudge(model, nudge)
    optimizer = build_optimizer(cfg.optim, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: lr_factor(s, cfg.optim.warmup_steps, STEPS, cfg.optim.min_lr_ratio)
    )
    batches = iter(parts.datamodule.train_dataloader())
    for _ in range(STEPS):
        rows = cfg.trainer.micro_batch_seqs
        batch = next(batches)
        micro_batches = [
            parts.lit.micro_batch(Batch(tokens, part, rows))
            for tokens, part in zip(batch.tokens.split(rows), batch.part.split(rows), strict=True)
        ]
        total = 0.0
        parts.lit.reset_counts()
        for micro_batch in micro_batches:
            losses = parts.lit.objective.from_tokens(model, micro_batch)
            (losses.loss / len(micro_batches)).backward()
            total += losses.nll.mean().item() / len(micro_batches)
        clip_gradients(optimizer, cfg.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        parts.lit.update_biases()
        schedule.step()
        yield total


def main() -> None:
    """Write every version's curve."""
    with tempfile.TemporaryDirectory() as cache_dir:
        for version in MODELS:
            (HERE / f"{version}.txt").write_text(curve(version, Path(cache_dir)))
            sys.stdout.write(f"wrote {HERE / f'{version}.txt'}\n")


if __name__ == "__main__":
    main()
