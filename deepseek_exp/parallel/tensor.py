"""Tensor parallelism: the matrices of a built model sharded by a plan of names, and the collectives that it needs.

Inside an attention or a feed-forward network each rank of the tp axis works on its own heads or hidden units. The input
is the same on all of them, the output is summed (Shoeybi et al. 2019, "Megatron-LM", section 3):

    in   forward: identity        backward: sum of the gradients
    out  forward: sum             backward: identity

With sequence parallelism the residual stream between them is sharded along the sequence (Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4.2.2): in gathers, out reduce-scatters.

Parameters inside that are not sharded (routers, latents, norms of heads) get a partial gradient on each rank: it is
summed after the backward pass.

The collectives are custom operators that no compiler looks into: torch 2.11 replaces collectives inside an autograd
function by its own, and takes their gradient to be none; blocks would silently train with gradients of 0.

Shapes: batch, seq, d_model, vocab (the entries on this rank).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group

from deepseek_exp.config import AttentionKind, Kernel, KernelsConfig, ModelConfig
from deepseek_exp.config.topology import Axis
from deepseek_exp.kernels import Ops
from deepseek_exp.kernels.operation import operation
from deepseek_exp.models import Transformer
from deepseek_exp.parallel.groups import Groups

SEQ = 1  # the dimension that sequence parallelism shards
INSIDE = r"\.(attention|feed_forward)\."


@dataclasses.dataclass(frozen=True)
class Rule:
    """How parameters that match a pattern are sharded: along which dimension, at most how many ways (None means tp)."""

    dim: int
    most: int | None = None


def tensor_plan(cfg: ModelConfig) -> dict[str, Rule]:
    """Return which parameters of a model are sharded over tp, by patterns of their full names.

    Args:
        cfg: the model.
    """
    block = r"(blocks\.\d+|mtp\.\d+\.block)\."
    plan = {r"embedding\.weight": Rule(0), block + r"attention\.wo\.weight": Rule(1)}
    if not cfg.tie_embeddings:
        plan[r"head\.weight"] = Rule(0)
    if cfg.window and cfg.n_global_tokens:
        plan[block + r"attention\.gate"] = Rule(0)
    bias = "(weight|bias)" if cfg.qkv_bias else "weight"
    if cfg.attention is AttentionKind.mla:
        plan[block + rf"attention\.{'wq_b' if cfg.q_lora_rank else 'wq'}\.weight"] = Rule(0)
        plan[block + r"attention\.wkv_b\.weight"] = Rule(0)
    else:
        plan[block + rf"attention\.wq\.{bias}"] = Rule(0)
        plan[block + rf"attention\.(wk|wv)\.{bias}"] = Rule(0, cfg.n_kv_heads)
    moe = cfg.moe
    if not moe.n_routed_experts or moe.n_dense_layers:
        plan[block + r"feed_forward\.(w_gate|w_up)\.weight"] = Rule(0)
        plan[block + r"feed_forward\.w_down\.weight"] = Rule(1)
    if moe.n_routed_experts:
        plan[block + r"feed_forward\.experts\.(w_gate|w_up)"] = Rule(1)
        plan[block + r"feed_forward\.experts\.w_down"] = Rule(2)
    if moe.n_routed_experts and moe.n_shared_experts:
        plan[block + r"feed_forward\.shared\.(w_gate|w_up)\.weight"] = Rule(0)
        plan[block + r"feed_forward\.shared\.w_down\.weight"] = Rule(1)
    return plan


def match_plan(plan: dict[str, Rule], names: list[str]) -> dict[str, Rule]:
    """Return the rule of each parameter that has one.

    Raises:
        ValueError: a pattern matches no name, so that something would silently stay whole, or a name matches two.
    """
    found: dict[str, Rule] = {}
    for pattern, rule in plan.items():
        hits = [name for name in names if re.fullmatch(pattern, name)]
        if not hits:
            raise ValueError(f"the tensor-parallel plan's pattern {pattern!r} matches none of {len(names)} parameters")
        twice = found.keys() & set(hits)
        if twice:
            raise ValueError(f"the tensor-parallel plan matches {sorted(twice)[0]!r} twice")
        found |= dict.fromkeys(hits, rule)
    return found


def needs_tp_grad_reduce(name: str, *, is_cut: bool, sequence_parallel: bool) -> bool:
    """Return whether each tensor rank has a partial gradient of a whole parameter."""
    return not is_cut and (sequence_parallel or bool(re.search(INSIDE, "." + name)))


class Region:
    """The boundary of tensor-parallel work."""

    def __init__(self, group: Any, *, sequence_parallel: bool) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel

    def enter(self, x: Tensor) -> Tensor:
        """Enter work that the ranks do in parts, with (batch, seq, d_model); the gradient is summed."""
        return _AllGather.apply(x, self.group) if self.sequence_parallel else _Copy.apply(x, self.group)

    def leave(self, y: Tensor) -> Tensor:
        """Sum the ranks' partial (batch, seq, d_model)."""
        return _ReduceScatter.apply(y, self.group) if self.sequence_parallel else _AllReduce.apply(y, self.group)

    def wrap(self, module: nn.Module) -> None:
        """Pass a module's first input and first output through the region."""
        module.register_forward_pre_hook(lambda _, args: (self.enter(args[0]), *args[1:]))
        module.register_forward_hook(lambda _, args, out: self._left(out))

    def _left(self, out: Any) -> Any:
        return (self.leave(out[0]), *out[1:]) if isinstance(out, tuple) else self.leave(out)


class VocabParallelEmbedding(nn.Module):
    """The embedding with its table sharded by entries: each rank looks up its own, the results are summed."""

    def __init__(self, weight: nn.Parameter, region: Region, index: int) -> None:
        super().__init__()
        self.weight, self.region, self.index = weight, region, index

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up (batch, seq) tokens: (batch, seq, d_model)."""
        weight = self.weight  # read once: a transformed one is computed at each access
        own = tokens - self.index * len(weight)
        here = (own >= 0) & (own < len(weight))
        x = F.embedding(torch.where(here, own, 0), weight) * here[..., None].to(weight.dtype)
        return self.region.leave(x)


class VocabParallelHead(nn.Module):
    """The output head with its entries sharded; logits stay on the ranks that computed them."""

    def __init__(self, head: nn.Module, region: Region) -> None:
        super().__init__()
        self.ops, self.norm, self.weight, self.region = head.ops, head.norm, head.weight, region

    def loss(self, h: Tensor, targets: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute `Head.loss`."""
        return self.ops.linear_cross_entropy(self.region.enter(h), self.weight, targets, token_weights)


def parallel_ops(ops: Ops, kernels: KernelsConfig, group: Any, index: int) -> Ops:
    """Return operations whose arguments may be sharded over tp.

    Args:
        ops: those of one process.
        kernels: the implementation of each operation.
        group: of the tp axis.
        index: this rank's index in it.
    """

    def linear_cross_entropy(
        h: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        nll = vocab_parallel_cross_entropy(F.linear(h, weight), targets, group, index)
        return nll.mean() if token_weights is None else (nll * token_weights).sum(), nll.detach()

    def fused(h: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        from deepseek_exp.kernels.triton.linear_cross_entropy import linear_cross_entropy

        def share(figures: Tensor) -> Tensor:
            return _all_gather(figures[None], 0, group)  # (ranks, tokens, 3)

        return linear_cross_entropy(h, weight, targets - index * len(weight), share, token_weights)

    return dataclasses.replace(
        ops,
        linear_cross_entropy=fused if kernels.linear_cross_entropy is Kernel.triton else linear_cross_entropy,
        top_k_swiglu=lambda gate, up, k: parallel_top_k_swiglu(gate, up, k, group),
    )


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, group: Any, index: int) -> Tensor:
    """Return -log softmax(logits)[target] of logits whose entries are sharded.

    The largest logit, the sum of exponentials and the target's logit are exchanged, three numbers per token (Shoeybi et
    al. 2019, "Megatron-LM", section 3). In fp32 for any logits, as the definition in kernels/reference.py.

    Args:
        logits: (batch, seq, vocab), entries index * vocab onwards.
        targets: (batch, seq), int64, of the whole vocabulary.
        group: of the tp axis.
        index: this rank's index in it.

    Returns:
        (batch, seq), fp32, the same on all ranks.
    """
    return _CrossEntropy.apply(logits, targets - index * logits.shape[-1], group)


def parallel_top_k_swiglu(gate: Tensor, up: Tensor, k: int, group: Any) -> Tensor:
    """Compute `reference.top_k_swiglu` for sharded hidden units: the threshold is that of all ranks' gates."""
    every = _all_gather(gate.detach(), -1, group)  # (..., d_ff)
    border = every.topk(k, dim=-1).values[..., -1:]  # (..., 1)
    return torch.where(gate >= border, F.silu(gate) * up, 0)


def apply_tensor_parallel(model: Transformer, groups: Groups, *, sequence_parallel: bool) -> None:
    """Insert the collectives into a model whose parameters are already sharded; none with one tensor rank.

    Args:
        model: the whole of it, or the layers of one stage.
        groups: this rank's.
        sequence_parallel: shard the residual stream along the sequence.
    """
    if groups.degrees.tp == 1:
        return
    region = Region(groups.axis[Axis.tp], sequence_parallel=sequence_parallel)
    for name, module in model.named_modules():
        if re.search(r"\.(attention|feed_forward)$", name):
            region.wrap(module)
    if hasattr(model.embedding, "weight"):
        model.embedding = VocabParallelEmbedding(model.embedding.weight, region, groups.at.tp)
    if hasattr(model.head, "weight"):
        model.head = VocabParallelHead(model.head, region)


class _Copy(torch.autograd.Function):
    """Identity forward, all-reduce backward: copy to the tensor-parallel region."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_reduce(grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    """All-reduce forward, identity backward: reduce from the tensor-parallel region."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        return _all_reduce(y, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _AllGather(torch.autograd.Function):
    """All-gather (batch, seq / tp, d_model) to (batch, seq, d_model); reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_gather(x, SEQ, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _reduce_scatter(grad, SEQ, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """Reduce-scatter (batch, seq, d_model) to (batch, seq / tp, d_model); all-gather backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduce_scatter(y, SEQ, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_gather(grad, SEQ, ctx.group), None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, own: Tensor, group: Any) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        largest = wide.amax(-1)  # (batch, seq)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = wide - largest[..., None]  # (batch, seq, vocab)
        here = (own >= 0) & (own < logits.shape[-1])
        chosen = shifted.gather(-1, torch.where(here, own, 0)[..., None]).squeeze(-1) * here  # (batch, seq)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(-1), chosen])  # (2, batch, seq)
        dist.all_reduce(sums, group=group)
        total, chosen = sums.unbind(0)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(exponentials.div_(total[..., None]), own, here)
        return total.log() - chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        probabilities, own, here = ctx.saved_tensors
        out = probabilities * grad[..., None]  # (batch, seq, vocab)
        out.scatter_add_(-1, torch.where(here, own, 0)[..., None], -(grad * here)[..., None])
        return out.to(ctx.dtype), None, None


def _all_reduce(x: Tensor, group: Any) -> Tensor:
    """Sum the ranks' tensors."""
    return _summed(x, group.group_name)


def _all_gather(x: Tensor, dim: int, group: Any) -> Tensor:
    """Concatenate the ranks' tensors along a dimension."""
    return _gathered(x, dim, group.size(), group.group_name)


def _reduce_scatter(x: Tensor, dim: int, group: Any) -> Tensor:
    """Sum the ranks' tensors and return this rank's shard along a dimension."""
    return _scattered(x, dim, group.size(), group.group_name)


@operation("all_reduce")
def _summed(x: Tensor, group: str) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=_resolve_process_group(group))
    return x


@operation("all_gather")
def _gathered(x: Tensor, dim: int, n: int, group: str) -> Tensor:
    out = x.new_empty(n, *x.shape)
    dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous(), group=_resolve_process_group(group))
    return torch.cat(out.unbind(0), dim)


@operation("reduce_scatter")
def _scattered(x: Tensor, dim: int, n: int, group: str) -> Tensor:
    parts = torch.stack(x.chunk(n, dim))  # (ranks, ...)
    out = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(out, parts.flatten(0, 1), group=_resolve_process_group(group))
    return out


@_summed.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


@_gathered.register_fake
def _(x: Tensor, dim: int, n: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= n
    return x.new_empty(shape)


@_scattered.register_fake
def _(x: Tensor, dim: int, n: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= n
    return x.new_empty(shape)
