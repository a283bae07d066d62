"""Random command lines, checked in process: `python -m tests.fuzz.config N SEED`.

Each is checked as run.py does it and, if it is accepted, made a job: its checkpoint is looked for, its layout is
chosen and compared with the memory, and a plan is written. Training itself is not started. A case that ends in another
exception than one of ours, or takes more than `SECONDS` of computing, is a defect.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hydra._internal.utils import get_args_parser

from deepseek_exp import config, planner
from deepseek_exp.config import Do, compose
from deepseek_exp.config.keys import is_enum, schema_keys
from deepseek_exp.errors import UserError
from deepseek_exp.experiment.command_line import check_command_line
from deepseek_exp.experiment.job import make_job

SECONDS = 20  # of this process alone: other work of the machine does not count
WALL_SECONDS = 600  # for what waits without computing
KEYS = schema_keys()
GROUPS = {
    "model": ["v1_dense", "v2_moe", "v2_5_sparse", "v3_moe", "v4_distill", "v5_domain_moe", "deepseek_v3"],
    "size": ["tiny", "small", "base", "published", "1b", "3b", "7b", "70b", "175b"],
    "data": ["stdlib", "synthetic", "text", "mixture"],
    "optim": ["adamw", "adamw_scaled", "adafactor"],
    "kernels": ["torch", "fused"],
    "parallel": ["single", "ddp", "zero2", "zero3", "3d", "auto"],
    "cluster": ["cpu_host", "h100_1", "h100_8", "h200_8", "h100_1024", "a100_1024"],
    "launch": ["local", "torchrun", "slurm"],
    "recipes": ["balance", "scaled_lr", "domains", "equal_flops/v1_dense", "shakespeare"],
}
EXTREMES = [
    "", "null", "0", "-1", "1", "2", "7", "1e-320", "1e308", "-1e308", "inf", "-inf", "nan", "1e999", "0.5", "-0.0",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1000000000000", "1" + "0" * 400,
    "9" * 5000, "true", "false", "maybe", "[]", "[1,2]", "{}", "{a:1}", "[[[[]]]]", "x" * 300, "x" * 5000, "'a b'",
    "../../x", "/", ".", "..", "/dev/null", "/dev/null/x", "/proc/x", "~", "'~/x'", "''", "'\\n'", "a/b", "'${'", "???",
    "'\x1b]0;x\x07'", "'\x00'", "日本", "'🙂'", "http://[", "'sqlite:///'", "sqlite:////", "sqlite:///a/b/c.db", "ftp://h/x",
    "http://u:pw@h/x", "file:///x", "a%20b", "'a?b'", "a#b", "0x10", "1_000", "1,2", "+1", "1.", ".5", "1e5", "None",
]  # fmt: skip
INTERPOLATIONS = [
    "${seed}", "${optim.lr}", "${nope}", "${model}", "${oc.env:HOME}", "${oc.env:NOPE_X}", "${lr_from_batch:1,2}",
    "${share:1,2,0}", "${at_most:a,b,c}", "${project:.}", "${trainer.max_steps}", "${data.path}", "${hydra.job.num}",
    "${${seed}}", "${", "${oc.decode:'[1'}", "${output_dir}/x", "${model.moe}", "${resolver_x:1}",
]  # fmt: skip
FLAGS = [
    "-m", "--multirun", "--run", "-r", "--cfg job", "--cfg hydra", "-c all", "--resolve", "-p model", "-p nope",
    "--help", "-h", "--hydra-help", "--info", "--info searchpath", "--config-dir .", "--config-dir /nonexistent",
    "-cd .",
    "--config-name x", "--config-path /x", "--experimental-rerun x", "--nope", "-sc query=bash", "--version", "-x",
]  # fmt: skip
HYDRA = [
    "hydra.run.dir={}", "hydra.sweep.dir={}", "hydra.sweep.subdir={}", "hydra.job.env_copy=[{}]", "hydra.mode={}",
    "hydra.job.chdir={}", "+hydra.callbacks.x._target_={}", "hydra.launcher._target_={}", "hydra.searchpath=[{}]",
    "hydra.searchpath={}", "hydra.sweeper.params={}", "+hydra.sweeper.params.seed={}", "hydra.verbose={}",
    "hydra.output_subdir={}", "hydra/launcher={}", "hydra/sweeper={}", "hydra/job_logging={}", "hydra={}", "hydra/x={}",
    "hydra.job_logging.root.level={}", "hydra.sweeper.max_batch_size={}", "~hydra.callbacks", "+hydra.env.x={}",
]  # fmt: skip
SWEEPS = [
    "seed=1,2", "seed=range(1,4)", "seed=range(0,100000000)", "seed=range(1,2,0)", "optim.lr=interval(0,1)",
    "seed=glob(*)", "model=glob(*)", "model=glob(zz)", "model.n_heads=choice(2,3)", "optim.lr=1e-3,x",
    "optim.lr=range(0.1,0.3,0.1)",
    "seed=shuffle(range(1,5))", "size=tiny,small", "trainer.compile=true,7", "seed=range(5,1)", "seed=sort(3,1)",
]  # fmt: skip
CLASSES = [
    "torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD", "torch.optim.LBFGS", "torch.optim.SparseAdam",
    "torch.optim.Muon", "torch.optim.Nope", "torch.optim.Adafactor", "torch.optim.RMSprop", "os.system",
    "builtins.open",
    "pytorch_lightning.callbacks.EarlyStopping", "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.Timer", "pytorch_lightning.callbacks.LearningRateMonitor",
    "deepseek_exp.train.callbacks.Path",
    "pytorch_lightning.callbacks.Nope", "",
]  # fmt: skip
ARGUMENTS = ["lr", "betas", "eps", "weight_decay", "foo", "fused", "amsgrad", "momentum", "_args_", "_recursive_",
             "monitor", "duration", "patience", "params", "maximize", "_target_", "_partial_"]  # fmt: skip


@dataclass
class Counts:
    """What became of the cases, and those that are defects."""

    outcomes: Counter[str] = field(default_factory=Counter)
    defects: list[tuple[list[str], str]] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{n} {name}" for name, n in sorted(self.outcomes.items()))


class Hang(BaseException):
    """A case takes too long; no handler of exceptions in between takes it."""


def command_line(rng: random.Random) -> list[str]:
    """Return a random command line."""
    words = [word for _ in range(rng.choice([1, 1, 1, 2, 2, 3])) for word in rng.choice(KINDS)(rng)]
    if rng.random() < 0.3:
        words.insert(0, "do=plan")
    if rng.random() < 0.3:
        words.insert(0, "size=tiny")
    return words


def _typed(rng: random.Random) -> list[str]:
    """Set a key to a value of its type, mostly one that makes sense."""
    path, info = rng.choice(list(KEYS.items()))
    if is_enum(info.type):
        return [f"{path}={rng.choice([m.value for m in info.type])}"]
    value: object = rng.choice(["x", "tiny", "README.md", "a b", "outputs/x"])
    if info.type is bool:
        value = rng.choice(["true", "false"])
    elif info.type is int:
        value = rng.choice([0, 1, 2, 3, 4, 8, 16, 64, 100, 256, 1000, 4096, rng.randrange(1, 10**6)])
    elif info.type is float:
        value = rng.choice([0, 1, 0.1, 0.5, 1e-3, 2.0, 10.0, 1e6, rng.random()])
    elif not isinstance(info.type, type):
        value = rng.choice(["{}", "[]", "[a,b]", "{a:1}"])
    return [f"{path}='{value}'" if isinstance(value, str) and " " in value else f"{path}={value}"]


def _extreme(rng: random.Random) -> list[str]:
    return [f"{rng.choice(['', '', '', '+', '++'])}{rng.choice(list(KEYS))}={rng.choice(EXTREMES)}"]


def _misspelt(rng: random.Random) -> list[str]:
    path = list(rng.choice([*KEYS, *GROUPS]))
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(path))
        path[at] = rng.choice(["", path[at] * 2, "x", ".", "_", "@", "/", "-", "é", " "])
    return [f"{''.join(path)}={rng.choice([*EXTREMES, '1', 'tiny'])}"]


def _group(rng: random.Random) -> list[str]:
    group = rng.choice(list(GROUPS))
    return [f"{group}={rng.choice(GROUPS[group])}"]


def _odd_group(rng: random.Random) -> list[str]:
    group = rng.choice([*GROUPS, "trainer", "verify", "tracking", "sample", "export"])
    value = rng.choice([*EXTREMES, *INTERPOLATIONS, "tiny", "[tiny,small]", "default"])
    form = rng.choice(["{}={}", "{}={}", "+{}={}", "++{}={}", "{}@model={}", "{}@_global_={}", "~{}={}", "{}/{}"])
    return [form.format(group, value)]


def _flag(rng: random.Random) -> list[str]:
    return rng.choice(FLAGS).split(" ")


def _deleted(rng: random.Random) -> list[str]:
    return ["~" + rng.choice([*KEYS, *GROUPS, "optim.optimizer.betas", "optim.optimizer.x", "tracking.tags.x", "x"])]


def _hydra(rng: random.Random) -> list[str]:
    values = [*EXTREMES, *CLASSES, "basic", "file://.", "pkg://os", "joblib", "DEBUG", "outputs/x", "${output_dir}/y"]
    return [rng.choice(HYDRA).format(rng.choice(values))]


def _interpolated(rng: random.Random) -> list[str]:
    path = rng.choice([*KEYS, "optim.optimizer", "+tracking.tags.x", "+trainer.callbacks.a"])
    return [f"{path}={rng.choice(INTERPOLATIONS)}"]


def _layout(rng: random.Random) -> list[str]:
    words = [f"parallel={rng.choice(GROUPS['parallel'])}", f"cluster={rng.choice(GROUPS['cluster'])}"]
    for name in rng.sample(["dp", "tp", "pp", "ep", "zero_stage"], rng.randrange(3)):
        words.append(f"parallel.{name}={rng.choice([0, 1, 2, 3, 4, 8, 64, 1024, 10**9])}")
    for name in rng.sample(
        ["gpus_per_node", "n_nodes", "memory_bytes", "memory_bandwidth", "overlap"], rng.randrange(2)
    ):
        words.append(f"cluster.{name}={rng.choice(['1', '3', '8', '100000', '1e-320', '1e308', '0.5'])}")
    for name in rng.sample(["global_batch_seqs", "micro_batch_seqs"], rng.randrange(3)):
        words.append(f"trainer.{name}={rng.choice([1, 2, 7, 64, 1024, 10**6, 10**12])}")
    return [*words, rng.choice(["do=plan", "do=plan", "do=train", "do=verify"])]


def _shape(rng: random.Random) -> list[str]:
    """Choose a model and change one or two of its numbers."""
    words = [f"model={rng.choice(GROUPS['model'])}", f"size={rng.choice(['tiny', 'small', '1b'])}", "do=plan"]
    numbers = [k for k, info in KEYS.items() if k.startswith("model.") and info.type in (int, float, bool)]
    for path in rng.sample(numbers, rng.randrange(1, 3)):
        value = rng.choice([0, 1, 2, 3, 7, 8, 16, 24, 64, 100, 1000, 100000, 2**31, 2**63 - 1, 0.5, 1e-9, 1e9])
        words.append(f"{path}={value}")
    return words


def _entry(rng: random.Random) -> list[str]:
    """Add an entry of a mapping: arguments of an optimizer, callbacks, tags, parts of a mixture."""
    value = rng.choice([*EXTREMES, "1", "0.1", "[0.9,0.95]", "[2,3]", "[0.9]", "val/loss", "README.md", "true"])
    name = rng.choice(ARGUMENTS)
    return rng.choice(
        [
            [f"optim.optimizer._target_={rng.choice(CLASSES)}"],
            [f"+optim.optimizer.{name}={value}"],
            [f"optim.optimizer.{rng.choice(['betas', 'eps', 'fused'])}={value}"],
            [f"+trainer.callbacks.a._target_={rng.choice(CLASSES)}", f"+trainer.callbacks.a.{name}={value}"],
            [f"trainer.callbacks={{a:{{_target_:{rng.choice(CLASSES)}}}}}"],
            [f"+tracking.tags.{rng.choice(['a', 'a.b', 'é', 'mlflow'])}={value}"],
            ["data=mixture", f"+data.mixture.a.{rng.choice(['path', 'weight', 'valid_path', 'x'])}={value}"],
        ]
    )


def _place(rng: random.Random) -> list[str]:
    """Name a file or folder that is not fit for its key."""
    key = rng.choice(
        ["data.path", "data.valid_path", "data.tokenizer", "data.cache_dir", "output_dir", "resume", "init_from",
         "export.path", "tracking.uri", "tracking.run_name", "model.version", "tracking.experiment"]
    )  # fmt: skip
    verb = rng.choice(["do=train", "do=eval", "do=sample", "do=export", "do=plan"])
    return [f"{key}={rng.choice(EXTREMES)}", rng.choice(["data=text", "data=synthetic", verb, verb])]


def _sweep(rng: random.Random) -> list[str]:
    return ["-m", rng.choice(SWEEPS), "size=tiny", "do=plan"]


def _junk(rng: random.Random) -> list[str]:
    letters = "abz019=.,:;/\\[]{}()'\"`$~+-@# \t日%*?!|&<>"
    return ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 12)))]


KINDS: list[Callable[[random.Random], list[str]]] = [
    _typed, _typed, _typed, _extreme, _extreme, _extreme, _misspelt, _group, _odd_group, _flag, _deleted, _hydra,
    _interpolated, _layout, _layout, _shape, _shape, _entry, _entry, _place, _place, _sweep, _junk,
]  # fmt: skip


def outcome(argv: list[str]) -> str:
    """Check one command line as run.py does, and make its job if it is accepted; return what came out.

    Raises:
        Hang: it took too long.
    """
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WALL_SECONDS)
    try:
        check_command_line(argv)
        args = get_args_parser().parse_args(argv)
        if args.multirun or args.cfg or args.info or args.help or args.hydra_help or args.shell_completion:
            return "accepted"
        cfg, _ = compose.compose_tree(args.overrides)
        job = make_job(cfg, args.overrides, "tiny", None)
        if job.cfg.do is Do.plan:
            planner.report(job.cfg)
        return "accepted"
    except UserError as error:
        return "refused" if all(". Fix: " in line for line in str(error).splitlines()) else "refused, not in our form"
    except SystemExit:
        return "refused by argparse"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def run(n: int, seed: int, *, show: bool = False) -> Counts:
    """Check random command lines in an empty folder.

    Args:
        n: how many.
        seed: of the generator; each case has a separate generator, so that one can be repeated.
        show: print each defect when it is found.
    """
    counts = Counts()
    with _place_to_work():
        for i in range(n):
            argv = command_line(random.Random(f"{seed} {i}"))
            try:
                what = outcome(argv)
            except (Hang, Exception) as error:
                what = "hang" if isinstance(error, Hang) else "traceback"
                where = traceback.format_exc(limit=-4)
                counts.defects.append((argv, f"{what} in case {i} of seed {seed}\n{where}"))
            if what == "refused, not in our form":
                counts.defects.append((argv, f"{what} in case {i} of seed {seed}"))
            counts.outcomes[what] += 1
            if show and counts.defects and counts.defects[-1][0] is argv:
                sys.__stdout__.write(f"{[w[:300] for w in argv]}\n{counts.defects[-1][1]}\n")  # type: ignore[union-attr]
    return counts


@contextlib.contextmanager
def _place_to_work() -> Iterator[None]:
    """Work in an empty folder, quietly, with one Hydra for all cases and an alarm that raises."""
    config.register()
    here, clocks = Path.cwd(), (signal.SIGALRM, signal.SIGPROF)
    before = [signal.signal(clock, _too_long) for clock in clocks]
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, compose.hydra_ready(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        (Path(folder) / "README.md").write_text("some text\n", encoding="utf-8")
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                yield
        finally:
            os.chdir(here)
            for clock, handler in zip(clocks, before, strict=True):
                signal.signal(clock, handler)


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {SECONDS} s of computing, or {WALL_SECONDS} s of waiting")


def main() -> int:
    """Print the counts of N cases of a seed, and each defect; return 1 if there is one."""
    n, seed = int(sys.argv[1]), int(sys.argv[2])
    counts = run(n, seed, show=True)
    sys.stdout.write(f"seed {seed}, {n:,} command lines: {counts}\n")
    return 1 if counts.defects else 0


if __name__ == "__main__":
    sys.exit(main())
