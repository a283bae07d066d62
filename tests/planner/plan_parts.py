"""Experiments and layouts that the planner's tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from deepseek_exp.config import ActivationCheckpointing, ExperimentConfig, ModelConfig
from deepseek_exp.config.topology import Degrees
from deepseek_exp.kernels import Ops
from deepseek_exp.models import Transformer, init_weights
from deepseek_exp.models.block import KEPT, Block
from deepseek_exp.models.moe import MoE
from deepseek_exp.parallel.expert import AllToAllDispatcher
from deepseek_exp.planner.layers import layers_of
from deepseek_exp.planner.memory import Layout
from deepseek_exp.planner.search import Plan, make_plan
from tests.config.test_config import composed


def experiment(*overrides: str) -> ExperimentConfig:
    """Compose one to plan."""
    return composed("do=plan", *overrides)


def layout(
    dp: int = 1, tp: int = 1, pp: int = 1, ep: int = 1, *, zero: int = 0, micro: int = 1, full=False, sequence=False
) -> Layout:
    """Give a layout; nothing is cut unless told."""
    kind = ActivationCheckpointing.full if full else ActivationCheckpointing.none
    return Layout(Degrees(dp, tp, pp, ep), zero, micro, kind, sequence)


def planned(exp: ExperimentConfig, how: Layout) -> Plan:
    """Plan one layout."""
    return make_plan(exp, how, layers_of(exp.model, exp.data.seq_len))


def blocks(exp: ExperimentConfig, ops: Ops, dtype: torch.dtype) -> list[Block]:
    """Build the first and the last block of a model."""
    net = Transformer(exp.model, ops)
    init_weights(net, exp.model, 0)
    for p in net.parameters():
        p.data = p.data.to(dtype)
    return [net.blocks[0], net.blocks[-1]]


def exchange(net: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a model's experts reached as on other ranks, of which there is one: this."""

    def all_to_all_single(received: torch.Tensor, sent: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # the sending is counted elsewhere
            received.copy_(sent)

    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
    for module in net.modules():
        if isinstance(module, MoE):
            module.set_dispatcher(AllToAllDispatcher(None, module.ops))


def saved_bytes(block: Block, cfg: ModelConfig, dtype: torch.dtype) -> float:
    """Measure the bytes of a token that PyTorch keeps of a block for the backward pass, its weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    saved = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    x = torch.randn(2, cfg.max_seq_len, cfg.d_model, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x)
    return sum(s.nbytes() for s in saved.values()) / (2 * cfg.max_seq_len)


class Products(TorchDispatchMode):
    """Adds up the bytes of what selective checkpointing keeps."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in KEPT:
            self.n_bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out
