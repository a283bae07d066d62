"""How long a step takes, and the resulting MFU, tokens and price."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deepseek_exp.config import ActivationCheckpointing, AttentionKind, ExperimentConfig, Kernel
from deepseek_exp.config.topology import Axis
from deepseek_exp.planner import cost
from deepseek_exp.planner.layers import Layers
from deepseek_exp.planner.memory import Layout, element_bytes, optimizer_bytes
from deepseek_exp.planner.traffic import axis_seconds, stage_traffic

SECONDS_PER_DAY = 86400
# The fraction of the routed experts' products that run in 8 bits with precision=fp8; weight gradients are in bf16.
NARROW_EXPERTS = 2 / 3


class Undivided(NamedTuple):
    """Bytes that a token moves through memory in a block, per column of d_model, on every tensor rank alike.

    Forward and backward in bf16, counted on the meta device: what operations read and write, without products and
    attention (`tests/planner/test_undivided.py`).

    Attributes:
        block: norms and residual sums.
        latents: the norms of MLA's latents, and the concatenation of its keys.
        experts: the router, and sums of the experts' results.
        row: each of the token's top_k rows on the way to its expert and back.
    """

    block: float
    latents: float
    experts: float
    row: float


UNDIVIDED = {Kernel.torch: Undivided(340, 145, 30, 22), Kernel.triton: Undivided(39, 18, 40, 12)}
# Products of an expert's row, forward and backward, that have a side of d_model columns.
ROW_PRODUCTS = 9
# A row's additional bytes if experts are on other ranks: it is permuted there, and back, in both passes.
EXCHANGED = {Kernel.torch: 16, Kernel.triton: 18}


@dataclass(frozen=True)
class Seconds:
    """Breakdown of the time of a step.

    Attributes:
        compute: matrix products and attention of the slowest stage.
        recompute: recomputed activations.
        tp: tensor-parallel collectives.
        pp: sends between stages that do not overlap with compute; likewise the next and data.
        ep: exchange with experts on other ranks.
        bubble: stages that wait for their first micro-batch or have finished their last.
        data: gradients and new weights between replicas.
        optimizer: the optimizer's pass over its memory.
    """

    compute: float
    recompute: float
    tp: float
    pp: float
    ep: float
    bubble: float
    data: float
    optimizer: float

    @property
    def step(self) -> float:
        """Return the sum."""
        return float(sum(dataclasses.astuple(self)))


def bubble_fraction(pp: int, n_micro_batches: int) -> float:
    """Return the fraction of a 1F1B pipeline's time that a stage waits: (p - 1) / (m + p - 1).

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2.1, define the
    bubble over the ideal time, (p - 1) / m; this is its fraction of the total.
    """
    return (pp - 1) / (n_micro_batches + pp - 1)


def step_seconds(exp: ExperimentConfig, layout: Layout, stages: Sequence[Layers]) -> Seconds:
    """Predict the time of one optimizer step.

    A stage processes m micro-batches, each in t = compute + recompute + tp + pp + ep; the pipeline runs at the pace of
    its slowest stage, (m + p - 1) t in all. Then gradients are reduced and the optimizer steps, at the pace of the
    stage with the most parameters.

    compute = T * (flops / (peak matmul_efficiency) + expert_flops / (peak grouped_efficiency)), for T tokens and the
    FLOPs per token on the rank; a recomputed block adds its forward pass, a third of that. Norms, activation functions,
    rotary embedding, the softmax of the loss and kernel launches count no FLOPs: they lower the efficiencies, which are
    those of whole steps on one GPU. tp divides their time along with the FLOPs; work that every tensor rank repeats
    therefore adds T (1 - 1 / tp) (`undivided_bytes` + `expert_product_bytes`) / memory_bandwidth, and if experts are on
    other ranks, the copies of rows add T `exchanged_bytes` / memory_bandwidth. fp8 saves t_bf16_peak - t_fp8_peak on
    the blocks' products, and on two thirds of the experts' if kernels.fp8_experts; time lost to efficiency below peak
    is assumed unchanged. The optimizer reads gradient, weights and state and writes the last two.

    The fraction `cluster.overlap` of pp and ep overlaps with the compute of the same micro-batches, and that of data
    with the compute of the last one (ZeRO 2 and 3: of all); tp does not overlap, because the next matrix waits for its
    results.
    """
    c, d = exp.cluster, layout.degrees
    e, n_micro = element_bytes(exp), layout.n_micro_batches(exp.trainer.global_batch_seqs)
    peak = c.peak_bf16_flops if exp.trainer.precision.keeps_masters else c.peak_fp32_flops
    saved = 0.0  # fraction of a product's time at the peak that fp8 saves
    if exp.trainer.precision.computes_in_fp8 and c.peak_fp8_flops:
        saved = 1 - peak / c.peak_fp8_flops
    tokens = n_micro * layout.micro_batch_seqs * exp.data.seq_len
    paces, data, optimizer = [], 0.0, 0.0
    touched = 4 + 2 * (e + optimizer_bytes(exp))  # bytes per parameter
    for index, stage in enumerate(stages):
        dense, experts = stage.flops_on_rank(d.tp), stage.expert_flops / d.tp
        narrow_experts = NARROW_EXPERTS * experts if exp.kernels.fp8_experts else 0.0
        narrow = saved * (stage.product_flops / d.tp + narrow_experts)
        compute = tokens / peak * (dense / c.matmul_efficiency + experts / c.grouped_efficiency - narrow)
        alike = undivided_bytes(exp, stage) + expert_product_bytes(exp, stage)
        moved = (1 - 1 / d.tp) * alike + exchanged_bytes(exp, stage, d.ep)
        compute += tokens * moved / c.memory_bandwidth
        again = compute / 3 if layout.checkpointing is ActivationCheckpointing.full else 0.0
        axes = axis_seconds(stage_traffic(exp, layout, stage, index), layout, c)
        left = exposed(axes[Axis.pp] + axes[Axis.ep], compute + again, c.overlap)
        paces.append((compute, again, axes[Axis.tp], left * axes[Axis.pp], left * axes[Axis.ep]))
        hiding = compute if layout.zero_stage > 1 else compute / n_micro
        data = max(data, axes[Axis.data] * exposed(axes[Axis.data], hiding, c.overlap))
        n = stage.dense_on_rank(d.tp, exp.model.n_kv_heads) + stage.experts_on_rank(d.tp, d.ep)
        shards = d.n_data if layout.zero_stage else 1
        optimizer = max(optimizer, n * touched / shards / c.memory_bandwidth)
    compute, again, tp, pp, ep = max(paces, key=sum)
    bubble = sum((compute, again, tp, pp, ep)) * (d.pp - 1) / n_micro
    return Seconds(compute, again, tp, pp, ep, bubble, data, optimizer)


def undivided_bytes(exp: ExperimentConfig, stage: Layers) -> float:
    """Return the bytes that a token moves through the memory of every tensor rank alike, forward and backward.

    d_model times, for each block: `Undivided.block` (divided by sequence parallelism), with MLA `latents`, and with
    experts `experts` + top_k `row`; in fp32 twice that, except for PyTorch's norms, which compute in fp32 anyway.
    Compiled norms count as fused ones. Counts agree within 15%, those of fused kernels in fp32 within 22%.
    """
    m, wide = exp.model, element_bytes(exp) / 2
    kernel = Kernel.triton if exp.trainer.compile else exp.kernels.rms_norm
    norms, rows = UNDIVIDED[kernel], UNDIVIDED[exp.kernels.experts]
    of_block = 0.0 if exp.parallel.sequence_parallel else norms.block
    of_block += norms.latents * (m.attention is AttentionKind.mla)
    of_block *= wide if kernel is Kernel.triton else 1.0
    of_experts = (rows.experts + m.moe.top_k * rows.row) * wide
    return ((stage.n_dense + stage.n_moe) * of_block + stage.n_moe * of_experts) * m.d_model


def exchanged_bytes(exp: ExperimentConfig, stage: Layers, ep: int) -> float:
    """Return the additional bytes that a token moves through memory if experts are on other ranks, without the sends.

    For each of its top_k rows, in each block with experts, `EXCHANGED` bytes per column of d_model, in fp32 twice that.
    PyTorch's operations gather each row four more times: there and back, in both passes. Fused, the first and last copy
    are the same, and the experts copy rows of one token each: 15 reads and writes of a row instead of 6.
    """
    m = exp.model
    rows = stage.n_moe * m.moe.top_k if ep > 1 else 0
    return rows * m.d_model * EXCHANGED[exp.kernels.experts] * element_bytes(exp) / 2


def expert_product_bytes(exp: ExperimentConfig, stage: Layers) -> float:
    """Return the bytes that the experts' products move per token on every tensor rank alike.

    The side of d_model columns: for each of its top_k rows, in each block with experts, for each of `ROW_PRODUCTS`.
    Experts are narrow, so this is not negligible against their FLOPs: on an H200 (131,072 rows, 64 experts, d_model
    2048, bf16) the products of d_expert 768 take 6.68 ms, and of 384 4.00, which is 0.66 more than half. These bytes
    take 1.14 ms, half of which tp=2 adds.
    """
    m = exp.model
    return ROW_PRODUCTS * stage.n_moe * m.moe.top_k * m.d_model * element_bytes(exp)


def exposed(seconds: float, computing: float, overlap: float) -> float:
    """Return the exposed fraction of a communication time: what overlaps lasts at most as long as the compute."""
    return 1 - min(overlap, computing / seconds) if seconds else 1.0


@dataclass(frozen=True)
class Speed:
    """The speed that a step's time implies.

    Attributes:
        step_seconds: of one optimizer step.
        tokens_per_second: over all ranks.
        mfu: model FLOPs per second / (ranks * peak in bf16), with `cost.flops_per_token`; bf16's peak in fp32 too.
        tokens_per_day: tokens in 24 hours.
        price_per_billion_tokens: dollars.
        scaling_efficiency: the time of the same work without communication or waiting / the step's.
    """

    step_seconds: float
    tokens_per_second: float
    mfu: float
    tokens_per_day: float
    price_per_billion_tokens: float
    scaling_efficiency: float


def speed(exp: ExperimentConfig, layout: Layout, stages: Sequence[Layers]) -> tuple[Seconds, Speed]:
    """Predict the breakdown of a step's time and the resulting speed."""
    c, world = exp.cluster, layout.degrees.world_size
    seconds = step_seconds(exp, layout, stages)
    rate = exp.trainer.global_batch_seqs * exp.data.seq_len / seconds.step
    flops = cost.flops_per_token(exp.model, exp.data.seq_len)
    return seconds, Speed(
        step_seconds=seconds.step,
        tokens_per_second=rate,
        mfu=flops * rate / (world * c.peak_bf16_flops),
        tokens_per_day=rate * SECONDS_PER_DAY,
        price_per_billion_tokens=1e9 / rate / 3600 * world * c.price_per_gpu_hour,
        scaling_efficiency=(seconds.compute + seconds.recompute + seconds.optimizer) / seconds.step,
    )
