"""Bytes and messages that one rank sends in a step, by axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepseek_exp.config import ActivationCheckpointing, ClusterConfig, ExperimentConfig, Kernel
from deepseek_exp.config.topology import Axis
from deepseek_exp.planner.layers import Layers
from deepseek_exp.planner.memory import Layout, element_bytes


@dataclass(frozen=True)
class Load:
    """What one rank sends over one axis in a step: bytes, and the number of collectives or messages."""

    n_bytes: float
    n_messages: int


def ring_all_reduce(n_bytes: float, n: int) -> float:
    """Return the bytes that each of n ranks sends to all-reduce n_bytes: 2 (n - 1) / n (Patarasuk and Yuan 2009)."""
    return 2 * ring_gather(n_bytes, n)


def ring_gather(n_bytes: float, n: int) -> float:
    """Return the bytes that each of n ranks sends to gather, scatter or exchange n_bytes evenly: (n - 1) / n."""
    return (n - 1) / n * n_bytes


def stage_traffic(exp: ExperimentConfig, layout: Layout, stage: Layers, index: int) -> dict[Axis, Load]:
    """Return what a rank of a stage sends in one step.

    With T tokens per micro-batch, h = d_model, e bytes per element, r = 1 more forward pass if blocks are recomputed,
    fully or in part (else 0), and m micro-batches:

        tp  all-reduces of T h e: (2 + 2 + 2 r) per block and micro-batch, after attention and after the feed-forward
            network, forward and backward (Shoeybi et al. 2019, "Megatron-LM", section 3); 1 each for the two tables.
            With sequence parallelism each is an all-gather and a reduce-scatter, of the same bytes in twice the
            messages (Korthikanti et al. 2022, section 4.2.2). A sparse feed-forward network also gathers its gates,
            T d_ff e, in each forward pass, 1 + r, to choose among all of them
        pp  T h e to the next stage and as much to the previous one, per micro-batch; every tensor rank sends all of it
            (Narayanan et al. 2021, section 3.2, without their scatter and gather), with sequence parallelism its shard
        ep  all-to-alls of T top_k h e: (2 + 2 + 2 r) per block with experts and micro-batch, to the experts and back,
            forward and backward; 1 / ep of each stays. The load is assumed even
        ep  for each of these forward passes one of the row counts; fused, one of their weights for each pass. Small:
            they count as messages
        ep  also an all-reduce of the fp32 non-expert gradients, once: part of how ep is folded into DeepSpeed's model
            axis (`topology.Degrees`)
        data  gradients in fp32: all-reduce once (ZeRO 0), or reduce-scatter once and all-gather of the new weights
            (ZeRO 1), the reduce-scatter in each micro-batch, as full gradients are not kept (ZeRO 2), and instead of
            the one all-gather one for both passes of each micro-batch (ZeRO 3): Rajbhandari et al. 2020, "ZeRO",
            section 7
    """
    d, m, e = layout.degrees, exp.model, element_bytes(exp)
    n_micro = layout.n_micro_batches(exp.trainer.global_batch_seqs)
    hidden = layout.micro_batch_seqs * exp.data.seq_len * m.d_model * e
    passes = 2 if layout.checkpointing is ActivationCheckpointing.none else 3
    n_tp = n_micro * (2 * passes * (stage.n_dense + stage.n_moe) + stage.n_heads_out + (index == 0))
    n_gates = n_micro * (passes - 1) * stage.n_dense * (m.d_ff_active > 0)
    gates = n_gates * ring_gather(layout.micro_batch_seqs * exp.data.seq_len * m.d_ff * e, d.tp)
    n_pp = n_micro * ((index < d.pp - 1) + (index > 0))
    n_ep = n_micro * 2 * passes * stage.n_moe
    n_small = n_micro * stage.n_moe * (passes - 1 + passes * (exp.kernels.experts is Kernel.triton))
    dense = stage.dense_on_rank(d.tp, m.n_kv_heads)
    experts = stage.experts_on_rank(d.tp, d.ep)
    exchanged = n_ep * ring_gather(m.moe.top_k * hidden, d.ep) + ring_all_reduce(4 * dense, d.ep)
    return {
        Axis.tp: Load(
            n_tp * ring_all_reduce(hidden, d.tp) + gates,
            (n_tp * (1 + layout.sequence_parallel) + n_gates) * (d.tp > 1),
        ),
        Axis.pp: Load(n_pp * hidden / layout.cut, n_pp),
        Axis.ep: Load(exchanged, (n_ep + n_small + 1) * (d.ep > 1)),
        Axis.data: _data_parallel(layout, dense + experts, e, n_micro),
    }


def _data_parallel(layout: Layout, n: float, e: int, n_micro: int) -> Load:
    """Return the traffic to reduce n parameters' gradients, and distribute their new weights, over the data axis."""
    shards = layout.degrees.n_data
    if shards == 1:
        return Load(0.0, 0)
    if layout.zero_stage == 0:
        return Load(ring_all_reduce(4 * n, shards), 1)
    scatters = 1 if layout.zero_stage < 2 else n_micro
    gathers = 1 if layout.zero_stage < 3 else 2 * n_micro
    sent = scatters * ring_gather(4 * n, shards) + gathers * ring_gather(e * n, shards)
    return Load(sent, scatters + gathers)


def axis_seconds(loads: Mapping[Axis, Load], layout: Layout, cluster: ClusterConfig) -> dict[Axis, float]:
    """Return the time of each axis: bytes / bandwidth + messages * latency.

    An axis whose groups span machines has the bandwidth between machines throughout, a pipeline too: a stage with all
    neighbours on its machine is not the slowest. ep is an all-to-all, so the fraction that goes to ranks of the same
    machine has the bandwidth inside it.
    """
    seconds, d = {}, layout.degrees
    for axis, load in loads.items():
        inside = d.span(axis) <= cluster.gpus_per_node
        share = 1.0 if inside else 0.0
        if axis is Axis.ep and not inside:
            share = max(0, cluster.gpus_per_node // d.tp - 1) / (d.ep - 1)
        latency = cluster.intra_node_latency if inside else cluster.inter_node_latency
        moved = share * load.n_bytes / cluster.intra_node_bandwidth
        moved += (1 - share) * load.n_bytes / cluster.inter_node_bandwidth
        seconds[axis] = moved + load.n_messages * latency
    return seconds
