"""How many rows an expert takes in training, which are dropped, and that nothing of them gets anywhere."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from deepseek_exp.kernels import TORCH, reference
from tests.models.moe.moe_parts import D_MODEL, build, by_loop, counted, distance, gradients, tokens


class UndefinedRows(torch.autograd.Function):
    """grouped_mm whose rows past the last group are NaN, in the result and in the gradient of x."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight, ends)
        y = reference.grouped_mm(x, weight, ends)
        y[ends[-1] :] = float("nan")
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, ends = ctx.saved_tensors
        grad_x = reference.grouped_mm(grad, weight.transpose(1, 2), ends)
        grad_x[ends[-1] :] = float("nan")
        borders = [0, *ends.tolist()]
        grad_w = [grad[a:b].T @ x[a:b] for a, b in itertools.pairwise(borders)]
        return grad_x, torch.stack(grad_w), None


UNDEFINED = dataclasses.replace(TORCH, grouped_mm=UndefinedRows.apply)


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.25, 3.0])
@pytest.mark.parametrize("ops", [None, UNDEFINED], ids=["definition", "undefined rows"])
def test_equals_the_loop_that_serves_earlier_tokens_first(factor, ops):
    """48 rows for 8 experts, 6 each in the mean."""
    capacity = max(1, int(6 * factor))
    layer = build(capacity_factor=factor, n_shared_experts=1, **({"ops": ops} if ops else {}))
    x = tokens()
    got = gradients(layer, x, lambda x: layer(x)[0])
    want = gradients(layer, x, lambda x: by_loop(layer, x, capacity)[0])
    assert {n: d for n in want if not (d := distance(got[n], want[n])) <= 1e-12} == {}
    load = torch.tensor(by_loop(layer, x)[1]).flatten().bincount(minlength=8)
    _, counts = layer(x)
    assert counts[:8].tolist() == load.tolist()  # what was chosen, dropped or not
    assert counted(counts, "dropped") == [(load - capacity).clamp(min=0).sum()]
    assert counted(counts, "dropped") > [0] or factor == 3.0


@pytest.mark.parametrize(("factor", "n_tokens"), [(1.0, 20), (1.1, 40), (1.25, 21), (0.5, 33), (1.0, 17)])
def test_the_load_factor_is_bounded_by_it(factor, n_tokens):
    layer = build(capacity_factor=factor)
    x = tokens(1, n_tokens)[0].abs()
    with torch.no_grad():
        layer.router.weight[:2] = 1.0  # all want the same two
    ids = layer.router(x).ids_TK
    sent = layer.dispatcher.dispatch(x, ids, 8, layer._capacity(ids))
    kept = sent.offsets_E.diff(prepend=torch.zeros(1, dtype=torch.int32))
    mean = n_tokens * 2 / 8
    assert factor - 1 / mean < kept.max().item() / mean <= factor


def test_an_expert_takes_one_row_at_least():
    layer = build(capacity_factor=0.01)
    x = tokens(1, 3)
    assert distance(layer(x)[0], by_loop(layer, x, 1)[0]) < 1e-12


def test_a_dropped_token_gets_nothing_and_gives_nothing():
    layer = build(capacity_factor=0.5, top_k=1, norm_top_k=False, ops=UNDEFINED)
    with torch.no_grad():
        layer.router.weight.zero_()[3] = 1.0
    x = tokens(1, 16).abs().requires_grad_()  # a mean load of 2: one row is served
    y = layer(x)[0]
    assert y[0, 0].norm() > 0 and torch.all(y[0, 1:] == 0)
    y.square().sum().backward()
    y = layer(x)[0]
    x.grad = None
    y.sum().backward()
    assert x.grad[0, 0].norm() > 0 and torch.all(x.grad[0, 1:] == 0)
    assert torch.all(layer.experts.w_up.grad[[0, 1, 2, 4, 5, 6, 7]] == 0)


def test_nothing_is_dropped_outside_of_training():
    layer, x = build(capacity_factor=0.5), tokens()
    dropped = layer(x)
    layer.eval()
    kept = layer(x)
    assert counted(dropped[1], "dropped") > [0] and counted(kept[1], "dropped") == [0]
    assert distance(kept[0], by_loop(layer, x)[0]) < 1e-12 < distance(dropped[0], kept[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uninitialised_memory_reaches_nothing(dtype):
    """PyTorch can fill all new memory with NaN: rows that the grouped products leave out stay out."""
    layer = build(dtype, TORCH, capacity_factor=0.5, n_shared_experts=1)
    plain = gradients(layer, tokens(dtype=dtype), lambda x: layer(x)[0])
    torch.use_deterministic_algorithms(True)
    fills, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        assert torch.empty(3).isnan().all()
        ends = torch.full((8,), 2, dtype=torch.int32)
        rows = TORCH.grouped_mm(torch.ones(4, D_MODEL, dtype=dtype), layer.experts.w_up.detach(), ends)
        assert rows[2:].isnan().all()
        filled = gradients(layer, tokens(dtype=dtype), lambda x: layer(x)[0])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills
    assert all(torch.equal(plain[n], filled[n]) for n in plain)
