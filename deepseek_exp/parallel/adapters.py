"""Adapters of a model that is divided over ranks: which part of A and B belongs to which part of a weight.

A has the columns of its weight W, and B its rows. If W is cut along its rows, B is cut with it, every rank has all of
A, and the gradient of A is a sum over the ranks; if W is cut along its columns, it is the other way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from deepseek_exp.adapt import Adapter, attach
from deepseek_exp.adapt.lora import A, B
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.config.matrices import adapted
from deepseek_exp.config.topology import Axis
from deepseek_exp.parallel.groups import KV, Groups
from deepseek_exp.parallel.partition import ModelShard, ParamShard, cut


def attach_adapters(
    exp: ExperimentConfig, shard: ModelShard, groups: Groups, whole: Mapping[str, Adapter]
) -> ModelShard:
    """Freeze this rank's part of a model, and add its part of the adapters, which are then all that is trained.

    Args:
        exp: the experiment.
        shard: from `shard_model`; its model is changed in place.
        groups: this rank's.
        whole: parameter name -> its whole adapter, of the whole model.

    Returns:
        What the rank holds with the adapters.
    """
    here = [param for param in shard.params if param.name in whole]
    parts = {param.name: adapter_shards(param, exp.lora.rank, groups) for param in here}
    adapters = {
        name: Adapter(*(cut(m, p.cuts).to(groups.device) for m, p in zip(whole[name], pair, strict=True)))
        for name, pair in parts.items()
    }
    adapters = {name: Adapter(a.clone(), b.clone()) for name, (a, b) in adapters.items()}  # not views of the whole
    attach(shard.model, adapters, exp.lora.alpha / exp.lora.rank)
    params = {param.name: param for param in [*shard.params, *(part for pair in parts.values() for part in pair)]}
    order = [(f"{name}.{part}", len(shape)) for name, shape in adapted(exp.model, exp.lora).items() for part in (A, B)]
    return dataclasses.replace(
        shard, params=[params[name] for name, _ in shard.model.named_parameters()], trained=order
    )


def adapter_shards(param: ParamShard, rank: int, groups: Groups) -> tuple[ParamShard, ParamShard]:
    """Return the parts of A and B that this rank holds.

    Args:
        param: this rank's part of the weight.
        rank: of the adapter.
        groups: this rank's.
    """
    *stack, d_out, d_in = param.shape
    rows, columns = len(param.shape) - 2, len(param.shape) - 1
    by_rows = KV in param.sums or any(c.dim == rows for c in param.cuts)
    by_columns = any(c.dim == columns for c in param.cuts)
    of_all = (Axis.tp.value,)
    a = dataclasses.replace(
        param,
        name=f"{param.name}.{A}",
        shape=(*stack, rank, d_in),
        cuts=tuple(c for c in param.cuts if c.dim != rows),
        sums=(*of_all, *(s for s in param.sums if s != KV)) if by_rows else param.sums,
        counted=param.counted and (groups.at.tp == 0 or not by_rows),
    )
    b = dataclasses.replace(
        param,
        name=f"{param.name}.{B}",
        shape=(*stack, d_out, rank),
        cuts=tuple(c for c in param.cuts if c.dim != columns),
        sums=(*of_all, *param.sums) if by_columns else param.sums,
        counted=param.counted and (groups.at.tp == 0 or not by_columns),
    )
    return a, b
