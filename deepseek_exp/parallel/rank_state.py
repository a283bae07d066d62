"""What one rank saves of a model and its optimizer, and how it restores that from a checkpoint of any layout.

ZeRO 1 and 2 flatten the local parameters of a group into one row, split the row into equal partitions and assign one to
each data-parallel rank, in fp32, with the optimizer's moments; ZeRO 3 splits each parameter, and its weights too.
DeepSpeed records on each parameter which part of it this rank holds, and where. Without ZeRO the optimizer holds all of
it, or the fp32 master of a bf16 parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek_exp.checkpoint.shards import WEIGHT, Piece, State, Whole
from deepseek_exp.checkpoint.tensors import readable
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.config.parameter_groups import GroupSettings, group_names
from deepseek_exp.errors import CheckpointError, Problem
from deepseek_exp.parallel.groups import Groups
from deepseek_exp.parallel.partition import TABLE, ModelShard, ParamShard


class Fragment(NamedTuple):
    """The part of a local parameter that this rank's optimizer updates.

    Attributes:
        start: its first element in the flattened local parameter.
        weight: (n,), in fp32.
        owner: the tensor that the optimizer keeps its state for.
        first: where the fragment begins in the owner.
    """

    start: int
    weight: Tensor
    owner: Tensor
    first: int


def load_shard(shard: ModelShard, state: State) -> None:
    """Set this rank's parameters and buffers."""
    parameters = dict(shard.model.named_parameters())
    missing = sorted(parameters.keys() - set(state.names))
    if missing:
        rule = f"holds no {missing[0]}, one of {len(missing)} parameters that this model has and it lacks"
        raise CheckpointError(Problem("resume", str(state.folder), rule, "name a checkpoint of the same model"))
    with torch.no_grad():
        for param, p in _parameters(shard):
            if state.shape(param.name) != param.shape:
                found, wanted = list(state.shape(param.name)), list(param.shape)
                rule = f"holds {param.name} of shape {found}, and this model has {wanted}"
                raise CheckpointError(Problem("resume", str(state.folder), rule, "name a checkpoint of the same model"))
            value = state.read(param.name, WEIGHT, param.cuts)
            if hasattr(p, "ds_tensor"):  # ZeRO 3 keeps a part of it on each rank
                start = p.ds_tensor.ds_numel * dist.get_rank()
                own = value.flatten()[start : start + p.ds_tensor.ds_numel]
                p.ds_tensor[: len(own)] = own
            if p.numel() == value.numel():  # ZeRO 3 also keeps small ones whole
                p.copy_(value)
        for name, buffer in shard.model.named_buffers():
            if name in state.buffers:
                with readable(state.folder):
                    buffer.copy_(state.buffer(name))


def load_optimizer(shard: ModelShard, optimizer: Any, state: State) -> None:
    """Set the fp32 weights that the optimizer updates, and its moments.

    Args:
        shard: of this rank, with its parameters set.
        optimizer: DeepSpeed's.
        state: the checkpoint.
    """
    base = getattr(optimizer, "optimizer", optimizer)
    with torch.no_grad():
        for param, p in _parameters(shard):
            fragment = _fragment(p, optimizer) if p.requires_grad else None
            if fragment is None:
                continue
            for kind in state.kinds(param.name):
                if not state.is_elementwise(param.name, kind):
                    _load_other(base, p, fragment, kind, param, state)
                    continue
                whole = state.read(param.name, kind, param.cuts).flatten()
                values = whole[fragment.start : fragment.start + fragment.weight.numel()]
                target = fragment.weight if kind == WEIGHT else _moment(base, fragment, kind)
                target.copy_(values)
            scalars = {kind: scalar_state(base, fragment.owner, value) for kind, value in state.scalars.items()}
            base.state[fragment.owner] |= scalars


def scalar_state(base: torch.optim.Optimizer, owner: Tensor, value: float) -> Tensor:
    """Return a scalar state on the device that it is read on, which is where PyTorch's own loading puts it.

    Args:
        base: the optimizer.
        owner: the tensor that it keeps the state for.
        value: the number.
    """
    read_by_kernel = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    return torch.tensor(value, device=owner.device if read_by_kernel else "cpu")


def _load_other(
    base: torch.optim.Optimizer, p: nn.Parameter, fragment: Fragment, kind: str, param: ParamShard, state: State
) -> None:
    """Set a state whose shape differs from its parameter's, which needs the whole parameter on this rank."""
    if _is_shared(p):
        rule = f"has a state {kind} for {param.name} that is not elementwise, and ZeRO cuts flattened parameters"
        raise CheckpointError(Problem("resume", str(state.folder), rule, "set parallel.zero_stage=0"))
    base.state[fragment.owner][kind] = state.read(param.name, kind, param.cuts).to(fragment.owner.device)


def pieces(shard: ModelShard, groups: Groups, optimizer: Any) -> Iterator[Piece]:
    """Yield what this rank saves; one of several equal replicas saves."""
    base = getattr(optimizer, "optimizer", optimizer)
    for param, p in _parameters(shard):
        fragment = _fragment(p, optimizer)
        if fragment is None or not param.counted or param.is_copy:
            continue
        if groups.at.data and not _is_shared(p):
            continue  # each data-parallel rank has all of it
        n, owner = fragment.weight.numel(), fragment.owner
        states = {kind: v for kind, v in base.state.get(owner, {}).items() if isinstance(v, Tensor) and v.ndim}
        moments = {
            kind: value.flatten()[fragment.first : fragment.first + n]
            for kind, value in states.items()
            if value.shape == owner.shape
        }
        others = {kind: value for kind, value in states.items() if value.shape != owner.shape}
        if others and (param.cuts or _is_shared(p)):  # the layout's rules reject such optimizers earlier
            raise ValueError(f"{sorted(others)} of {param.name} are not elementwise and cannot be saved in parts")
        values = {WEIGHT: fragment.weight, **moments}
        yield Piece(param.name, param.shape, param.cuts, fragment.start, values, others)


def buffers(shard: ModelShard, groups: Groups) -> dict[str, Tensor]:
    """Return the persistent buffers that this rank saves: those of its stage, on one rank per stage."""
    if groups.at.dp or groups.at.tp:
        return {}
    parameters = {name for name, _ in shard.model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in shard.model.state_dict().items() if name not in parameters}


def whole(shard: ModelShard, optimizer: Any, exp: ExperimentConfig) -> Whole:
    """Return the metadata common to all ranks' pieces.

    Args:
        shard: of this rank, which has a matrix.
        optimizer: DeepSpeed's.
        exp: the experiment. Its tied output head shares the embedding's table.
    """
    base = getattr(optimizer, "optimizer", optimizer)
    here = {_settings(group): group for group in base.param_groups}
    groups = []
    for settings, names in group_names(exp.optim, dict(shard.trained)).items():
        group = here.get(settings) or _like(base.param_groups[0], settings, exp)
        kept = {key: value for key, value in group.items() if key != "params"}
        groups.append({**kept, "param_names": names})
    state = next(iter(base.state.values()), {})
    scalars = {kind: float(v) for kind, v in state.items() if isinstance(v, Tensor) and not v.ndim}
    dtype = next(shard.model.parameters()).dtype
    tables = (
        [TABLE, *(name for name, _ in shard.trained if name.startswith(f"{TABLE}."))]
        if exp.model.tie_embeddings
        else []
    )
    return Whole(dtype, groups, scalars, {name.replace(TABLE, "head.weight"): name for name in tables})


def _settings(group: Mapping[str, Any]) -> GroupSettings:
    return GroupSettings(group["decays"], group.get("orthogonal", False), group.get("lr_multiplier", 1.0))


def _like(group: Mapping[str, Any], settings: GroupSettings, exp: ExperimentConfig) -> dict[str, Any]:
    """Return the entries of a group whose parameters are all on other stages."""
    factor = settings.lr_multiplier / group.get("lr_multiplier", 1.0)
    rates = {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
    own = {key: value for key, value in dataclasses.asdict(settings).items() if key in group}
    return {**group, **rates, **own, "weight_decay": exp.optim.weight_decay if settings.decays else 0.0}


def _parameters(shard: ModelShard) -> Iterator[tuple[ParamShard, nn.Parameter]]:
    parameters: Mapping[str, nn.Parameter] = dict(shard.model.named_parameters())
    for param in shard.params:
        yield param, parameters[param.name]


def _is_shared(p: nn.Parameter) -> bool:
    """Return whether ZeRO shards a parameter's optimizer state."""
    return hasattr(p, "_hp_mapping") or hasattr(p, "ds_tensor")


def _fragment(p: nn.Parameter, optimizer: Any) -> Fragment | None:
    """Return what this rank's optimizer holds of a parameter, or of a frozen one this rank; None if nothing."""
    if hasattr(p, "ds_tensor") and not p.requires_grad:
        start = p.ds_tensor.ds_numel * dist.get_rank()
        n = min(p.ds_tensor.ds_numel, p.ds_numel - start)
        return Fragment(start, p.ds_tensor.data[:n], p, 0) if n > 0 else None
    if hasattr(p, "ds_tensor"):  # ZeRO 3
        group, first, size = optimizer.grad_position[optimizer.get_param_id(p)]
        owner, start = optimizer.fp32_partitioned_groups_flat[group], size * dist.get_rank()
        n = min(size, p.ds_numel - start)
        return Fragment(start, owner[first : first + n], owner, first) if n > 0 else None
    if not _is_shared(p):
        owner = _masters(optimizer).get(p, p)
        return Fragment(0, owner.data.view(-1), owner, 0)
    mapping = p._hp_mapping
    if mapping is None:
        return None
    (owner,) = optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
    start, first = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
    return Fragment(start, mapping.hp_fragment, owner, first)


def _masters(optimizer: Any) -> dict[Any, Tensor]:
    """Return the fp32 master of each bf16 parameter."""
    return dict(zip(optimizer.params, optimizer.masters, strict=True)) if hasattr(optimizer, "masters") else {}


def _moment(base: torch.optim.Optimizer, fragment: Fragment, kind: str) -> Tensor:
    """Return the slice of a fragment in the optimizer's state, which is created if missing."""
    state = base.state[fragment.owner]
    if kind not in state:
        state[kind] = torch.zeros_like(fragment.owner)
    return state[kind].view(-1)[fragment.first : fragment.first + fragment.weight.numel()]
