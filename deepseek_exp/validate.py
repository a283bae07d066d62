"""The rules of a configuration: the range of each key, and what must hold between keys and sections."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from deepseek_exp import text_files
from deepseek_exp.class_rules import class_problems
from deepseek_exp.config import (
    DataConfig,
    Device,
    Do,
    ExperimentConfig,
    Kernel,
    LaunchConfig,
    Launcher,
    MixturePart,
    Order,
    Precision,
    Source,
)
from deepseek_exp.disk import expand
from deepseek_exp.errors import Problem
from deepseek_exp.layout import IN_ONE_PROCESS, degrees, layout_problems, too_many
from deepseek_exp.model_rules import model_problems
from deepseek_exp.topology import divisors
from deepseek_exp.value_rules import is_file, is_folder, path_problems, text_problems, tracking_problems

# arguments of torch.optim.AdamW that choose how it computes, not what
HOW = ("fused", "foreach")
LOWEST_TEMPERATURE = 1e-6
# the first GPUs with fp8 products, and those with PyTorch's grouped ones
FP8_CAPABILITY, GROUPED_CAPABILITY = (8, 9), (9, 0)
# the CUDA driver's numbers of COMPUTE_CAPABILITY_MAJOR and _MINOR
CAPABILITY_ATTRIBUTES = (75, 76)


def problems(exp: ExperimentConfig) -> list[Problem]:
    """Find everything that is wrong with an experiment, without importing torch or touching the network."""
    found = [*text_problems(exp), *_ranges(exp, "")]
    if any(_is_huge(p.value) for p in found):  # the rules would count up to it
        return found
    for rule in RULES:
        found += rule(exp)
    return found


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value > 10**9


def _ranges(section: Any, prefix: str) -> Iterator[Problem]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _ranges(value, f"{prefix}{field.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield Problem(prefix + field.name, value, "is not a finite number", "use a number")
        elif value is not None:
            for name, bound in field.metadata.get("bounds", {}).items():
                holds, words, fix = BOUNDS[name]
                if not holds(value, bound):
                    shown = f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
                    yield Problem(prefix + field.name, value, f"must be {words} {shown}", fix.format(shown))


BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str, str]] = {
    "ge": (lambda v, b: v >= b, "at least", "use {} or more"),
    "gt": (lambda v, b: v > b, "greater than", "use more than {}"),
    "le": (lambda v, b: v <= b, "at most", "use {} or less"),
    "lt": (lambda v, b: v < b, "less than", "use less than {}"),
}


def _sample(exp: ExperimentConfig) -> Iterator[Problem]:
    domain, names = exp.sample.domain, exp.model.moe.domains
    if domain is not None and domain not in names:
        rule = f"is not one of model.moe.domains={names}"
        yield Problem("sample.domain", domain, rule, f"use one of {', '.join(names)}" if names else "leave it out")


def _temperature(exp: ExperimentConfig) -> Iterator[Problem]:
    t = exp.sample.temperature
    if 0 < t < LOWEST_TEMPERATURE:  # the logits divided by it are beyond what float32 holds
        rule = f"must be 0 or at least {LOWEST_TEMPERATURE:g}"
        yield Problem("sample.temperature", t, rule, "use 0 for the most likely token")


def _export(exp: ExperimentConfig) -> Iterator[Problem]:
    """Find a folder that an export cannot make."""
    if exp.do is not Do.export or exp.export.path is None or not exp.export.path.strip():
        return
    path = Path(exp.export.path)
    if path.name in ("", ".."):
        rule = "is no name of a folder that is still to be made"
        yield Problem("export.path", exp.export.path, rule, "name a new folder, as in export.path=my_model")
        return
    above = next((p for p in path.absolute().parents if os.path.lexists(p)), Path("/"))
    if not is_folder(above):
        rule, fix = f"lies below {above}, which is no folder", "name a new folder below an existing one"
        yield Problem("export.path", exp.export.path, rule, fix)


def _lengths(exp: ExperimentConfig) -> Iterator[Problem]:
    m, d = exp.model, exp.data
    if d.seq_len > m.max_seq_len:
        rule = f"is longer than model.max_seq_len={m.max_seq_len}"
        fix = f"set data.seq_len={m.max_seq_len} or less, or raise model.max_seq_len"
        yield Problem("data.seq_len", d.seq_len, rule, fix)
    if m.memory_len and not m.window:
        rule = "needs a local window: without one the memory would be the whole past"
        yield Problem("model.memory_len", m.memory_len, rule, "set model.window to a length, or model.memory_len=0")
    if m.memory_len and m.window and m.memory_len >= m.window:
        rule = f"is more than a query of model.window={m.window} sees of it"
        yield Problem("model.memory_len", m.memory_len, rule, f"set model.memory_len={m.window - 1} or less")
    if m.memory_len and exp.trainer.compile:
        rule = f"does not reach the segments of a model with model.memory_len={m.memory_len}"
        yield Problem("trainer.compile", True, rule, "set trainer.compile=false, or model.memory_len=0")
    if m.memory_len and d.order is not Order.contiguous:
        rule = f"needs each sequence to go on where the one before ended, and data.order is '{d.order.value}'"
        yield Problem("model.memory_len", m.memory_len, rule, "set data.order=contiguous, or model.memory_len=0")


def _vocabulary(exp: ExperimentConfig) -> Iterator[Problem]:
    if exp.data.vocab_size > exp.model.vocab_size:
        rule = f"is more than model.vocab_size={exp.model.vocab_size}"
        yield Problem(
            "data.vocab_size", exp.data.vocab_size, rule, f"set data.vocab_size={exp.model.vocab_size} or less"
        )


def _batches(exp: ExperimentConfig) -> Iterator[Problem]:
    t = exp.trainer
    if min(t.micro_batch_seqs, t.global_batch_seqs) >= 1 and t.global_batch_seqs % t.micro_batch_seqs:
        near = min(divisors(t.global_batch_seqs), key=lambda d: abs(d - t.micro_batch_seqs))
        rule = f"does not divide trainer.global_batch_seqs={t.global_batch_seqs}"
        yield Problem("trainer.micro_batch_seqs", t.micro_batch_seqs, rule, f"use trainer.micro_batch_seqs={near}")
    if exp.optim.warmup_steps >= t.max_steps:
        rule = f"leaves no step of trainer.max_steps={t.max_steps} at full learning rate"
        fix = f"set optim.warmup_steps={t.max_steps // 10}, or train for more steps"
        yield Problem("optim.warmup_steps", exp.optim.warmup_steps, rule, fix)


def _data(exp: ExperimentConfig) -> Iterator[Problem]:
    d = exp.data
    if d.source is Source.text and d.path is None:
        rule = "is needed for data.source='text'"
        yield Problem(
            "data.path", None, rule, "set data.path to a file, folder or glob of .txt .md .jsonl .jsonl.gz .parquet"
        )
    for name in ("path", "valid_path"):
        value = getattr(d, name)
        if value is not None and d.source is not Source.text:
            rule = f"is not read by data.source='{d.source.value}'"
            fix = "add data=text"
            if d.source is Source.mixture:
                fix = f"set data.{name}=null and give each part its own, as in +data.mixture.<name>.{name}={value}"
            yield Problem(f"data.{name}", value, rule, fix)
        elif value is not None:
            yield from _exists(f"data.{name}", value)
    if d.tokenizer is not None and not is_file(expand(d.tokenizer)):
        fix = "name a tokenizer.json, or set data.tokenizer=null to train one"
        yield Problem("data.tokenizer", d.tokenizer, f"is no file (looked in {Path.cwd()})", fix)
    if d.source is Source.synthetic and d.max_bytes is None:
        yield Problem("data.max_bytes", None, "is needed for data.source='synthetic'", "set data.max_bytes=300000")


def _mixture(exp: ExperimentConfig) -> Iterator[Problem]:
    d = exp.data
    if d.source is not Source.mixture:
        if d.mixture:
            rule = f"has parts, and data.source='{d.source.value}' reads none"
            yield Problem("data.mixture", ", ".join(d.mixture), rule, "add data=mixture, or leave the parts out")
        return
    if not d.mixture:
        fix = "add +data.mixture.<name>.path=<file, folder or glob> +data.mixture.<name>.weight=1 for each part"
        yield Problem("data.mixture", {}, "has no part, and data.source='mixture' needs one at least", fix)
    if d.order is not Order.shuffled:
        rule = "cannot be used with data.source='mixture', whose neighbours in a lane are of different texts"
        yield Problem("data.order", d.order.value, rule, "set data.order=shuffled, or train on one text")
    for name, part in d.mixture.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            rule = "is not a name of letters, digits, _ and -, which metrics and keys are named with"
            yield Problem("data.mixture", name, rule, "rename the part")
        yield from _part(f"data.mixture.{name}", part)


def _part(key: str, part: Any) -> Iterator[Problem]:
    names = ", ".join(f.name for f in dataclasses.fields(MixturePart))
    if not isinstance(part, MixturePart):
        rule, fix = f"is not a part, which has the keys {names}", f"write +{key}.path=<file, folder or glob>"
        if isinstance(part, dict):
            unknown = next(k for k in part if k not in names.split(", "))
            key, part, rule = f"{key}.{unknown}", part[unknown], f"is not a key of a part ({names})"
            fix = "correct the name or remove it"
        yield Problem(key, part, rule, fix)
        return
    if isinstance(part.weight, bool) or not isinstance(part.weight, int | float):
        yield Problem(f"{key}.weight", part.weight, "is not a number", f"use a number, for example {key}.weight=1")
    else:
        yield from _ranges(dataclasses.replace(part, path="", valid_path=""), f"{key}.")
    for name in ("path", "valid_path"):
        value = getattr(part, name)
        if value == MISSING or (name == "path" and value is None):
            yield Problem(f"{key}.path", None, "has no value", f"add +{key}.path=<file, folder or glob>")
        elif value is not None and not isinstance(value, str):
            yield Problem(f"{key}.{name}", value, "is not a text", "name a file, folder or glob")
        elif value is not None:
            yield from _exists(f"{key}.{name}", value)


def _exists(key: str, path: str) -> Iterator[Problem]:
    flaws = list(path_problems(key, path))
    if flaws:  # those of a part of a mixture are found here alone
        yield from flaws if key.startswith("data.mixture.") else ()
        return
    fix = "name a file, folder or glob that does"
    try:
        if not text_files.exists(path):
            yield Problem(key, path, f"does not exist (looked in {Path.cwd()})", fix)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        yield Problem(key, path, f"cannot be read ({reason})", "name a file, folder or glob that can be")


def _device(exp: ExperimentConfig) -> Iterator[Problem]:
    if exp.device is Device.cuda and exp.do is not Do.plan and not _n_gpus():
        rule = "needs a CUDA device and none is visible"
        yield Problem("device", exp.device.value, rule, "use device=cpu or device=auto")


def _kernels(exp: ExperimentConfig) -> Iterator[Problem]:
    """Find kernels that cannot run here."""
    computes = exp.do not in (Do.plan, Do.export)
    if not computes or exp.launch.launcher is not Launcher.local or _runs_triton(exp):
        return
    names = [name for name, kernel in dataclasses.asdict(exp.kernels).items() if kernel is Kernel.triton]
    if names:
        why = "device=cpu is asked for" if exp.device is Device.cpu else "none is visible"
        key = f"kernels.{names[0]}" if len(names) == 1 else f"kernels.{{{','.join(names)}}}"
        yield Problem(key, Kernel.triton.value, f"needs a CUDA device and {why}", "use kernels=torch")


def _fp8(exp: ExperimentConfig) -> Iterator[Problem]:
    """Find products of 8-bit floating numbers that nothing asks for or the hardware has not; a CPU emulates them."""
    if exp.trainer.precision is not Precision.fp8:
        if exp.kernels.fp8_experts:
            fix = "set trainer.precision=fp8, or kernels.fp8_experts=false"
            yield Problem("kernels.fp8_experts", True, "needs trainer.precision='fp8'", fix)
        return
    key, value, fix = "trainer.precision", Precision.fp8.value, "set trainer.precision=bf16"
    if exp.do is Do.plan and exp.cluster.peak_fp8_flops is None:
        rule = f"needs GPUs that compute in it, and cluster.gpu='{exp.cluster.gpu}' has cluster.peak_fp8_flops=null"
        yield Problem(key, value, rule, f"{fix}, or take another cluster")
    on_gpus = exp.do.trains and exp.launch.launcher is Launcher.local and exp.device is not Device.cpu and _n_gpus()
    if not on_gpus:
        return
    has = _capability()
    if has < FP8_CAPABILITY:
        rule = f"needs a GPU of compute capability 8.9 or more, and this one has {has[0]}.{has[1]}"
        yield Problem(key, value, rule, fix)
    elif exp.kernels.fp8_experts and exp.model.moe.n_routed_experts and has != GROUPED_CAPABILITY:
        rule = f"needs a GPU of compute capability 9.0, and this one has {has[0]}.{has[1]}"
        yield Problem("kernels.fp8_experts", True, rule, "set kernels.fp8_experts=false")


def _weight_bits(exp: ExperimentConfig) -> Iterator[Problem]:
    """Find what keeps a model from being sampled from with integers for weights."""
    bits = exp.sample.weight_bits
    if bits not in (0, 4, 8):
        yield Problem("sample.weight_bits", bits, "must be 0, 4 or 8", "use 8, or 0 for weights as they are")
    elif bits and exp.do is not Do.sample:
        yield Problem("sample.weight_bits", bits, "is for do=sample", "set sample.weight_bits=0")
    elif bits and not _runs_triton(exp):
        yield Problem("sample.weight_bits", bits, "needs a CUDA device, which this is without", "use 0")


def _fused_adamw(exp: ExperimentConfig) -> Iterator[Problem]:
    """Find what the fused optimizer cannot do."""
    bits, target = exp.optim.state_bits, exp.optim.optimizer.get("_target_")
    if bits not in (8, 32):
        yield Problem("optim.state_bits", bits, "must be 8 or 32", "use 32, or 8 to save memory")
    if exp.kernels.adamw is Kernel.torch:
        if bits == 8:
            yield Problem("optim.state_bits", bits, "needs kernels.adamw='triton'", "set kernels.adamw=triton, or 32")
        return
    takes = {"_target_", "betas", "eps", *HOW}
    others = sorted(set(exp.optim.optimizer) - takes)
    if target != "torch.optim.AdamW" or others:
        rule = f"does what torch.optim.AdamW does with betas and eps, and is asked for {target}"
        rule += f" with {', '.join(others)}" if others else ""
        yield Problem("kernels.adamw", exp.kernels.adamw.value, rule, "set kernels.adamw=torch, or optim=adamw")
    try:
        n_ranks = degrees(exp).world_size
    except ValueError:
        return  # told by layout_problems
    if bits == 8 and n_ranks > 1:
        rule = f"is for one process, and this layout has {n_ranks:,} ranks, whose checkpoints hold fp32 moments"
        yield Problem("optim.state_bits", bits, rule, "set optim.state_bits=32, or parallel=single")


def _launch(exp: ExperimentConfig) -> Iterator[Problem]:
    """Find what keeps the ranks from being started, where ranks are."""
    if exp.do is Do.plan or exp.do in IN_ONE_PROCESS:
        return
    yield from _unread_launch_keys(exp.launch)
    yield from _unprintable_words(exp.launch)
    if exp.launch.submit and shutil.which("sbatch") is None:
        fix = "set launch.submit=false and submit the script where Slurm is, or put sbatch into PATH"
        yield Problem("launch.submit", True, "needs sbatch, which is not in PATH", fix)
    try:
        layout = degrees(exp)
    except ValueError:
        return  # told by layout_problems
    if exp.launch.launcher is Launcher.local:
        n_gpus = 0 if exp.device is Device.cpu else _n_gpus()
        if 0 < n_gpus < layout.world_size:
            fix = f"lower parallel.dp, parallel.tp or parallel.pp to {n_gpus} ranks or less, or set device=cpu"
            yield too_many(layout, f"this machine has {n_gpus} GPU{'s' * (n_gpus > 1)}", fix)
        return
    yield from _nodes(exp.launch, layout.world_size)


def _verify(exp: ExperimentConfig) -> Iterator[Problem]:
    """Find what keeps a layout from being compared with one process."""
    if exp.do is not Do.verify:
        return
    if exp.verify.steps > exp.trainer.max_steps:
        rule = f"is more than trainer.max_steps={exp.trainer.max_steps}"
        yield Problem("verify.steps", exp.verify.steps, rule, f"use {exp.trainer.max_steps} or less")
    if exp.resume is not None:
        rule = "is not read by do=verify, whose two runs start anew"
        yield Problem("resume", exp.resume, rule, "leave resume out")
    if exp.launch.launcher is not Launcher.local:
        rule = "cannot be used with do=verify, whose two runs follow each other on this machine"
        yield Problem("launch.launcher", exp.launch.launcher.value, rule, "use launch=local")


def _unread_launch_keys(launch: LaunchConfig) -> Iterator[Problem]:
    for name, (off, readers) in LAUNCH_KEYS.items():
        value = getattr(launch, name)
        if value != off and launch.launcher not in readers:
            rule = f"is not read by launch.launcher='{launch.launcher.value}'"
            fix = f"add launch={' or launch='.join(readers)}, or leave launch.{name} out"
            yield Problem(f"launch.{name}", value, rule, fix)


def _unprintable_words(launch: LaunchConfig) -> Iterator[Problem]:
    """Refuse words that would begin another line in a script, or that a terminal obeys."""
    for name in ("master_addr", "socket_ifname", "account", "partition", "time_limit"):
        value = getattr(launch, name)
        if value is not None and not value.isprintable():
            rule = "has control characters or line breaks, which a script or a terminal would obey"
            yield Problem(f"launch.{name}", value, rule, f"write launch.{name} without them")


NODES = (Launcher.torchrun, Launcher.slurm)
# what each key is when it says nothing, and who reads it
LAUNCH_KEYS: dict[str, tuple[Any, tuple[Launcher, ...]]] = {
    "n_nodes": (1, NODES),
    "ranks_per_node": (0, NODES),
    "master_addr": (None, (Launcher.torchrun,)),
    "account": (None, (Launcher.slurm,)),
    "partition": (None, (Launcher.slurm,)),
    "time_limit": (None, (Launcher.slurm,)),
    "submit": (False, (Launcher.slurm,)),
}


def _nodes(launch: LaunchConfig, n_ranks: int) -> Iterator[Problem]:
    n, each = launch.n_nodes, launch.ranks_per_node
    if n < 1 or each < 0:
        return  # told by the ranges
    if n_ranks % n:
        rule, fix = f"does not share {n_ranks} ranks evenly", "use one of " + ", ".join(map(str, divisors(n_ranks)))
        yield Problem("launch.n_nodes", n, rule, fix)
    elif each not in (0, n_ranks // n):
        rule = f"and launch.n_nodes={n} make {each * n} ranks, and parallel asks for {n_ranks}"
        yield Problem("launch.ranks_per_node", each, rule, f"use launch.ranks_per_node={n_ranks // n}, or 0")


def _runs_triton(exp: ExperimentConfig) -> bool:
    """Say whether Triton's kernels run here; its interpreter runs them on a CPU, slowly, which is meant for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" or (exp.device is not Device.cpu and _n_gpus() > 0)


def _capability() -> tuple[int, int]:
    """Ask the CUDA driver for the compute capability of the first GPU."""
    driver, found = ctypes.CDLL("libcuda.so.1"), (ctypes.c_int(), ctypes.c_int())
    for value, attribute in zip(found, CAPABILITY_ATTRIBUTES, strict=True):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    return found[0].value, found[1].value


def _n_gpus() -> int:
    """Ask the CUDA driver itself for the GPUs there are, which takes milliseconds; it heeds CUDA_VISIBLE_DEVICES."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


RULES = (
    model_problems,
    _sample,
    _temperature,
    _export,
    _lengths,
    _vocabulary,
    _batches,
    _data,
    _mixture,
    tracking_problems,
    class_problems,
    _device,
    _kernels,
    _fp8,
    _fused_adamw,
    _weight_bits,
    layout_problems,
    _launch,
    _verify,
)


# where data and files lie may differ: data are identified by their digests once they are read
PLACES = ("path", "valid_path", "tokenizer", "n_workers", "cache_dir")


def resume_problems(saved: ExperimentConfig, now: ExperimentConfig) -> list[Problem]:
    """Return what differs from the checkpoint and may not.

    Always the model; for a training that continues also the seed, what decides about the data except its paths, the
    precision and the optimizer's class and arguments (its learning rate, decay and clipping may change), and the batch
    if the memory's lanes depend on it.
    """
    fixed: dict[str, tuple[Any, Any]] = {}
    if now.do is Do.train:
        fixed["seed"] = saved.seed, now.seed
        fixed["optim.optimizer"] = saved.optim.optimizer, now.optim.optimizer
        batch = ("global_batch_seqs",) if now.data.order is Order.contiguous else ()
        micro_batch = ("micro_batch_seqs",) if now.model.memory_len else ()
        for key in ("precision", *batch, *micro_batch):
            fixed[f"trainer.{key}"] = getattr(saved.trainer, key), getattr(now.trainer, key)
    fixed |= _leaves("model", saved.model, now.model)
    if now.do is Do.train:
        fixed |= _leaves("data", _without_paths(saved.data), _without_paths(now.data), PLACES)
    fix = "leave {} out, or start a new run with resume=null"
    return [
        Problem(k, _plain(new), f"differs from the checkpoint's {_plain(old)}", fix.format(k))
        for k, (old, new) in fixed.items()
        if old != new
    ]


def differing(before: ExperimentConfig, now: ExperimentConfig, ignored: Sequence[str]) -> list[str]:
    """Return the keys whose values differ, without those that are or lie in an ignored section."""
    before, now = (dataclasses.replace(exp, data=_without_paths(exp.data)) for exp in (before, now))
    return [
        key
        for f in dataclasses.fields(before)
        for key, (old, new) in _leaf_pairs(f.name, getattr(before, f.name), getattr(now, f.name))
        if old != new and not any(key == name or key.startswith(f"{name}.") for name in ignored)
    ]


def _leaf_pairs(name: str, old: Any, new: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if dataclasses.is_dataclass(old):
        yield from _leaves(name, old, new).items()
    else:
        yield name, (old, new)


def _without_paths(data: DataConfig) -> DataConfig:
    """Return a data section whose mixture is the weight of each part."""
    weights = {name: getattr(part, "weight", part) for name, part in data.mixture.items()}
    return dataclasses.replace(data, mixture=weights)


def _leaves(name: str, old: Any, new: Any, skip: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Pair the leaves of two sections of one kind under their full keys."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(old):
        before, now = getattr(old, f.name), getattr(new, f.name)
        if f.name in skip:
            continue
        if dataclasses.is_dataclass(before):
            pairs |= _leaves(f"{name}.{f.name}", before, now)
        else:
            pairs[f"{name}.{f.name}"] = before, now
    return pairs


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: vars(v) if isinstance(v, MixturePart) else v for k, v in value.items()}
    return value.value if isinstance(value, Enum) else value
