"""What one rank holds of a model: the layers of its stage, and of their parameters what tp and ep leave it.

The whole model is made without memory (on PyTorch's meta device); this rank's part of it then gets real parameters
under their own full names, so that weights can be drawn, saved and loaded by name whatever the layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_exp.checkpoint.shards import Cut
from deepseek_exp.config import ExperimentConfig, ModelConfig
from deepseek_exp.config.topology import Axis
from deepseek_exp.models import Losses, MicroBatch, Objective, Transformer
from deepseek_exp.models.moe import MoE
from deepseek_exp.parallel.expert import AllToAllDispatcher
from deepseek_exp.parallel.groups import ENDS, KV, Groups
from deepseek_exp.parallel.runtime import limit_graphs
from deepseek_exp.parallel.tensor import apply_tensor_parallel, match_plan, needs_tp_grad_reduce, tensor_plan
from deepseek_exp.planner import stage_bounds

EXPERTS = r".*feed_forward\.experts\.w_\w+"
TABLE = "embedding.weight"


@dataclass(frozen=True)
class ParamShard:
    """The shard of one parameter that this rank holds.

    Attributes:
        name: in the whole model.
        shape: of the whole parameter.
        cuts: which slice of it this rank holds, per dimension that is cut.
        sums: the groups over which its gradient is summed before it is averaged over the data axis; keys of
            `Groups.sums`.
        counted: this rank counts it in the gradient norm and saves it. Of equal copies one rank does.
        is_copy: it is a table that another stage also has, and owns.
    """

    name: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    sums: tuple[str, ...]
    counted: bool
    is_copy: bool


@dataclass(frozen=True)
class ModelShard:
    """The model of one rank.

    Attributes:
        model: a Transformer without the layers of other stages.
        blocks: indices of the blocks that are here.
        params: one entry per parameter of `model`, in its order.
        trained: names and numbers of dimensions of all trained parameters of the whole model, in its order.
        n_moe_layers: MoE layers of the whole model.
        first_moe_layer: how many of them are in earlier stages.
        counts_width: how many numbers each of them counts.
    """

    model: Transformer
    blocks: range
    params: list[ParamShard]
    trained: list[tuple[str, int]]
    n_moe_layers: int
    first_moe_layer: int
    counts_width: int


class Stage:
    """The layers of one rank: from the output of the stage before to the input of the next, or to the losses.

    The losses are computed in here, since DeepSpeed, in bf16, drops the gradients of what comes after its module.
    """

    def __init__(self, shard: ModelShard, groups: Groups, objective: Objective) -> None:
        """Assemble what a rank runs.

        Args:
            shard: what it holds of the model.
            groups: its groups.
            objective: computes the losses on the last stage.
        """
        self.model, self.blocks, self.objective = shard.model, shard.blocks, objective
        self.is_first, self.is_last = groups.is_first, groups.is_last

    def __call__(self, x: Tensor, batch: MicroBatch) -> Tensor | Losses:
        """Run the layers on a micro-batch.

        Args:
            x: the inputs (batch, seq) int64 on the first stage, on others the output of the stage before, (batch, seq,
                d_model).
            batch: the micro-batch, which every stage has.

        Returns:
            (batch, seq, d_model); the losses on the last stage.
        """
        x = self.model.embedding(x) if self.is_first else x  # (batch, seq, d_model)
        for i in self.blocks:
            x = self.model.blocks[i](x, None, None, batch.domain, batch.document)
        return self.objective.from_hidden(self.model, x, batch) if self.is_last else x


def shard_model(exp: ExperimentConfig, whole: Transformer, groups: Groups) -> ModelShard:
    """Reduce a model on the meta device to what this rank holds; its parameters are real then, and unset.

    Args:
        exp: the experiment; its layout is legal.
        whole: the whole model on the meta device.
        groups: this rank's.
    """
    cfg, pp = exp.model, groups.at.pp
    order = [(name, p.ndim) for name, p in whole.named_parameters()]
    rules = match_plan(tensor_plan(cfg), [name for name, _ in order])
    ends = stage_bounds(exp, groups.degrees.pp)
    # the first block comes with the embedding, and the last entry is all that makes logits
    blocks = range(0 if pp == 0 else ends[pp - 1], min(ends[pp], cfg.n_layers))
    layers = {name: len(m.counts) for name, m in whole.named_modules() if isinstance(m, MoE)}
    _drop_other_stages(whole, blocks, groups, cfg)
    params = []
    for name, p in list(whole.named_parameters()):
        param = _place(name, tuple(p.shape), rules, groups, exp)
        params.append(param)
        _replace(whole, p, nn.Parameter(torch.empty(local_shape(param), device=groups.device)))
    for module in whole.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = _fresh(module, key, buffer, groups.device)
    for module in whole.modules():
        if isinstance(module, MoE) and groups.degrees.ep > 1:
            module.set_dispatcher(AllToAllDispatcher(groups.axis[Axis.ep], module.ops))
    apply_tensor_parallel(whole, groups, sequence_parallel=exp.parallel.sequence_parallel)
    if exp.trainer.compile:
        _compile([*(whole.blocks[i] for i in blocks), *(module.block for module in whole.mtp)])
    here = [name for name, m in whole.named_modules() if isinstance(m, MoE)]
    first = list(layers).index(here[0]) if here else 0
    return ModelShard(whole, blocks, params, order, len(layers), first, max(layers.values(), default=0))


def _compile(blocks: Sequence[nn.Module]) -> None:
    """Compile blocks one by one, with their collectives; equal blocks share the compiler's work.

    Every shape has its own graph, since attention would break a graph with symbolic sizes in two.
    """
    limit_graphs()
    for block in blocks:
        block.compile(dynamic=False)


def cut(whole: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """Take what cuts leave of a whole tensor; a view."""
    for c in cuts:
        size = whole.shape[c.dim] // c.ways
        whole = whole.narrow(c.dim, c.index * size, size)
    return whole


def local_shape(param: ParamShard) -> list[int]:
    """Return the shape of a parameter on this rank."""
    shape = list(param.shape)
    for c in param.cuts:
        shape[c.dim] //= c.ways
    return shape


def set_weights(shard: ModelShard, weight_of: Callable[[str, tuple[int, ...]], Tensor]) -> None:
    """Fill this rank's parameters.

    Args:
        shard: from `shard_model`.
        weight_of: gives a whole parameter by its name and shape.
    """
    parameters = dict(shard.model.named_parameters())
    with torch.no_grad():
        for param in shard.params:
            parameters[param.name].copy_(cut(weight_of(param.name, param.shape), param.cuts))


def copy_weights(shard: ModelShard, whole: nn.Module) -> None:
    """Fill this rank's parameters and buffers from a whole model that is at hand."""
    parameters = dict(whole.named_parameters())
    set_weights(shard, lambda name, shape: parameters[name])
    buffers = dict(whole.named_buffers())
    for name, buffer in shard.model.named_buffers():
        buffer.copy_(buffers[name])


def _drop_other_stages(model: Transformer, blocks: range, groups: Groups, cfg: ModelConfig) -> None:
    for i in range(cfg.n_layers):
        if i not in blocks:
            model.blocks[i] = nn.Identity()
    if not groups.is_last:
        model.head, model.mtp = nn.Identity(), nn.ModuleList()
    needs_table = groups.is_first or (groups.is_last and (cfg.tie_embeddings or cfg.n_mtp_layers))
    if not needs_table:
        model.embedding = nn.Identity()


def _place(
    name: str, shape: tuple[int, ...], rules: dict[str, Any], groups: Groups, exp: ExperimentConfig
) -> ParamShard:
    d, at, rule = groups.degrees, groups.at, rules.get(name)
    cuts: list[Cut] = []
    is_expert = bool(re.fullmatch(EXPERTS, name))
    if is_expert and d.ep > 1:
        cuts.append(Cut(0, d.ep, at.ep))
    sums: list[str] = []
    first_copy = at.tp == 0
    if rule is not None and d.tp > 1:
        ways = min(d.tp, rule.most or d.tp)
        first_copy = at.tp % (d.tp // ways) == 0
        if ways > 1:
            cuts.append(Cut(rule.dim, ways, at.tp * ways // d.tp))
        if ways < d.tp:
            sums.append(KV)
    elif d.tp > 1 and needs_tp_grad_reduce(name, is_cut=False, sequence_parallel=exp.parallel.sequence_parallel):
        sums.append(Axis.tp.value)
    if d.ep > 1 and not is_expert:
        sums.append(Axis.ep.value)
    on_both_ends = d.pp > 1 and name == TABLE and bool(exp.model.tie_embeddings or exp.model.n_mtp_layers)
    if on_both_ends:
        sums.append(ENDS)
    is_copy = on_both_ends and not groups.is_first
    counted = first_copy and (is_expert or at.ep == 0)
    return ParamShard(name, shape, tuple(cuts), tuple(sums), counted, is_copy)


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in every place of another, so that tied ones stay tied."""
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is old:
                module._parameters[key] = new


def _fresh(module: nn.Module, key: str, buffer: Tensor, device: torch.device) -> Tensor:
    """Return a real buffer for one on the meta device: zeros, except `loaded`, which is all true."""
    return torch.full_like(buffer, key == "loaded", device=device)


def gradient_sums(shard: ModelShard, groups: Groups) -> list[tuple[Any, list[nn.Parameter]]]:
    """List the groups over which gradients are summed, each with its parameters, in the same order on all ranks."""
    parameters = {name: p for name, p in shard.model.named_parameters() if p.requires_grad}
    found = []
    for key, group in groups.sums.items():
        names = [param.name for param in shard.params if key in param.sums]
        members = [parameters[name] for name in names if name in parameters]
        if members:
            found.append((group, members))
    return found
