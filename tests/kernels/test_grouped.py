"""Grouped products and sparse activation against their definitions, on the meta device and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepseek_exp.kernels import TORCH, reference

ENDS = {"even": [4, 8, 12], "empty groups": [0, 7, 7], "one group": [12, 12, 12], "rows left over": [3, 3, 9]}


def tensors(dtype, ends):
    rand = torch.Generator().manual_seed(0)
    x = torch.randn(12, 16, generator=rand, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(3, 24, 16, generator=rand, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.tensor(ends, dtype=torch.int32)


def with_gradients(product, x, weight, ends):
    y = product(x, weight, ends)[: ends[-1]]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad((y * g).sum(), (x, weight))
    return [t.double() for t in (y.detach(), grads[0][: ends[-1]], grads[1])]


def test_the_definition_is_a_loop_over_rows():
    x, weight, ends = tensors(torch.float64, [3, 3, 9])
    y = reference.grouped_mm(x, weight, ends)
    for row in range(12):
        want = weight[0 if row < 3 else 2] @ x[row] if row < 9 else torch.zeros(24, dtype=torch.float64)
        torch.testing.assert_close(y[row], want)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_as_exact_as_the_definition_with_every_gradient(dtype, ends):
    """An error of one rounding of the result is granted, for sums may be taken in another order."""
    inputs = tensors(dtype, ends)
    wide = [t.detach().double().requires_grad_() for t in inputs[:2]]
    exact = with_gradients(reference.grouped_mm, *wide, inputs[2])
    plain = with_gradients(reference.grouped_mm, *inputs)
    fast = with_gradients(TORCH.grouped_mm, *inputs)
    for e, p, f in zip(exact, plain, fast, strict=True):
        assert (f - e).norm() <= 2 * (p - e).norm() + torch.finfo(dtype).eps * e.norm() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gradient_may_have_any_strides(dtype):
    """That of a sum is one number expanded."""
    x, weight, ends = tensors(dtype, [4, 8, 12])
    TORCH.grouped_mm(x, weight, ends).sum().backward()
    torch.testing.assert_close(x.grad[0], weight.detach()[0].sum(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shapes_are_known_without_values(dtype):
    x, weight, ends = (t.to("meta") for t in tensors(dtype, [4, 8, 12]))
    assert TORCH.grouped_mm(x, weight, ends).shape == (12, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole(dtype):
    inputs = tensors(dtype, [3, 3, 12])
    compiled = torch.compile(TORCH.grouped_mm, backend="aot_eager", fullgraph=True)
    for a, b in zip(with_gradients(compiled, *inputs), with_gradients(TORCH.grouped_mm, *inputs), strict=True):
        assert torch.equal(a, b)


class TestTopKSwiglu:
    @pytest.mark.parametrize("k", [1, 3, 8, 15, 16])
    def test_is_its_definition_with_every_gradient(self, k):
        rand = torch.Generator().manual_seed(k)
        gate, up = (torch.randn(2, 5, 16, generator=rand, dtype=torch.float64).requires_grad_() for _ in range(2))
        y = reference.top_k_swiglu(gate, up, k)
        g = torch.randn(y.shape, generator=rand, dtype=torch.float64)
        grads = torch.autograd.grad((y * g).sum(), (gate, up))
        want = torch.zeros_like(y)
        for row in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
            values = gate[tuple(row)].tolist()
            for unit in sorted(range(16), key=lambda u: -values[u])[:k]:
                at = (*row, unit)
                want[at] = F.silu(gate[at]) * up[at]
        torch.testing.assert_close(y, want)
        for got, expected in zip(grads, torch.autograd.grad((want * g).sum(), (gate, up)), strict=True):
            torch.testing.assert_close(got, expected)
            assert torch.all((got != 0).sum(-1) == k)
        assert torch.all((y != 0).sum(-1) == k)

    def test_all_units_are_plain_swiglu(self):
        gate, up = torch.randn(4, 8), torch.randn(4, 8)
        assert torch.equal(reference.top_k_swiglu(gate, up, 8), reference.swiglu(gate, up))

    def test_negative_gates_may_be_among_the_largest(self):
        gate, up = torch.tensor([-3.0, -1.0, -2.0, -4.0]), torch.ones(4)
        assert reference.top_k_swiglu(gate, up, 2).nonzero().flatten().tolist() == [1, 2]

    def test_equal_gates_at_the_border_all_stay(self):
        gate, up = torch.tensor([1.0, 2.0, 1.0, 0.0]), torch.ones(4)
        assert reference.top_k_swiglu(gate, up, 2).nonzero().flatten().tolist() == [0, 1, 2]

    def test_what_is_not_kept_may_be_infinite(self):
        gate, up = torch.tensor([1.0, 0.5]), torch.tensor([1.0, float("inf")]).requires_grad_()
        y = reference.top_k_swiglu(gate.requires_grad_(), up, 1)
        y.sum().backward()
        assert y.tolist() == [F.silu(torch.tensor(1.0)).item(), 0] and up.grad[1] == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_keeps_the_type(self, dtype):
        assert reference.top_k_swiglu(torch.randn(3, 8).to(dtype), torch.randn(3, 8).to(dtype), 2).dtype is dtype
