"""Bytes of one rank: weights, gradients, optimizer state, activations, and buffers of the loss and of experts."""

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
    Precision,
)
from deepseek_exp.config.topology import Degrees
from deepseek_exp.planner.layers import Layers, largest_gathered

# assumption: what a GPU's memory holds of ours; the rest is the driver's, the links' buffers and gaps between tensors
USABLE = 0.92
# of one fp32 master weight, by optimizer class; assumption: any other keeps two numbers, as Adam does
STATE_BYTES = {"torch.optim.SGD": 0, "torch.optim.Adafactor": 0}
ADAM_BYTES = 8
# the fused attention kernel wants widths in multiples of eight (kernels/attention.py)
GATE_PAD = 8


@dataclass(frozen=True)
class Layout:
    """How a step is cut: the degrees, and what else of the configuration decides about memory and speed."""

    degrees: Degrees
    zero_stage: int
    micro_batch_seqs: int
    checkpointing: ActivationCheckpointing
    sequence_parallel: bool = False

    @property
    def cut(self) -> int:
        """Ways that the positions between the cut matrices are shared out."""
        return self.degrees.tp if self.sequence_parallel else 1

    def n_micro_batches(self, global_batch_seqs: int) -> int:
        """Give the micro batches that one rank works on in a step."""
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
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def element_bytes(exp: ExperimentConfig) -> int:
    """Give the bytes of one weight or activation."""
    return 2 if exp.trainer.precision.keeps_masters else 4


def input_bytes(exp: ExperimentConfig) -> int:
    """Give the bytes that one element of a linear layer's input is kept in for the backward pass."""
    return 1 if exp.trainer.precision is Precision.fp8 else element_bytes(exp)


def optimizer_bytes(exp: ExperimentConfig) -> float:
    """Give the bytes of state that the optimizer keeps of one parameter, the fp32 master of a bf16 one among it."""
    state: float = STATE_BYTES.get(str(exp.optim.optimizer.get("_target_")), ADAM_BYTES)
    if exp.optim.state_bits == 8:  # and a scale in fp32 for each 256 elements of the two
        state = 2 + 2 * 4 / 256
    return state + (4 if element_bytes(exp) == 2 else 0)


def stage_memory(exp: ExperimentConfig, layout: Layout, stage: Layers, index: int) -> Memory:
    """Count the bytes of one rank of a stage.

    Of each parameter on the rank: the weight, 4 bytes in fp32 or 2 in bf16; its gradient, added up in fp32, 4; the
    optimizer's two moments in fp32, 8, and in bf16 the fp32 master weight, 4: 16 bytes in fp32 and 18 in bf16. ZeRO
    divides the optimizer's share (stage 1), also the gradients (2), also the weights (3) by dp / ep, the ranks that
    hold the same: Rajbhandari et al. 2020, "ZeRO", section 5 and figure 1 (there 16 bytes, with gradients in fp16).
    Stage 3 has two blocks' weights gathered at a time, the one at work and the one fetched ahead: buffers, of the
    largest block. Buffers are also those of the losses or of experts at work, whichever are larger: with all else kept,
    the backward pass comes from one to the other. The main loss is there until the modules for multi-token prediction,
    whose loss comes first, have been passed.

    In a 1F1B pipeline stage i of p keeps the activations of min(p - i, m) of the m micro batches (Narayanan et al.
    2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2).

    do=eval has the weights, whole within the rank's cut, and one block's activations at a time.

    Args:
        exp: model, precision, optimizer and batch.
        layout: the layout.
        stage: the layers of the stage.
        index: which stage it is, from 0.
    """
    d, m = layout.degrees, exp.model
    n = stage.dense_on_rank(d.tp, m.n_kv_heads) + stage.experts_on_rank(d.tp, d.ep)
    e, shards, zero = element_bytes(exp), d.n_data, layout.zero_stage
    state = optimizer_bytes(exp)
    tokens = layout.micro_batch_seqs * exp.data.seq_len
    n_kept = min(d.pp - index, layout.n_micro_batches(exp.trainer.global_batch_seqs))
    kept, once = _activations(exp, stage, layout)
    loss = stage.n_heads_out * _loss_bytes(exp, tokens, d.tp)
    if exp.do is Do.eval:
        return Memory(n * e, 0, 0, tokens * _largest_block(exp, stage, layout), loss)
    at_work = experts_at_work_bytes(exp, layout, stage) + (loss if stage.n_mtp else 0)
    gathered = 2 * e * largest_gathered(m, exp.data.seq_len) if zero >= 3 and shards > 1 else 0
    return Memory(
        weights=n * e / (shards if zero >= 3 else 1),
        gradients=n * 4 / (shards if zero >= 2 else 1),
        optimizer=n * state / (shards if zero >= 1 else 1),
        activations=tokens * (n_kept * kept + once),
        buffers=gathered + max((1 + stage.n_mtp) * loss, at_work),
    )


def _largest_block(exp: ExperimentConfig, stage: Layers, layout: Layout) -> float:
    """Return the bytes of a token that the largest block of a stage makes."""
    m, e, d = exp.model, element_bytes(exp), layout.degrees
    dense, moe = (
        block_activation_bytes(m, exp.kernels, e, d.tp, d.ep, layout.cut, e, is_moe=kind) for kind in (False, True)
    )
    return max(dense if stage.n_dense else 0.0, moe if stage.n_moe else 0.0)


def _activations(exp: ExperimentConfig, stage: Layers, layout: Layout) -> tuple[float, float]:
    """Give the bytes of a token that a stage keeps for the backward pass, of each micro batch and once."""
    m, e, i, kernels = exp.model, element_bytes(exp), input_bytes(exp), exp.kernels
    tp, ep, cut = layout.degrees.tp, layout.degrees.ep, layout.cut
    dense, moe = (block_activation_bytes(m, kernels, e, tp, ep, cut, i, is_moe=kind) for kind in (False, True))
    ends = stage.n_heads_out * norm_bytes(m.d_model, e, kernels.rms_norm, cut)
    ends += stage.n_mtp * (3 * norm_bytes(m.d_model, e, kernels.rms_norm) + 2 * m.d_model * i)
    if layout.checkpointing is ActivationCheckpointing.none:
        return stage.n_dense * dense + stage.n_moe * moe + ends, 0.0
    recomputed = max(dense if stage.n_dense else 0.0, moe if stage.n_moe else 0.0)
    kept = (stage.n_dense + stage.n_moe) * m.d_model * e / cut + ends
    if layout.checkpointing is ActivationCheckpointing.selective:
        dense, moe = (product_bytes(m, kernels, e, tp, ep, i, is_moe=kind) for kind in (False, True))
        kept += stage.n_dense * dense + stage.n_moe * moe
    return kept, recomputed


def block_activation_bytes(
    m: ModelConfig, kernels: KernelsConfig, e: int, tp: int = 1, ep: int = 1, cut: int = 1, i: int = 0, *, is_moe: bool
) -> float:
    """Count the bytes of one token that a block keeps for its backward pass.

    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.1, count the
    inputs that each operation of a block saves: sbh(34 + 5as/h) for LayerNorm, GELU and dropout in 16 bits, 10 sbh of
    it on every tensor rank and the rest cut by tp (section 4.2.1). The same count for our blocks, with h = d_model,
    elements of e bytes, and per token:

        2 norms of h                                                         see `norm_bytes`; on every rank, or `cut`
        gqa        q, k, v, result (4 n_heads wide), input of wo (n_heads v)        e each, cut by tp
        mla        also the two latents' norms and the way up                      on every rank
        softmax    one fp32 number a head; no scores, since the attention is fused  4, cut by tp
        dense      gate, silu(gate), up and their product: 4 d_ff                   e each, cut by tp
        sparse     which units stay: an index of each, a byte for each of d_ff      8 and 1, cut by tp
        experts    gate, silu(gate), up, product: 4 (top_k + shared) d_expert       e each, cut by tp
                   rows sent to experts and back: 2 top_k h                         e each, on every rank
                   router: input (h) and 3 rows of scores (n_routed_experts)        4 each, on every rank

    Keys and values are repeated for every query head before the kernel; there is no dropout. `wide` is the width that
    the kernel gets q, k and v padded to. Fused kernels keep less:

        rms_norm                 see `norm_bytes`
        rope                     of a head with a norm its input alone
        swiglu                   gate, up and product: 3 d_ff
        local_global_attention   with a window q, k, v as they are, a result that wo reads in place, 16 bytes a head
        experts                  gate and up: 2 top_k d_expert, and no rows; of rows from other ranks (ep) those

    In fp8 a linear layer keeps its input as a copy of one byte an element: the results of norms that nothing else
    needs, the product in a feed-forward network, the input of wo. Routed experts keep their inputs as they are.

    Sequence parallelism cuts the norms' inputs and the residual stream by tp too (section 4.2.2). Korthikanti et al.
    cut the norms' results as well and gather them a second time for the backward pass; ours stay whole, as gathered.

    Args:
        m: the model.
        kernels: what computes each operation.
        e: bytes of an element.
        tp: tensor-parallel degree.
        ep: expert-parallel degree.
        cut: ways that the positions are shared out between the cut matrices: tp with sequence parallelism.
        i: bytes of an element of what a linear layer keeps of its input; 0: e, the input itself.
        is_moe: the block has experts.
    """
    h, norm, halves, i = m.d_model, kernels.rms_norm, 3 if kernels.swiglu is Kernel.triton else 4, i or e
    on_every_rank = 2 * norm_bytes(h, e, norm, cut) - (1 if is_moe else 2) * (e - i) * h
    if m.attention is AttentionKind.mla:
        on_every_rank += sum(norm_bytes(width, e, norm) for width in (m.kv_lora_rank, m.q_lora_rank))
        on_every_rank -= (e - i) * m.q_lora_rank
    shared_out = _attention_bytes(m, kernels, e, i)
    if not is_moe:
        sparse = 8 * m.d_ff_active + m.d_ff if m.d_ff_active else 0
        return on_every_rank + (shared_out + (((4 if sparse else halves) - 1) * e + i) * m.d_ff + sparse) / tp
    is_fused = kernels.experts is Kernel.triton
    routed = (2 if is_fused else halves) * m.moe.top_k
    shared_out += (routed + halves * m.moe.n_shared_experts) * m.moe.d_expert * e
    if i < e and m.moe.n_shared_experts:
        shared_out -= (e - i) * m.moe.n_shared_experts * m.moe.d_expert
        on_every_rank += i * h
    rows = (ep > 1 if is_fused else 2) * m.moe.top_k * h * e
    on_every_rank += rows + 3 * m.moe.n_routed_experts * 4 + (4 * h if e == 2 else 0)
    return on_every_rank + shared_out / tp


def _attention_bytes(m: ModelConfig, kernels: KernelsConfig, e: int, i: int) -> float:
    """Count what attention keeps of a token: queries, keys, values and results, of all tensor ranks."""
    is_latent = m.attention is AttentionKind.mla
    n_kv = m.n_heads if is_latent else m.n_kv_heads
    a_head = m.head_dim * e if kernels.rope is Kernel.triton else norm_bytes(m.head_dim, e, kernels.rms_norm)
    normed = (m.n_heads + n_kv) * m.qk_norm * a_head
    if kernels.local_global_attention is Kernel.triton and m.window:
        wide = m.qk_nope_head_dim + m.qk_rope_head_dim if is_latent else m.head_dim
        v = m.v_head_dim if is_latent else m.head_dim
        copy = v * i if i < e else 0  # of the result, for wo
        return normed + m.n_heads * ((wide + v) * e + copy + 16) + n_kv * (wide + v) * e
    wide, v = attention_widths(m)
    return normed + m.n_heads * (4 * wide * e + v * i + 4)


def product_bytes(
    m: ModelConfig, kernels: KernelsConfig, e: int, tp: int = 1, ep: int = 1, i: int = 0, *, is_moe: bool
) -> float:
    """Count the bytes of one token in what a block's matrix products and its attention give.

    Selective checkpointing keeps these and the block's input, and computes the rest again (Korthikanti et al. 2022,
    section 5, choose the other way round: of attention without a fused kernel, scores are what is large and cheap).

        gqa      q, k, v, and wo's result                  e each, all but the last cut by tp
        mla      latents down and up, wo's result          e each, what comes up cut by tp
        softmax  its result, as wide as the kernel's q     e, and a fp32 number a head; cut by tp
        dense    gate, up (of sparse ones too), down       e each, the last whole
        experts  gate, up and down of the top_k rows       e each, the last whole
                 the router's scores in fp32, their sum over a token's rows; shared experts as dense
        fused    attention: its result and 16 bytes a head; experts: gate, up and the sum, or with ep the rows
        fp8      also the inputs of linear layers           1 each

    Args:
        m: the model.
        kernels: what computes each operation.
        e: bytes of an element.
        tp: tensor-parallel degree.
        ep: expert-parallel degree.
        i: bytes of an element of what a linear layer keeps of its input, where that is a copy; 0: none.
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
    inputs = i * (copied + copied_cut / tp) if 0 < i < e else 0
    return e * whole + (e * cut + a_head * m.n_heads) / tp + 4 * scores + inputs


def attention_widths(m: ModelConfig) -> tuple[int, int]:
    """Give the width that the attention kernel gets q, k and v padded to, and that of a head's values."""
    wide = v = m.head_dim
    if m.attention is AttentionKind.mla:
        wide, v = m.qk_nope_head_dim + m.qk_rope_head_dim, m.v_head_dim
    return max(wide + (GATE_PAD if m.window and m.n_global_tokens else 0), v), v


def norm_bytes(width: int, e: int, kernel: Kernel, cut: int = 1) -> float:
    """Count what an RMSNorm saves: its input in fp32, the same normalised in fp32, and its result for the next matrix.

    In fp32 the input is the residual stream itself, so 12 bytes an element; in bf16 it is a copy: 4 + 4 + 2. Sequence
    parallelism cuts the first two, `cut` ways. The fused kernel saves its input as it is, a number a row, and the
    result.
    """
    return ((e if kernel is Kernel.triton else 8) / cut + e) * width


def experts_at_work_bytes(exp: ExperimentConfig, layout: Layout, stage: Layers) -> float:
    """Count what the backward pass of a layer of fused experts takes at its peak, beside what is kept of the layer.

    At its end: of each of a token's top_k rows the gradients of gate and up, 2 d_expert / tp, and two shares of the
    input's, 2 h; the gradients that come and go, 2 h a token, or a row where rows are from other ranks (ep); those of
    the layer's weights. Before that, which is more where d_expert is wide: of a row its gradient, h, and the hidden
    layer beside the gradients of gate and up, 3 d_expert / tp; the gradient that came; that of w_down. Nothing that is
    kept goes earlier, since all is one operation. PyTorch's operations let go of the layer piece by piece meanwhile:
    nothing is counted for them, nor for the one-byte copies of kernels.fp8_experts.
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


def tokens_of_chunk(tokens: int, vocab: float) -> int:
    """Count as kernels/linear_cross_entropy.py does, which this may not import: PyTorch comes with it."""
    return min(tokens, max(1024, int(2**25 // vocab), -(-tokens // (4 * 128)) * 128))


def _loss_bytes(exp: ExperimentConfig, tokens: int, tp: int) -> float:
    """Count the bytes that logits and loss of a micro batch take at their peak: 12 a token and entry of the vocabulary.

    Fused: the logits of a chunk of tokens, and both gradients, which are made in the forward pass. Else in fp32 the
    logits, their log-softmax and the gradient; in bf16 logits and their gradient (2 + 2), log-softmax and gradient in
    fp32. Measured on an H200, bf16, 16384 tokens, 32768 entries: 6.25 GiB, 12.5 bytes.
    """
    vocab, e = exp.model.vocab_size / tp, element_bytes(exp)
    if exp.kernels.linear_cross_entropy is Kernel.triton:
        return e * (tokens_of_chunk(tokens, vocab) * vocab + (tokens + vocab) * exp.model.d_model)
    return 12 * tokens * vocab
