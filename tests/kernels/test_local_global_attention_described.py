"""Attention that skips blocks of keys, where its loops load through descriptors: heads of 16 numbers or 32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_exp.kernels import local_global_attention as module
from deepseek_exp.kernels import reference
from tests.kernels.fused import assert_equals_definition, outputs_and_gradients
from tests.kernels.test_local_global_attention import BOUND, Case, numbers, pytestmark, tensors

__all__ = ["pytestmark"]

WIDE = {"width": 16, "v_width": 16, "batch": 2, "gated": True}
CASES = {
    "causal": Case(37, 37, 0, heads=2, kv_heads=2, **WIDE | {"gated": False}),
    "grouped heads, the first tile without far keys": Case(37, 37, 33, 3, heads=2, **WIDE),
    "window wider than all": Case(19, 19, 90, 3, **WIDE),
    "global keys of several tiles": Case(35, 35, 7, 20, **WIDE),
    "memory with keys that nobody sees": Case(17, 81, 9, 4, 64, heads=2, **WIDE),
    "cached, first query not at a tile's border": Case(21, 61, 11, **WIDE | {"gated": False}),
    "widths that differ": Case(35, 35, 12, 3, heads=2, kv_heads=2, **WIDE | {"width": 32}),
}


@pytest.fixture
def answers(monkeypatch) -> list[bool]:
    """Keep what was said of whether descriptors will do, forward and backward."""
    said, real = [], module._described
    monkeypatch.setattr(module, "_described", lambda *t: said.append(real(*t)) or said[-1])
    return said


def tokens_first(*inputs: Tensor | float | None) -> Tensor:
    """Attend, and give the result as (B, S, H, V): then its gradient has that order, as in a model."""
    return module.local_global_attention(*inputs).transpose(1, 2)


def definition(*inputs: Tensor | float | None) -> Tensor:
    return reference.local_global_attention(*inputs).transpose(1, 2)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_its_definition(case, answers):
    assert_equals_definition(tokens_first, definition, (*tensors(case), *numbers(case)), BOUND)
    assert answers in ([True] * 2, [True] * 4)  # forward and backward, and again if the case is repeated


def test_descriptors_and_addresses_give_the_same_bits(monkeypatch):
    case = CASES["memory with keys that nobody sees"]
    inputs = (*tensors(case), *numbers(case))
    described = outputs_and_gradients(tokens_first, inputs)
    monkeypatch.setattr(module, "_described", lambda *_: False)
    for a, b in zip(described, outputs_and_gradients(tokens_first, inputs), strict=True):
        assert torch.equal(a, b)


def test_values_and_keys_cut_from_one_tensor(answers):
    """As a latent's projection gives them: a head's values lie 48 numbers after the last one's, and are 16."""

    def of(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, kv, gate: attend(q, *kv.transpose(1, 2).split([32, 16], -1), gate, 0.3, 0, 12, 3)

    inputs = torch.randn(2, 35, 2, 32).transpose(1, 2), torch.randn(2, 35, 2, 48), torch.randn(2)
    assert_equals_definition(of(tokens_first), of(definition), inputs, BOUND)
    assert answers in ([True] * 2, [True] * 4)  # forward and backward, and again if the case is repeated


@pytest.mark.parametrize(
    "name", ["grouped heads, the first tile without far keys", "memory with keys that nobody sees"]
)
def test_what_lies_past_the_last_token_is_not_read(name, answers):
    inputs = [*tensors(CASES[name]), *numbers(CASES[name])]
    wanted = outputs_and_gradients(tokens_first, inputs)
    for i in range(3):
        t = inputs[i].transpose(1, 2)
        longer = torch.cat([t, torch.full_like(t, float("nan"))], 1)
        inputs[i] = longer[:, : t.shape[1]].transpose(1, 2)
    leaves = [t.requires_grad_() for t in inputs if isinstance(t, Tensor)]
    out = tokens_first(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    assert answers == [True] * 4 and all(map(torch.equal, found, wanted))


def _padded(t: Tensor) -> Tensor:
    """Put one number after the heads of each token (B, S, H, W)."""
    rows = torch.cat([t.flatten(2), t.new_zeros(*t.shape[:2], 1)], -1)
    return rows[..., :-1].unflatten(-1, t.shape[2:])


def _late(t: Tensor) -> Tensor:
    """Begin one number after the memory does."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("shape", [(0, 19, 2, 16), (2, 0, 2, 16)], ids=["no sequences", "no tokens"])
def test_nothing_gives_nothing(shape):
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    out = tokens_first(*(t.transpose(1, 2) for t in leaves), None, 0.3, 0, 5, 0)
    assert [t.shape for t in (out, *torch.autograd.grad(out.sum(), leaves))] == [shape] * 4


LAYOUTS = {
    "rows not 16 bytes apart": _padded,
    "not 16 bytes from the memory's begin": _late,
    "head after head": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "one sequence for the batch": lambda t: t[:1].expand(t.shape),
    "a width that is no power of two": lambda t: torch.cat([t, t[..., :8]], -1),
    "narrower than a tile": lambda t: t[..., :8].contiguous(),
}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
def test_addresses_where_descriptors_will_not_do(lay, answers):
    """Leaves are (B, S, H, W), laid otherwise before they are attended to."""

    def of(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: attend(*(lay(x).transpose(1, 2) for x in t), None, 0.3, 0, 5, 0)

    inputs = [torch.randn(2, 19, 2, 16) for _ in range(3)]
    assert_equals_definition(of(tokens_first), of(definition), inputs, BOUND)
    assert answers in ([False] * 2, [False] * 4)


class OnGpu:
    """A tensor that says that it lies on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, t: Tensor) -> None:
        self.t = t

    def __getattr__(self, name: str) -> Any:
        return getattr(self.t, name)


@pytest.mark.parametrize(
    ("capability", "dtype", "will_do"),
    [
        ((8, 9), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, True),
        ((10, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
    ],
)
def test_descriptors_need_a_gpu_that_has_them(monkeypatch, capability, dtype, will_do):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    heads = torch.zeros(2, 19, 2, 16, dtype=dtype).transpose(1, 2)
    assert module._described(OnGpu(heads)) is will_do
