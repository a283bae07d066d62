"""The gate of SwiGLU in Triton against its definition."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.kernels import reference
from deepseek_exp.kernels.triton.swiglu import swiglu
from tests.kernels.fused import assert_equals_definition


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 64), (1, 1), (67, 96), (3, 1025), (6, 2500), (0, 8), (9, 1)])
def test_rows_of_every_width(shape):
    gate, up = torch.randn(shape) * 4, torch.randn(shape)
    if gate.numel():
        assert_equals_definition(swiglu, reference.swiglu, (gate, up))
    else:
        assert swiglu(gate, up).shape == shape


def halves(function):
    """Read halves of one tensor and write a part of another, so that the gradient is a part as well."""
    return lambda both: torch.cat([function(*both.chunk(2, dim=-1)), both[..., :3]], dim=-1)


@pytest.mark.parametrize("shape", [(5, 14), (2, 7, 34), (2, 3, 2, 2600)])
def test_halves_of_one_tensor_are_read_where_they_are(shape, monkeypatch):
    both = torch.randn(shape)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # a copy would fail
    assert_equals_definition(halves(swiglu), halves(reference.swiglu), (both,))


def test_columns_that_do_not_lie_side_by_side():
    gate, up = torch.randn(6, 5, 4).transpose(0, 2), torch.randn(4, 5, 6)
    assert_equals_definition(swiglu, reference.swiglu, (gate, up))


def test_a_gradient_that_is_one_number():
    gate, up = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    swiglu(gate, up).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    reference.swiglu(*wide).sum().backward()
    for t, w in zip((gate, up), wide, strict=True):
        torch.testing.assert_close(t.grad.double(), w.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gates_so_large_that_exp_is_not_finite():
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    assert_equals_definition(swiglu, reference.swiglu, (gate, torch.arange(1.0, 8.0)))


def test_compiles_without_a_break():
    both = torch.randn(4, 6, 16)
    compiled = torch.compile(halves(swiglu), backend="aot_eager", fullgraph=True)
    assert_equals_definition(compiled, halves(reference.swiglu), (both,))
    gate, up = both.requires_grad_().chunk(2, dim=-1)
    torch.library.opcheck(torch.ops.deepseek_exp.swiglu, (gate, up))
