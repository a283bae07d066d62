"""RMSNorm in Triton against its definition."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.kernels import reference
from deepseek_exp.kernels.triton.rms_norm import add_rms_norm, rms_norm
from tests.kernels.fused import assert_equals_definition

SHAPES = [(5, 7), (2, 3, 64), (1, 3), (3, 4097), (67, 96), (40, 200)]


@pytest.mark.parametrize("shape", SHAPES)
def test_alone(shape):
    torch.manual_seed(len(shape))
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    assert_equals_definition(rms_norm, reference.rms_norm, (x, weight, 1e-6))


@pytest.mark.parametrize("shape", SHAPES)
def test_after_an_addition(shape):
    torch.manual_seed(len(shape))
    x, y, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    assert_equals_definition(add_rms_norm, reference.add_rms_norm, (x, y, weight, 1e-6))


def test_rows_that_do_not_lie_one_after_the_other():
    x = torch.randn(6, 4, 10).transpose(0, 1)
    assert_equals_definition(rms_norm, reference.rms_norm, (x, torch.randn(10), 1e-6))


def test_compiles_without_a_break():
    x, y, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    compiled = torch.compile(lambda *args: add_rms_norm(*args, 1e-6), backend="aot_eager", fullgraph=True)
    assert_equals_definition(compiled, lambda *args: reference.add_rms_norm(*args, 1e-6), (x, y, weight))
    torch.library.opcheck(torch.ops.deepseek_exp.rms_norm, (x.requires_grad_(), weight.requires_grad_(), 1e-6))
