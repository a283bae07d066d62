"""v5 by branches, v5 trained jointly and a dense model, at equal training FLOPs, by domain of the text.

    python tests/bench/domains.py FOLDER [--seeds 3] [--steps 400] [--size small] [--arms "NAME;NAME"] [--json FILE]
        [overrides ...]

FOLDER has a folder per domain, each with train/ and valid/ of .txt or .jsonl text. If one is named general, its experts
are open to the tokens of all. Every arm sees the same number of tokens of every domain with the same active FLOPs per
token, so their training FLOPs are equal; the learning rate is constant after the warm-up and falls in the last fifth.
An arm by branches spends half of the tokens on all domains, 0.3 on one branch per domain, and the last fifth, in which
the learning rate falls, on the merged model.
Printed: each arm's parameters, tokens and FLOPs; bits per byte of each domain, over seeds; and their paired differences
from the first arm with standard errors. To check it on a CPU: --size tiny --steps 40 --seeds 1 kernels=torch.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp import planner
from deepseek_exp.checkpoint import manifest
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.data import prepare
from deepseek_exp.train import build
from tests.bench.platform_tax import track
from tests.bench.training import say
from tests.config.test_config import composed

EXPERTS_PER_DOMAIN = 8
# Widths of an expert. A token has four routed experts and the shared one; a dense layer has five times as many units.
WIDTHS = {"tiny": 32, "small": 88, "base": 280}
# Everything but the experts, to be left as it is: factors of 0 on the learning rate.
ALL_BUT_EXPERTS = ("embedding.*", "head.*", "*norm.weight", "*.attention.w*", "*.shared.*", "*.router.*")
FROZEN = (f"+optim.lr_multipliers={{{','.join(f'{name}:0' for name in ALL_BUT_EXPERTS)}}}",)
SCALED = ("model.moe.route_scale=4",)


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        model: option of the group `model`.
        words: its further overrides.
        by_branches: as branches that are merged, or all at once.
        of_branches: further overrides of the branches.
    """

    model: str
    words: tuple[str, ...] = ()
    by_branches: bool = False
    of_branches: tuple[str, ...] = ()


ARMS = {
    "dense": Arm("v4_distill"),
    "v5 jointly": Arm("v5_domain_moe"),
    "v5 jointly, route_scale 4": Arm("v5_domain_moe", SCALED),
    "v5 by branches": Arm("v5_domain_moe", SCALED, by_branches=True),
    "v5 by branches of experts": Arm("v5_domain_moe", SCALED, by_branches=True, of_branches=FROZEN),
}


@dataclass(frozen=True)
class Trained:
    """The result of one training.

    Attributes:
        checkpoint: its last.
        loss: domain -> validation loss, nats per token.
        unlabelled: validation loss if the routers infer the domains; None without domains.
        tokens: it was trained on.
        flops: of the training.
    """

    checkpoint: Path
    loss: dict[str, float]
    unlabelled: float | None
    tokens: int
    flops: float


class Trial:
    """Trains arms on the texts of a folder."""

    def __init__(self, folder: Path, args: argparse.Namespace, overrides: Sequence[str], top: Path) -> None:
        self.folder, self.top, self.steps, self.batch = folder, top, args.steps, args.batch
        found = {path.name for path in folder.iterdir() if path.is_dir()}
        self.domains = sorted(found, key=lambda name: (name != "general", name))
        assert args.steps % (10 * len(self.domains)) == 0, "--steps is no multiple of ten times the domains"
        self.warmup, width = args.steps // 20, WIDTHS[args.size]
        self.overrides = (f"size={args.size}", *overrides, f"output_dir={top}", "tracking=none", "optim=wsd")
        self.widths = {
            # of about the FLOPs of the router and its classifier more than five experts
            "v4_distill": (
                f"model.d_ff={5 * width + 8 * math.ceil((EXPERTS_PER_DOMAIN + 1) * len(self.domains) / 24)}",
            ),
            "v5_domain_moe": (
                f"model.moe.d_expert={width}",
                f"model.moe.domains=[{','.join(self.domains)}]",
                f"model.moe.n_routed_experts={EXPERTS_PER_DOMAIN * len(self.domains)}",
            ),
        }
        cfg = self.experiment(ARMS["dense"], self.domains, self.steps)
        data = prepare(cfg.data)
        for name, text in data.tokenizer.files().items():
            (top / name).write_text(text, encoding="utf-8")
        self.overrides += (f"data.tokenizer={top / 'tokenizer.json'}",)
        self.bytes_per_token = {p.name: p.valid.n_bytes / p.valid.n_tokens for p in data.parts}
        self.n_tokens = {p.name: p.train.n_tokens for p in data.parts}

    def experiment(self, arm: Arm, domains: Sequence[str], steps: int, *words: str) -> ExperimentConfig:
        """Compose a training of an arm on some domains."""
        texts = [
            f"+data.mixture.{name}.{key}={self.folder / name / split}"
            for name in domains
            for key, split in (("path", "train"), ("valid_path", "valid"))
        ]
        return composed(
            f"model={arm.model}", "data=mixture", *self.overrides, *self.widths[arm.model], *arm.words, *texts,
            f"trainer.max_steps={steps}", f"trainer.eval_every_steps={steps}", "trainer.checkpoint_every_steps=1000000",
            f"trainer.global_batch_seqs={self.batch}", f"trainer.micro_batch_seqs={self.batch}",
            "trainer.keep_checkpoints=1", "trainer.log_every_steps=50", *words,
        )  # fmt: skip

    def train(self, cfg: ExperimentConfig) -> Trained:
        """Train; return the result."""
        folder = Path(tempfile.mkdtemp(dir=self.top)) / "run"
        tracked, parts = track(cfg, folder), build.build_parts(cfg)
        texts = parts.data.tokenizer.files()
        trainer, _, _ = build.build_trainer(cfg, parts, tracked, tracked.wait_ready(60), texts)
        trainer.fit(parts.lit, datamodule=parts.datamodule)
        tracked.finish("FINISHED", None)
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        loss = {name: measured[f"val/loss/{name}"] for name in cfg.data.mixture if f"val/loss/{name}" in measured}
        tokens = cfg.trainer.max_steps * cfg.trainer.global_batch_seqs * cfg.data.seq_len
        flops = tokens * planner.flops_per_token(cfg.model, cfg.data.seq_len)
        checkpoint = manifest.list_checkpoints(folder)[-1]
        return Trained(checkpoint, loss, measured.get("val/loss_without_labels"), tokens, flops)

    def run(self, arm: Arm, seed: int) -> Trained:
        """Train an arm from scratch."""
        if arm.by_branches:
            return self._by_branches(arm, seed)
        words = (f"seed={seed}", f"optim.warmup_steps={self.warmup}", "trainer.eval_seqs=0")
        return self.train(self.experiment(arm, self.domains, self.steps, *words))

    def _by_branches(self, arm: Arm, seed: int) -> Trained:
        """Train a model on all domains, a branch of it on each, and the merged branches on all."""
        constant = ("optim.min_lr_ratio=1", "trainer.eval_seqs=8")
        again = f"optim.warmup_steps={self.warmup // 4}"
        first, last = self.steps // 2, self.steps // 5
        words = (f"seed={seed}", f"optim.warmup_steps={self.warmup}", *constant)
        start = self.train(self.experiment(arm, self.domains, first, *words))
        done, branches, steps = [start], {}, (self.steps - first - last) // len(self.domains)
        for i, name in enumerate(self.domains):
            words = (f"seed={seed + 100 + i}", again, *constant, f"init_from={start.checkpoint}", *arm.of_branches)
            done.append(self.train(self.experiment(arm, [name], steps, *words)))
            branches[name] = done[-1].checkpoint
        words = (f"seed={seed + 200}", again, "optim.decay_fraction=0.9", "trainer.eval_seqs=0")
        merged = [f"init_from={start.checkpoint}", *(f"+branches.{name}={path}" for name, path in branches.items())]
        done.append(self.train(self.experiment(arm, self.domains, last, *words, *merged)))
        tokens, flops = sum(d.tokens for d in done), sum(d.flops for d in done)
        return Trained(done[-1].checkpoint, done[-1].loss, done[-1].unlabelled, tokens, flops)

    def bits_per_byte(self, found: Trained) -> dict[str, float]:
        """Return the bits per byte of each domain."""
        return {name: loss / math.log(2) / self.bytes_per_token[name] for name, loss in found.loss.items()}


def with_error(values: Sequence[float], form: str = ".4f") -> str:
    """Return mean ± standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{error}"


def report(trial: Trial, found: dict[str, list[Trained]]) -> None:
    """Print the tables."""
    heads = ("arm", "parameters, active", "tokens", "FLOPs", "tokens per parameter, active", "loss without labels")
    say(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name, runs in found.items():
        cfg = trial.experiment(ARMS[name], trial.domains, trial.steps)
        counted, run = planner.parameters(cfg.model), runs[0]
        labels = "" if run.unlabelled is None else with_error([r.unlabelled for r in runs])
        ratio = f"{run.tokens / counted.total:.2f}, {run.tokens / counted.active:.2f}"
        sizes = f"{counted.total:,}, {counted.active:,}"
        say(f"| {name} | {sizes} | {run.tokens:,} | {run.flops:.4g} | {ratio} | {labels} |")
    bits = {name: [trial.bits_per_byte(run) for run in runs] for name, runs in found.items()}
    (reference, base), columns = next(iter(bits.items())), " | ".join(trial.domains)
    line = f"{'|---' * (1 + len(trial.domains))}|"
    say(f"\n| bits per byte | {columns} |\n{line}")
    for name, runs in bits.items():
        say(f"| {name} | " + " | ".join(with_error([run[d] for run in runs]) for d in trial.domains) + " |")
    say(f"\n| minus {reference} | {columns} |\n{line}")
    for name, runs in list(bits.items())[1:]:
        apart = [[run[d] - other[d] for run, other in zip(runs, base, strict=False)] for d in trial.domains]
        say(f"| {name} | " + " | ".join(with_error(values, "+.4f") for values in apart) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="a multiple of ten times the domains")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step")
    parser.add_argument("--size", choices=WIDTHS, default="small")
    parser.add_argument("--arms", default=";".join(ARMS))
    parser.add_argument("--json", type=Path)
    args, overrides = parser.parse_known_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    say(f"{where}, torch {torch.__version__}, {' '.join(sys.argv[1:])}")
    found: dict[str, list[Trained]] = {name: [] for name in args.arms.split(";")}
    with tempfile.TemporaryDirectory() as top:
        trial = Trial(args.folder.resolve(), args, overrides, Path(top))
        say(f"training tokens: {', '.join(f'{name} {n:,}' for name, n in trial.n_tokens.items())}\n")
        for seed in range(1, args.seeds + 1):
            for name, runs in found.items():
                began = time.monotonic()
                runs.append(trial.run(ARMS[name], seed))
                bits = ", ".join(f"{d} {x:.4f}" for d, x in trial.bits_per_byte(runs[-1]).items())
                say(f"seed {seed}  {name:28} {time.monotonic() - began:6.1f} s  bits per byte {bits}")
        say("")
        report(trial, found)
        if args.json:
            bits = {name: [trial.bits_per_byte(run) for run in runs] for name, runs in found.items()}
            args.json.write_text(json.dumps({"device": where, "arguments": sys.argv[1:], "bits_per_byte": bits}) + "\n")


if __name__ == "__main__":
    main()
