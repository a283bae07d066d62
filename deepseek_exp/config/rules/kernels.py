"""Rules of the device, and of the kernels and precisions that it can compute with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from deepseek_exp.config.enums import Device, Do, Kernel, Launcher, Precision
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.config.topology import degrees
from deepseek_exp.errors import Problem

# arguments of torch.optim.AdamW that choose how it computes, not what
HOW = ("fused", "foreach")


# the first GPUs with fp8 products, and those with PyTorch's grouped ones
FP8_CAPABILITY, GROUPED_CAPABILITY = (8, 9), (9, 0)


def device_problems(exp: ExperimentConfig, machine: Machine) -> Iterator[Problem]:
    """Find a CUDA device that is not there."""
    if exp.device is Device.cuda and exp.do is not Do.plan and not machine.n_gpus:
        rule = "needs a CUDA device and none is visible"
        yield Problem("device", exp.device.value, rule, "use device=cpu or device=auto")


def kernel_problems(exp: ExperimentConfig, machine: Machine) -> Iterator[Problem]:
    """Find kernels that cannot run here."""
    computes = exp.do not in (Do.plan, Do.export)
    if not computes or exp.launch.launcher is not Launcher.local or machine.runs_triton(exp.device):
        return
    names = [name for name, kernel in dataclasses.asdict(exp.kernels).items() if kernel is Kernel.triton]
    if names:
        why = "device=cpu is asked for" if exp.device is Device.cpu else "none is visible"
        key = f"kernels.{names[0]}" if len(names) == 1 else f"kernels.{{{','.join(names)}}}"
        yield Problem(key, Kernel.triton.value, f"needs a CUDA device and {why}", "use kernels=torch")


def cuda_graph_problems(exp: ExperimentConfig, machine: Machine) -> Iterator[Problem]:
    """Find what a CUDA graph of a micro-batch cannot hold."""
    if not exp.trainer.cuda_graphs or not (exp.do.trains or exp.do is Do.plan):
        return
    key, fix = "trainer.cuda_graphs", "set trainer.cuda_graphs=false"
    is_here = exp.do.trains and exp.launch.launcher is Launcher.local
    if exp.device is Device.cpu or (is_here and not machine.n_gpus):
        yield Problem(key, True, "needs a CUDA device, and this is a CPU", fix)
    if exp.model.memory_len:
        rule = f"does not reach the segments of a model with model.memory_len={exp.model.memory_len}"
        yield Problem(key, True, rule, f"{fix}, or model.memory_len=0")
    try:
        n_ranks = degrees(exp).world_size
    except ValueError:
        return  # reported by layout_problems
    if n_ranks > 1:
        yield Problem(
            key, True, f"is for one process, and this layout has {n_ranks:,} ranks", f"{fix}, or parallel=single"
        )


def fp8_problems(exp: ExperimentConfig, machine: Machine) -> Iterator[Problem]:
    """Find products of 8-bit floating numbers that nothing asks for or the hardware has not; a CPU emulates them."""
    if not exp.trainer.precision.computes_in_fp8:
        if exp.kernels.fp8_experts:
            fix = "set trainer.precision=fp8, or kernels.fp8_experts=false"
            yield Problem("kernels.fp8_experts", True, "needs trainer.precision='fp8'", fix)
        return
    key, value, fix = "trainer.precision", Precision.fp8.value, "set trainer.precision=bf16"
    if exp.do is Do.plan and exp.cluster.peak_fp8_flops is None:
        rule = f"needs GPUs that compute in it, and cluster.gpu='{exp.cluster.gpu}' has cluster.peak_fp8_flops=null"
        yield Problem(key, value, rule, f"{fix}, or take another cluster")
    on_gpus = (
        exp.do.trains and exp.launch.launcher is Launcher.local and exp.device is not Device.cpu and machine.n_gpus
    )
    if not on_gpus:
        return
    has = machine.compute_capability
    if has < FP8_CAPABILITY:
        rule = f"needs a GPU of compute capability 8.9 or more, and this one has {has[0]}.{has[1]}"
        yield Problem(key, value, rule, fix)
    elif exp.kernels.fp8_experts and exp.model.moe.n_routed_experts and has != GROUPED_CAPABILITY:
        rule = f"needs a GPU of compute capability 9.0, and this one has {has[0]}.{has[1]}"
        yield Problem("kernels.fp8_experts", True, rule, "set kernels.fp8_experts=false")


def weight_bits_problems(exp: ExperimentConfig, machine: Machine) -> Iterator[Problem]:
    """Find what keeps a model from being sampled from with integers for weights."""
    bits = exp.sample.weight_bits
    if bits not in (0, 4, 8):
        yield Problem("sample.weight_bits", bits, "must be 0, 4 or 8", "use 8, or 0 for weights as they are")
    elif bits and exp.do is not Do.sample:
        yield Problem("sample.weight_bits", bits, "is for do=sample", "set sample.weight_bits=0")
    elif bits and not machine.runs_triton(exp.device):
        yield Problem("sample.weight_bits", bits, "needs a CUDA device, which this is without", "use 0")


def adamw_problems(exp: ExperimentConfig) -> Iterator[Problem]:
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
