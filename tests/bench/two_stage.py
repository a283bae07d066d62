"""General, then domain fine-tuning against both at once, with and without replay, over domains and seeds, on one GPU.

    python tests/bench/two_stage.py DATA [--seeds 3] [--tokens 50000000] [--size base] [--at-once 8] [overrides ...]

DATA has general.jsonl, general.valid.jsonl and, for each domain, DOMAIN.jsonl and DOMAIN.valid.jsonl, with rows
{prompt, response}, and may have tokenizer.json. A base model is trained on the .py files of Python and its installed
packages. Then, for each seed: 10 epochs of the general rows; and for each domain 5 epochs of its rows from there (two
stages), the same with general rows of a fifth of their bytes among them (replay), and from the base 5 epochs of the
domain's rows and of the general rows twice, mixed (one stage), which are the same tokens as two stages.
Printed: nats per reply token on the valid rows of the domain and of the general rows, as each training ends and as
means, and paired differences over seeds with standard errors. Each training and evaluation is a process; as many run
at once as is asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BYTES_PER_TOKEN = 4.5  # of code that is written for each token to train on; a shorter text is repeated
SEQ_LEN, REPLAY = 1024, 0.2
COMMON = ("device=cuda", "kernels=fused", "trainer.precision=bf16", "trainer.cuda_graphs=true", "tracking=none")
CHAT = ("do=sft", "data=chat", "data.on_long_row=drop", f"data.seq_len={SEQ_LEN}", "trainer.eval_seqs=0")
STEPS = ("trainer.global_batch_seqs=16", "trainer.micro_batch_seqs=16", "trainer.eval_every_steps=100000")
FOUND = re.compile(r"loss ([\d.]+) nats")


def run(folder: Path, words: Sequence[str]) -> tuple[float, Path | None]:
    """Run run.py with a separate output folder; returns its last validation loss and the run's folder."""
    folder.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "run.py"), *words, f"output_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    losses = FOUND.findall(done.stdout)
    if done.returncode or not losses:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return float(losses[-1]), next(iter(sorted((folder / "runs").glob("*"))), None)


def write_code(target: Path, n_bytes: int) -> int:
    """Write .py files, a row each, in a fixed random order; returns their bytes."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | set(sys.path)
    files = sorted({p for f in folders if f and Path(f).is_dir() for p in Path(f).rglob("*.py")})
    random.Random(0).shuffle(files)
    written = 0
    with target.open("w", encoding="utf-8") as out:
        for file in files:
            text = file.read_bytes()[:200_000].decode("utf-8", "ignore")
            out.write(json.dumps({"text": text}) + "\n")
            written += len(text)
            if written >= n_bytes:
                break
    return written


def mix(target: Path, *parts: tuple[Path, float]) -> Path:
    """Write the rows of files, each as many times as asked for, in a fixed random order."""
    rows: list[str] = []
    for path, times in parts:
        lines = path.read_text(encoding="utf-8").splitlines()
        whole, rest = divmod(times, 1)
        rows += lines * int(whole) + random.Random(1).sample(lines, int(rest * len(lines)))
    random.Random(2).shuffle(rows)
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return target


def rows_of(train: Path, valid: Path) -> tuple[str, ...]:
    return f"data.path={train}", f"data.valid_path={valid}"


class Study:
    """The trainings and evaluations, each a process."""

    def __init__(self, data: Path, work: Path, words: Sequence[str]) -> None:
        self.data, self.work = data, work
        self.of_model = [word for word in words if word.startswith("model.")]  # later stages have the base's
        self.words = (*COMMON, *(word for word in words if word not in self.of_model))
        self.domains = sorted(p.stem for p in data.glob("*.jsonl") if "." not in p.stem and p.stem != "general")

    def valid(self, name: str) -> Path:
        return self.data / f"{name}.valid.jsonl"

    def base(self, size: str, n_tokens: int) -> Path:
        """Train the base model."""
        text = self.work / "code.jsonl"
        n_bytes = write_code(text, int(n_tokens * BYTES_PER_TOKEN))
        tokenizer = self.data / "tokenizer.json"
        given = (f"data.tokenizer={tokenizer}",) if tokenizer.exists() else ()
        batch = 32
        steps = n_tokens // (batch * SEQ_LEN)
        words = (
            "model=v4_distill",
            f"size={size}",
            "data=text",
            f"data.path={text}",
            f"data.seq_len={SEQ_LEN}",
            *given,
        )
        words += (f"trainer.max_steps={steps}", f"trainer.global_batch_seqs={batch}", "trainer.micro_batch_seqs=16")
        words += (
            "trainer.eval_every_steps=100000",
            "trainer.checkpoint_every_steps=100000",
            f"optim.warmup_steps={steps // 15}",
        )
        loss, run_dir = run(self.work / "base", (*self.words, *self.of_model, *words))
        say(f"base: {steps * batch * SEQ_LEN:,} tokens of {n_bytes / 1e6:.0f} MB of code, {loss:.3f} nats per token")
        assert run_dir is not None
        return run_dir

    def sft(self, name: str, start: Path, train: Path, valid: str, *words: str) -> tuple[float, Path]:
        """Fine-tune; returns the loss on the valid rows and the run's folder."""
        more = (f"init_from={start}", *rows_of(train, self.valid(valid)), *STEPS, "optim.warmup_steps=0", *words)
        loss, run_dir = run(self.work / name, (*self.words, *CHAT, *more))
        assert run_dir is not None
        return loss, run_dir

    def evaluate(self, name: str, resume: Path, valid: str) -> float:
        """Return the loss of a run on the valid rows of a domain."""
        rows = rows_of(self.data / f"{valid}.jsonl", self.valid(valid))
        words = ("do=eval", f"resume={resume}", "data=chat", "data.on_long_row=drop", *rows, "trainer.eval_seqs=0")
        return run(self.work / name, (*words, "tracking=none"))[0]

    def of_domain(self, domain: str, seed: int, base: Path, general: Path) -> dict[str, tuple[float, float]]:
        """Train every way; returns the losses on the domain's and on the general rows."""
        own, common, found = self.data / f"{domain}.jsonl", self.data / "general.jsonl", {}
        share = REPLAY * len(own.read_bytes()) / len(common.read_bytes())
        mixed = mix(self.work / f"{domain}-{seed}-one.jsonl", (own, 1), (common, 2))
        replay = mix(self.work / f"{domain}-{seed}-replay.jsonl", (own, 1), (common, share))
        found["after the general stage"] = (
            self.evaluate(f"{domain}-{seed}-before", general, domain),
            self.evaluate(f"{domain}-{seed}-before-general", general, "general"),
        )
        ways = {"two stages": (general, own, 5e-4), "replay": (general, replay, 5e-4), "one stage": (base, mixed, 1e-3)}
        for way, (start, rows, lr) in ways.items():
            name, words = f"{domain}-{seed}-{way}".replace(" ", "-"), (f"optim.lr={lr}", f"seed={seed}")
            loss, run_dir = self.sft(name, start, rows, domain, *words, "trainer.max_epochs=5")
            found[way] = loss, self.evaluate(f"{name}-general", run_dir, "general")
            say(f"{domain}, seed {seed}, {way}: {found[way][0]:.3f}, general {found[way][1]:.3f}")
        return found


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def spread(values: Sequence[float]) -> str:
    """Return a mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):+.4f} +- {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--size", default="base")
    parser.add_argument("--at-once", type=int, default=8)
    args, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        study = Study(args.data.resolve(), Path(folder), words)
        base = study.base(args.size, args.tokens)
        rows = args.data.resolve() / "general.jsonl"
        stages = [
            pool.submit(
                study.sft, f"general-{s}", base, rows, "general", "optim.lr=1e-3", f"seed={s}", "trainer.max_epochs=10"
            )
            for s in range(args.seeds)
        ]
        generals = [stage.result()[1] for stage in stages]
        jobs = {
            (domain, seed): pool.submit(study.of_domain, domain, seed, base, generals[seed])
            for domain in study.domains
            for seed in range(args.seeds)
        }
        results = {key: job.result() for key, job in jobs.items()}
    say(f"{'':40} {'domain':>10} {'general':>10}   nats per reply token, mean of {args.seeds} seeds")
    for domain in study.domains:
        of_seeds = [results[domain, seed] for seed in range(args.seeds)]
        for way in of_seeds[0]:
            means = [statistics.mean(found[way][i] for found in of_seeds) for i in range(2)]
            say(f"{domain + ', ' + way:40} {means[0]:10.4f} {means[1]:10.4f}")
        for name, a, b in (
            ("two - one stage", "two stages", "one stage"),
            ("replay - two stages", "replay", "two stages"),
        ):
            both = [spread([found[a][i] - found[b][i] for found in of_seeds]) for i in range(2)]
            say(f"{domain + ', ' + name:40} domain {both[0]}   general {both[1]}")


if __name__ == "__main__":
    main()
