"""Trainings of any layout, short ones, one after the other: what each step measured and the weights at the end.

Starting a rank costs seconds of imports. So one process, `python -m tests.parallel.layouts`, imports everything once
and forks the ranks of each training, which share nothing with those of the one before.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.interpreter import quicken
from tests.runs import ROOT, hold_port

STEPS = 20
SHORT = (
    "size=tiny",
    "data=synthetic",
    "device=cpu",
    f"trainer.max_steps={STEPS}",
    "trainer.eval_every_steps=10",
    "trainer.eval_seqs=3",
    "trainer.log_every_steps=1",
    f"trainer.checkpoint_every_steps={STEPS}",
    "trainer.n_threads=1",
    "trainer.global_batch_seqs=8",
    "trainer.micro_batch_seqs=1",
    "optim.lr=1e-3",  # a rounding error then does not grow much in these steps
    "optim.warmup_steps=3",
    "optim.clip_norm=0.5",
)
# A wrong sum shows in the first gradient norm, a wrong update in the second loss.
FEW_STEPS = 3
FEW = (
    f"trainer.max_steps={FEW_STEPS}",
    f"trainer.eval_every_steps={FEW_STEPS}",
    f"trainer.checkpoint_every_steps={FEW_STEPS}",
    "optim.warmup_steps=1",
    "model.n_layers=4",
)
# not of the training itself, but of the machine and of the layout
APART = ("perf/step_seconds", "perf/tokens_per_second", "perf/peak_memory_bytes", "parallel/")
HANG_SECONDS = 120.0
# what a rank needs, some of it late: DeepSpeed imports half of torch when it makes an engine
IMPORTED = (
    "deepseek_exp.train.build",
    "tests.config.test_config",
    "tests.parallel.layouts",
    "deepspeed.pipe",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)


class Watch:
    """What a test does inside of each rank; a subclass of a test module is named as module:class."""

    def before_build(self, cfg: Any) -> Any:
        """Change the checked configuration, or anything else, before the model is built."""
        return cfg

    def before_fit(self, parts: Any, trainer: Any) -> None:
        """Change or remember parts."""

    def result(self) -> Any:
        """Give what the rank reports, as JSON."""


class Nudged(Watch):
    """Rounds otherwise: initial weights moved by a unit in the last place, the gradients' norm in fp64.

    How far that leads is what no layout need be nearer than; in fp32 the norm of one process is off by 1e-6.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_fit(self, parts: Any, trainer: Any) -> None:
        import torch

        from deepseek_exp.train import local_engine

        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for p in parts.lit.parameters():
                p.mul_(1 + torch.randint(-1, 2, p.shape, generator=generator) * torch.finfo(p.dtype).eps)

        def clip(optimizer: Any, clip_norm: float) -> Any:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norm = torch.stack([g.double().norm() for g in gradients]).norm()
            torch._foreach_mul_(gradients, min(1.0, clip_norm / norm.item()))
            return norm

        local_engine.clip_gradients = clip


@dataclass(frozen=True)
class Ran:
    """A training that came to its end.

    Attributes:
        metrics: step -> name -> value, as they were logged.
        said: what each rank's `Watch` reported.
        folder: of the run.
    """

    metrics: dict[int, dict[str, float]]
    said: list[Any]
    folder: Path

    def trace(self, name: str) -> list[float]:
        """Give a metric of all steps that logged it."""
        return [values[name] for _, values in sorted(self.metrics.items()) if name in values]

    def weights(self) -> dict[str, Any]:
        """Give the whole weights that the last step left, in fp32 where there are masters."""
        from deepseek_exp.checkpoint import manifest
        from deepseek_exp.checkpoint.shards import open_state

        state = open_state(manifest.list_checkpoints(self.folder)[-1])
        return {name: state.read(name, "weight") for name in state.names} | {
            name: state.buffer(name) for name in state.buffers
        }


@dataclass(frozen=True)
class Difference:
    """How far two trainings are from each other.

    Attributes:
        loss: largest absolute difference of any loss of any step, in nats.
        grad_norm: largest difference of gradient norms before clipping, relative.
        weight: largest absolute difference of the weights and buffers at the end.
        routing: largest absolute difference of how evenly the experts were chosen.
    """

    loss: float
    grad_norm: float
    weight: float
    routing: float


def difference(a: Ran, b: Ran) -> Difference:
    """Compare two trainings, which have to have logged the same names at the same steps."""
    names = {name for values in a.metrics.values() for name in values}
    for step in a.metrics.keys() | b.metrics.keys():
        assert a.metrics[step].keys() == b.metrics[step].keys(), f"step {step}"
    before, after = a.weights(), b.weights()
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    return Difference(
        loss=max(_largest(a, b, name) for name in names if "loss" in name),
        grad_norm=max(abs(x / y - 1) for x, y in _pairs(a, b, "optim/grad_norm")),
        weight=max((after[name].float() - before[name].float()).abs().max().item() for name in before),
        routing=max((_largest(a, b, name) for name in names if "moe/" in name and "loss" not in name), default=0.0),
    )


def _largest(a: Ran, b: Ran, name: str) -> float:
    return max(abs(x - y) for x, y in _pairs(a, b, name))


def _pairs(a: Ran, b: Ran, name: str) -> Iterator[tuple[float, float]]:
    return zip(a.trace(name), b.trace(name), strict=True)


def layout(pp: int = 1, tp: int = 1, dp: int = 1, ep: int = 1, zero_stage: int = 1) -> tuple[str, ...]:
    """Give the overrides of a layout."""
    stage = zero_stage if pp * tp * dp > 1 else 0
    degrees = {"pp": pp, "tp": tp, "dp": dp, "ep": ep, "zero_stage": stage}
    return tuple(f"parallel.{name}={degree}" for name, degree in degrees.items())


def n_ranks(degrees: Mapping[str, int]) -> int:
    """Give the ranks of a layout's degrees."""
    return math.prod(degrees.get(axis, 1) for axis in ("pp", "tp", "dp"))


def labelled_texts(folder: Path) -> tuple[str, ...]:
    """Write a small text for each of v5's domains; gives the overrides that train on them, with labels."""
    lines = {"general": "{0} + {0} = {1}\n", "finance": "{0} dollars\n", "medical": "{0} mg twice\n", "law": "§ {0}\n"}
    parts = ["data=mixture"]
    for weight, (name, line) in enumerate(lines.items(), start=1):
        path = folder / f"{name}.txt"
        path.write_text("".join(line.format(i, 2 * i) for i in range(3000)))
        parts += [f"+data.mixture.{name}.path={path}", f"+data.mixture.{name}.weight={weight}"]
    return tuple(parts)


class RankDied(AssertionError):
    """A rank died or hung; the others were ended."""


class Layouts:
    """Runs trainings of any number of ranks in `folder`; use it in a with statement."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n_runs = folder, 0

    def __enter__(self) -> Layouts:
        command = [sys.executable, "-m", "tests.parallel.layouts"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # ranks that are still there die with it
        self.process.communicate()

    def run(
        self,
        n_ranks: int,
        *overrides: str,
        watch: type[Watch] = Watch,
        watch_args: tuple[Any, ...] = (),
        resume: Ran | None = None,
        hang_seconds: float = HANG_SECONDS,
    ) -> Ran:
        """Train.

        Args:
            n_ranks: processes; 1 is one that knows of no others.
            overrides: of the configuration, after SHORT.
            watch: what to do inside of each rank.
            watch_args: what it is made with.
            resume: go on from the last checkpoint of this run.
            hang_seconds: the ranks are ended when they take longer.

        Raises:
            RankDied: one did, with what all of them said.
        """
        folder = self.folder / f"run-{self.n_runs:03d}"
        self.n_runs += 1
        folder.mkdir()
        cache = f"data.cache_dir={self.folder / 'cache'}"
        job = {"n_ranks": n_ranks, "overrides": [*SHORT, cache, *overrides], "folder": str(folder)}
        job |= {"watch": f"{watch.__module__}:{watch.__qualname__}", "hang_seconds": hang_seconds}
        job["watch_args"] = watch_args
        job["resume"] = str(resume.folder) if resume is not None else None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        ended = json.loads(self.process.stdout.readline() or '{"rank": 0, "how": "never began"}')
        if ended["rank"] is not None:
            said = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("rank-*.log")))
            raise RankDied(f"rank {ended['rank']} of {n_ranks} {ended['how']}: {' '.join(overrides)}\n{said}")
        reports = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(n_ranks)]
        metrics = {int(step): values for step, values in reports[0]["metrics"].items()}
        return Ran(metrics, [report["said"] for report in reports], folder)


@dataclass
class Log:
    """Stands where the tracked run does.

    Attributes:
        run_dir: where checkpoints go.
        metrics: step -> name -> value.
    """

    run_dir: Path
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def log_foreign_metrics(self, values: Mapping[str, Any], step: int) -> None:
        kept = {name: float(value) for name, value in values.items() if not name.startswith(APART)}
        self.metrics.setdefault(step, {}).update(kept)


def train(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do one rank's part of a job; gives its report."""
    from deepseek_exp.checkpoint import manifest
    from deepseek_exp.train import build
    from tests.config.test_config import composed

    module, _, name = job["watch"].partition(":")
    watch: Watch = getattr(importlib.import_module(module), name)(*job["watch_args"])
    cfg = watch.before_build(composed(*job["overrides"]))
    log = Log(Path(job["folder"]))
    parts = build.build_parts(cfg)
    trainer, _, _ = build.build_trainer(cfg, parts, log, "run", {})
    trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ != "Progress"]
    watch.before_fit(parts, trainer)
    resume = manifest.list_checkpoints(Path(job["resume"]))[-1] if job["resume"] else None
    trainer.fit(parts.lit, datamodule=parts.datamodule, ckpt_path=resume)
    return {"metrics": log.metrics, "said": watch.result()}


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def become_rank(job: Mapping[str, Any], rank: int, port: int) -> None:
    """Turn a forked process into a rank, and never return."""
    code = 1
    try:
        die_with_parent()
        with Path(job["folder"], f"rank-{rank}.log").open("wb", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR2)
        if job["n_ranks"] > 1:
            os.environ |= rank_environment(rank, job["n_ranks"], port)
        report = train(job)
        Path(job["folder"], f"rank-{rank}.json").write_text(json.dumps(report))
        if job["n_ranks"] > 1:
            meet()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def meet() -> None:
    """Wait for the others, which would take a rank that has left for a dead one."""
    import torch.distributed as dist

    dist.barrier()


def rank_environment(rank: int, n_ranks: int, port: int) -> dict[str, str]:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks, "GROUP_RANK": 0}
    place = {"NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    return {name: str(value) for name, value in (world | place).items()}


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Fork the ranks of a job and wait for them; says which one ended badly, and how."""
    held, pids = hold_port(), []
    from tests.config.test_config import composed

    with contextlib.suppress(Exception):  # which each rank reports
        composed(*job["overrides"])  # the ranks then have it
    for rank in range(job["n_ranks"]):
        pid = os.fork()
        if pid == 0:
            become_rank(job, rank, held.getsockname()[1])
        pids.append(pid)
    deadline, left = time.monotonic() + job["hang_seconds"], dict(enumerate(pids))
    while left and time.monotonic() < deadline:
        rank, status = _one_that_ended(left)
        if status:
            end(left)
            return {"rank": rank, "how": f"ended with {os.waitstatus_to_exitcode(status)}"}
    if left:
        for pid in left.values():
            os.kill(pid, signal.SIGUSR2)  # its stack goes to its log
        time.sleep(0.5)
        rank = min(left)
        end(left)
        return {"rank": rank, "how": f"did not end within {job['hang_seconds']:g} s"}
    return {"rank": None}


def _one_that_ended(left: dict[int, int]) -> tuple[int | None, int]:
    """Wait a moment for a rank to end, and take it off the list."""
    for rank, pid in left.items():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del left[rank]
            return rank, status
    time.sleep(0.02)
    return None, 0


def end(left: dict[int, int]) -> None:
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def serve() -> None:
    """Import, then work off jobs from stdin, each a line of JSON, until it is closed."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.redirect_stdout(open(os.devnull, "w")):  # noqa: PTH123
        for module in IMPORTED:
            importlib.import_module(module)
    quicken()
    gc.freeze()  # a collection would have each fork copy what it leaves alone
    while line := sys.stdin.readline():
        answers.write(json.dumps(run_job(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
