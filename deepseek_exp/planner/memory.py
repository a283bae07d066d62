"""Bytes on one rank: weights, gradients, optimizer state, activations, and buffers of the loss and of experts."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_exp.config import (
    ActivationCheckpointing,
    AttentionKind,
    Do,
    ExperimentConfig,
    Kernel,
    KernelsConfig,
    ModelConfig,
)
from deepseek_exp.config.limits import ATTENTION_PAD, tokens_of_chunk
from deepseek_exp.config.parameter_groups import is_muon
from deepseek_exp.config.topology import Degrees
from deepseek_exp.planner.cost import parameters
from deepseek_exp.planner.layers import Layers, largest_gathered

# Assumed usable fraction of a GPU's memory; the rest is the driver's, communication buffers and fragmentation.
USABLE = 0.92
# State bytes per fp32 master weight, by optimizer class. Assumption: any other keeps two numbers, as Adam does.
STATE_BYTES = {"torch.optim.SGD": 0, "torch.optim.Adafactor": 0}
ADAM_BYTES = 8


@dataclass(frozen=True)
class Layout:
    """How a step is parallelised: the degrees, and the other settings that determine memory and speed."""

    degrees: Degrees
    zero_stage: int
    micro_batch_seqs: int
    checkpointing: ActivationCheckpointing
    sequence_parallel: bool = False

    @property
    def cut(self) -> int:
        """Return the number of ranks that shard the positions between the sharded matrices."""
        return self.degrees.tp if self.sequence_parallel else 1

    def n_micro_batches(self, global_batch_seqs: int) -> int:
        """Return the number of micro-batches per rank and step."""
        return global_batch_seqs // (self.micro_batch_seqs * self.degrees.dp)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def element_bytes(exp: ExperimentConfig) -> int:
    """Return the bytes per weight or activation."""
    return exp.trainer.precision.weight_bytes


def input_bytes(exp: ExperimentConfig) -> int:
    """Return the bytes per element in which a linear layer's input is kept for the backward pass."""
    return 1 if exp.trainer.precision.computes_in_fp8 else element_bytes(exp)


def optimizer_bytes(exp: ExperimentConfig, n_params: float | None = None) -> float:
    """Return the bytes of optimizer state per parameter, including the fp32 master of a bf16 parameter.

    Args:
        exp: provides the optimizer and the precision.
        n_params: parameters of the rank, the tables among them, of which this is the mean; None: of the whole model.
    """
    state: float = STATE_BYTES.get(str(exp.optim.optimizer.get("_target_")), ADAM_BYTES)
    if is_muon(exp.optim):  # one moment for each weight of a block; vectors are too few to count
        n_tables = 0 if exp.lora.rank else 1 if exp.model.tie_embeddings else 2  # adapters are trained without them
        tables = n_tables * exp.model.vocab_size * exp.model.d_model
        counted = parameters(exp.model)
        state = 4 + 4 * tables / (n_params or counted.total + counted.mtp)
    if exp.optim.state_bits == 8:  # and an fp32 scale for each 256 elements of the two
        state = 2 + 2 * 4 / 256
    state += 4 if exp.optim.ema_decay else 0
    return state + (4 if exp.trainer.precision.keeps_masters else 0)


def stage_memory(exp: ExperimentConfig, layout: Layout, stage: Layers, index: int) -> Memory:
    """Return the bytes on one rank of a stage.

    Per parameter on the rank: the weight, 4 bytes in fp32 or 2 in bf16; its gradient, accumulated in fp32, 4; the
    optimizer's two moments in fp32, 8, and in bf16 the fp32 master weight, 4: 16 bytes in fp32 and 18 in bf16. ZeRO
    divides the optimizer's share (stage 1), also the gradients (2), also the weights (3) by dp / ep, the number of
    replicas: Rajbhandari et al. 2020, "ZeRO", section 5 and figure 1 (there 16 bytes, with gradients in fp16). Stage 3
    holds the gathered weights of two blocks at a time, the current one and the prefetched one: buffers of the size
    of the largest block. A CUDA graph keeps the gradients of a micro-batch in the weights' type. Buffers are also
    those of the losses or of the experts' backward pass, whichever are larger: with all else kept, the backward
    pass reaches one after the other. The main loss is kept until the MTP modules, whose loss comes first, have been
    passed.

    In a 1F1B pipeline stage i of p keeps the activations of min(p - i, m) of the m micro-batches (Narayanan et al.
    2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2).

    With adapters only these are trained, and have gradients and an optimizer. Weights that are summed with an adapter
    before they are read are kept for the backward pass of each micro-batch, with recomputation those of one block.

    do=eval has the weights, not sharded by ZeRO, and one block's activations at a time.

    Args:
        exp: model, precision, optimizer and batch.
        layout: the layout.
        stage: the layers of the stage.
        index: index of the stage, from 0.
    """
    d, m = layout.degrees, exp.model
    n = stage.dense_on_rank(d.tp, m.n_kv_heads) + stage.experts_on_rank(d.tp, d.ep)
    n_adapters = stage.adapters_on_rank(d.ep)
    n_trained = n_adapters if exp.lora.rank else n
    e, shards, zero = element_bytes(exp), d.n_data, layout.zero_stage
    state = optimizer_bytes(exp, n)
    tokens = layout.micro_batch_seqs * exp.data.seq_len
    n_kept = min(d.pp - index, layout.n_micro_batches(exp.trainer.global_batch_seqs))
    kept, once = _activations(exp, stage, layout)
    loss = stage.n_heads_out * _loss_bytes(exp, tokens, d.tp)
    if exp.do is Do.eval:
        return Memory((n + n_adapters) * e, 0, 0, tokens * _largest_block(exp, stage, layout), loss)
    at_work = experts_at_work_bytes(exp, layout, stage) + (loss if stage.n_mtp else 0)
    gathered = 2 * e * largest_gathered(m, exp.data.seq_len) if zero >= 3 and shards > 1 else 0
    return Memory(
        weights=(n + n_adapters) * e / (shards if zero >= 3 else 1),
        gradients=n_trained * (4 + (e if exp.trainer.cuda_graphs else 0)) / (shards if zero >= 2 else 1),
        optimizer=n_trained * state / (shards if zero >= 1 else 1),
        activations=tokens * (n_kept * kept + once) + _sum_bytes(exp, stage, layout, n_kept),
        buffers=gathered + max((1 + stage.n_mtp) * loss, at_work),
    )


def _sum_bytes(exp: ExperimentConfig, stage: Layers, layout: Layout, n_kept: int) -> float:
    """Return the bytes of weights that are kept as the sum of a stored weight and an adapter."""
    n = stage.sums_on_rank(layout.degrees.tp, layout.degrees.ep) * element_bytes(exp)
    if layout.checkpointing is ActivationCheckpointing.none:
        return n_kept * n
    return n / max(1, stage.n_dense + stage.n_moe)


def _largest_block(exp: ExperimentConfig, stage: Layers, layout: Layout) -> float:
    """Return the bytes per token of the largest block of a stage."""
    m, e, d = exp.model, element_bytes(exp), layout.degrees
    dense, moe = (
        block_activation_bytes(m, exp.kernels, e, tp=d.tp, ep=d.ep, cut=layout.cut, is_moe=kind)
        for kind in (False, True)
    )
    return max(dense if stage.n_dense else 0.0, moe if stage.n_moe else 0.0)


def _activations(exp: ExperimentConfig, stage: Layers, layout: Layout) -> tuple[float, float]:
    """Return the bytes per token that a stage keeps for the backward pass: for each micro-batch, and once."""
    m, e, i, kernels = exp.model, element_bytes(exp), input_bytes(exp), exp.kernels
    tp, ep, cut = layout.degrees.tp, layout.degrees.ep, layout.cut
    dense, moe = (
        block_activation_bytes(m, kernels, e, tp=tp, ep=ep, cut=cut, kept_input=i, is_moe=kind)
        for kind in (False, True)
    )
    ends = stage.n_heads_out * norm_bytes(m.d_model, e, kernels.rms_norm, cut)
    ends += stage.n_mtp * (3 * norm_bytes(m.d_model, e, kernels.rms_norm) + 2 * m.d_model * i)
    if layout.checkpointing is ActivationCheckpointing.none:
        return stage.n_dense * dense + stage.n_moe * moe + ends, 0.0
    recomputed = max(dense if stage.n_dense else 0.0, moe if stage.n_moe else 0.0)
    kept = (stage.n_dense + stage.n_moe) * m.d_model * e / cut + ends
    if layout.checkpointing is ActivationCheckpointing.selective:
        dense, moe = (product_bytes(m, kernels, e, tp=tp, ep=ep, kept_input=i, is_moe=kind) for kind in (False, True))
        kept += stage.n_dense * dense + stage.n_moe * moe
    return kept, recomputed


@dataclass(frozen=True)
class Term:
    """Something that a block keeps for its backward pass.

    Attributes:
        name: what is kept.
        n_bytes: bytes per token, over all ranks that shard it.
        is_sharded: by the tensor-parallel ranks; if not, every one of them keeps it.
    """

    name: str
    n_bytes: float
    is_sharded: bool


def block_activation_bytes(
    m: ModelConfig,
    kernels: KernelsConfig,
    element: int,
    *,
    tp: int = 1,
    ep: int = 1,
    cut: int = 1,
    kept_input: int = 0,
    is_moe: bool,
) -> float:
    """Return the bytes per token that a block keeps for its backward pass: the sum of `activation_terms`.

    Args:
        m: the model.
        kernels: the implementation of each operation.
        element: bytes per element.
        tp: tensor-parallel degree.
        ep: expert-parallel degree.
        cut: number of ranks that shard the positions between the sharded matrices: tp with sequence parallelism.
        kept_input: bytes per element of what a linear layer keeps of its input; 0 means `element`, the input itself.
        is_moe: the block has experts.
    """
    terms = activation_terms(m, kernels, element, kept_input or element, ep=ep, cut=cut, is_moe=is_moe)
    sharded = sum(term.n_bytes for term in terms if term.is_sharded)
    return sum(term.n_bytes for term in terms if not term.is_sharded) + sharded / tp


def activation_terms(
    m: ModelConfig, kernels: KernelsConfig, element: int, kept_input: int, *, ep: int, cut: int, is_moe: bool
) -> list[Term]:
    """Return what a block keeps for its backward pass, per token.

    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.1, count the
    inputs that each operation of a block saves: sbh(34 + 5as/h) for LayerNorm, GELU and dropout in 16 bits, 10 sbh of
    it on every tensor rank and the rest sharded by tp (section 4.2.1). The terms are the same count for our blocks.

    In fp8 a linear layer keeps its input as a copy of one byte per element: the results of norms that nothing else
    needs, the product in a feed-forward network, the input of wo. Routed experts keep their inputs unrounded.

    Sequence parallelism also shards the norms' inputs and the residual stream by tp (section 4.2.2). Korthikanti et al.
    shard the norms' results as well and gather them a second time for the backward pass; ours stay gathered.
    """
    saved = element - kept_input  # bytes per element of an input of which an fp8 layer keeps a copy
    # the norm before experts keeps its result, which the router reads
    norms = 2 * norm_bytes(m.d_model, element, kernels.rms_norm, cut) - (1 if is_moe else 2) * saved * m.d_model
    norms += 2 * m.sandwich_norm * norm_bytes(m.d_model, element, kernels.rms_norm, cut)
    terms = [Term("norms", norms, False)]
    if m.attention is AttentionKind.mla:
        latents = sum(norm_bytes(width, element, kernels.rms_norm) for width in (m.kv_lora_rank, m.q_lora_rank))
        terms.append(Term("latents, normalised", latents - saved * m.q_lora_rank, False))
    terms += _attention_terms(m, kernels, element, kept_input)
    return terms + (_expert_terms if is_moe else _dense_terms)(m, kernels, element, kept_input, ep)


def _attention_terms(m: ModelConfig, kernels: KernelsConfig, element: int, kept_input: int) -> list[Term]:
    """Return what attention keeps: queries, keys, values and results.

    Keys and values are repeated for every query head before PyTorch's kernel, and padded to one width; there is no
    dropout. With a window, the fused kernel keeps q, k, v unpadded and a result that wo reads in place.
    """
    is_latent = m.attention is AttentionKind.mla
    n_kv = m.n_heads if is_latent else m.n_kv_heads
    # fused rotations keep only the input of a normalised head
    is_fused = kernels.rope is Kernel.triton
    a_head = m.head_dim * element if is_fused else norm_bytes(m.head_dim, element, kernels.rms_norm)
    terms = [Term("queries and keys, normalised", (m.n_heads + n_kv) * m.qk_norm * a_head, True)]
    if kernels.local_global_attention is Kernel.triton and m.window:
        wide = m.qk_nope_head_dim + m.qk_rope_head_dim if is_latent else m.head_dim
        v = m.v_head_dim if is_latent else m.head_dim
        copy = v * kept_input if kept_input < element else 0
        return [
            *terms,
            Term("queries and results", m.n_heads * (wide + v) * element, True),
            Term("keys and values", n_kv * (wide + v) * element, True),
            Term("input of wo", m.n_heads * copy, True),
            Term("sums of the softmax and of the gate", m.n_heads * 16, True),
        ]
    wide, v = attention_widths(m)
    return [
        *terms,
        Term("queries, keys, values and results", m.n_heads * 4 * wide * element, True),
        Term("input of wo", m.n_heads * v * kept_input, True),
        Term("sums of the softmax", m.n_heads * 4, True),  # one fp32 number per head: attention is fused
    ]


def _dense_terms(m: ModelConfig, kernels: KernelsConfig, element: int, kept_input: int, ep: int) -> list[Term]:
    """Return what a dense feed-forward network keeps: gate, silu(gate), up and their product."""
    # the fused kernel computes silu(gate) again; a sparse network does not use it
    n_before = 2 if kernels.swiglu is Kernel.triton and not m.d_ff_active else 3
    terms = [Term("gate, silu(gate), up and product", (n_before * element + kept_input) * m.d_ff, True)]
    if m.d_ff_active:  # an index of each unit that is kept, and a byte for each unit
        terms.append(Term("kept units", 8 * m.d_ff_active + m.d_ff, True))
    return terms


def _expert_terms(m: ModelConfig, kernels: KernelsConfig, element: int, kept_input: int, ep: int) -> list[Term]:
    """Return what a layer of experts keeps: for each of the top_k rows what a dense network does, rows and scores.

    The fused kernel keeps gate and up, and rows only if they are received from other ranks.
    """
    cfg, is_fused = m.moe, kernels.experts is Kernel.triton
    n_dense = 3 if kernels.swiglu is Kernel.triton else 4
    shared = cfg.n_shared_experts * cfg.d_expert
    is_copied = kept_input < element and shared > 0
    n_rows = int(ep > 1) if is_fused else 2
    return [
        Term("routed experts", (2 if is_fused else n_dense) * cfg.top_k * cfg.d_expert * element, True),
        Term("shared experts", n_dense * shared * element - (element - kept_input) * shared, True),
        Term("input of shared experts", kept_input * m.d_model if is_copied else 0, False),
        Term("rows sent to experts and back", n_rows * cfg.top_k * m.d_model * element, False),
        # three rows of scores and, in fp32, the input
        Term("router", 3 * cfg.n_routed_experts * 4 + (4 * m.d_model if element == 2 else 0), False),
    ]


def product_bytes(
    m: ModelConfig,
    kernels: KernelsConfig,
    element: int,
    *,
    tp: int = 1,
    ep: int = 1,
    kept_input: int = 0,
    is_moe: bool,
) -> float:
    """Return the bytes per token of the results of a block's matrix products and attention.

    Selective checkpointing keeps these and the block's input, and recomputes the rest (Korthikanti et al. 2022, section
    5, choose the opposite: in attention without a fused kernel, scores are what is large and cheap).

        gqa      q, k, v, and wo's result                  e each, all but the last sharded by tp
        mla      latents down and up, wo's result          e each, the up-projections sharded by tp
        softmax  its result, as wide as the kernel's q     e, and one fp32 number per head; sharded by tp
        dense    gate, up (of sparse ones too), down       e each, the last on every rank
        experts  gate, up and down of the top_k rows       e each, the last on every rank
                 the router's scores in fp32, their sum over a token's rows; shared experts as dense
        fused    attention: its result and 16 bytes per head; experts: gate, up and the sum, or with ep the rows
        fp8      also the inputs of linear layers           1 each

    Args:
        m: the model.
        kernels: the implementation of each operation.
        element: bytes per element.
        tp: tensor-parallel degree.
        ep: expert-parallel degree.
        kept_input: bytes per element of what a linear layer keeps of its input, if that is a copy; 0 means none.
        is_moe: the block has experts.
    """
    (wide, v), a_head = attention_widths(m), 4
    if kernels.local_global_attention is Kernel.triton and m.window:
        wide, a_head = v, 16
    whole, cut = 2 * m.d_model, m.n_heads * wide  # wo and w_down
    if m.attention is AttentionKind.mla:
        whole += m.kv_lora_rank + m.qk_rope_head_dim + m.q_lora_rank
        cut += m.n_heads * (2 * m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim)
    else:
        cut += (m.n_heads + 2 * m.n_kv_heads) * m.head_dim
    scores = 0
    if is_moe:
        k, shared = m.moe.top_k, m.moe.n_shared_experts
        cut += 2 * (k + shared) * m.moe.d_expert
        rows = k if kernels.experts is Kernel.torch else (k - 1) * (ep > 1)
        whole += (rows + (shared > 0)) * m.d_model
        scores = m.moe.n_routed_experts + len(m.moe.domains)
    else:
        cut += 2 * m.d_ff
    copied, copied_cut = (2 if not is_moe or m.moe.n_shared_experts else 1) * m.d_model, m.n_heads * v
    copied += m.q_lora_rank if m.attention is AttentionKind.mla else 0
    copied_cut += m.moe.n_shared_experts * m.moe.d_expert if is_moe else m.d_ff
    inputs = kept_input * (copied + copied_cut / tp) if 0 < kept_input < element else 0
    return element * whole + (element * cut + a_head * m.n_heads) / tp + 4 * scores + inputs


def attention_widths(m: ModelConfig) -> tuple[int, int]:
    """Return the width that q, k and v are padded to for the attention kernel, and that of a head's values."""
    wide = v = m.head_dim
    if m.attention is AttentionKind.mla:
        wide, v = m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim
    return max(wide + (ATTENTION_PAD if m.window and m.n_global_tokens else 0), v), v


def norm_bytes(width: int, e: int, kernel: Kernel, cut: int = 1) -> float:
    """Return the bytes saved by an RMSNorm: its input in fp32, the same normalised in fp32, and its result.

    In fp32 the input is the residual stream itself, so 12 bytes per element; in bf16 it is a copy: 4 + 4 + 2. Sequence
    parallelism shards the first two, `cut` ways. The fused kernel saves its input as it is, one number per row, and the
    result.
    """
    return ((e if kernel is Kernel.triton else 8) / cut + e) * width


def experts_at_work_bytes(exp: ExperimentConfig, layout: Layout, stage: Layers) -> float:
    """Return the peak bytes in the backward pass of a layer of fused experts, in addition to the saved ones.

    At its end: for each of a token's top_k rows the gradients of gate and up, 2 d_expert / tp, and two terms of the
    input's, 2 h; the incoming and outgoing gradients, 2 h per token, or per row if rows are from other ranks (ep);
    those of the layer's weights. Before that, which is more if d_expert is wide: per row its gradient, h, and the
    hidden layer in addition to the gradients of gate and up, 3 d_expert / tp; the incoming gradient; that of w_down.
    Saved tensors are not freed earlier, since all is one operation. PyTorch's operations meanwhile free the layer piece
    by piece: nothing is counted for them, nor for the one-byte copies of kernels.fp8_experts.
    """
    if exp.kernels.experts is Kernel.torch or not stage.n_moe:
        return 0.0
    m, d, e = exp.model, layout.degrees, element_bytes(exp)
    tokens, weights = layout.micro_batch_seqs * exp.data.seq_len, stage.experts_on_rank(d.tp, d.ep) / stage.n_moe
    row_h, row_f = m.moe.top_k * m.d_model, m.moe.top_k * m.moe.d_expert / d.tp
    outside = row_h if d.ep > 1 else m.d_model
    return e * max(
        tokens * (2 * row_h + 2 * row_f + 2 * outside) + weights,
        tokens * (row_h + 3 * row_f + outside) + weights / 3,
    )


def _loss_bytes(exp: ExperimentConfig, tokens: int, tp: int) -> float:
    """Return the peak bytes of logits and loss of a micro-batch: 12 per token and vocabulary entry.

    Fused: the logits of a chunk of tokens, and both gradients, which are computed in the forward pass. Otherwise in
    fp32 the logits, their log-softmax and the gradient; in bf16 logits and their gradient (2 + 2), log-softmax and
    gradient in fp32. Measured on an H200, bf16, 16384 tokens, 32768 entries: 6.25 GiB, 12.5 bytes.
    """
    vocab, e = exp.model.vocab_size / tp, element_bytes(exp)
    if exp.kernels.linear_cross_entropy is Kernel.triton:
        return e * (tokens_of_chunk(tokens, vocab) * vocab + (tokens + vocab) * exp.model.d_model)
    return 12 * tokens * vocab
