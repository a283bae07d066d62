"""Products with 8- and 4-bit weights against their definition."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.kernels import reference
from deepseek_exp.kernels.triton.weight_only import quantize_weight, weight_only_linear
from tests.kernels.fused import BOUND

# d_out, d_in, group_size: groups that are no power of two, one row alone, more steps than one part takes, a long row
SHAPES = [(7, 64, 16), (70, 96, 24), (5, 130, 0), (9, 2100, 0), (1, 256, 128), (33, 512, 32), (3, 4096, 2048)]
BITS = [8, 4]
# Each pair of a shape, a number of bits and a number of rows occurs.
CASES = [(shape, BITS[(i + j) % 2], rows) for i, shape in enumerate(SHAPES) for j, rows in enumerate((1, 2, 17))]


def problem(d_out, d_in, group_size, bits, *rows):
    generator = torch.Generator().manual_seed(d_in)
    weight, x = torch.randn(d_out, d_in, generator=generator), torch.randn(*rows, d_in, generator=generator)
    return x, *quantize_weight(weight, bits, group_size), bits, group_size


def assert_equals_definition(x, q, scale, bits, group_size):
    found = weight_only_linear(x, q, scale, bits, group_size)
    wanted = reference.weight_only_linear(x.double(), q, scale.double(), bits, group_size)
    assert found.shape == wanted.shape and found.dtype == x.dtype
    assert (found - wanted).abs().max() < BOUND * wanted.abs().max()


@pytest.mark.parametrize(("shape", "bits", "rows"), CASES)
def test_equals_the_definition(shape, bits, rows):
    assert_equals_definition(*problem(*shape, bits, rows))


@pytest.mark.parametrize("bits", BITS)
def test_the_same_inputs_give_the_same_bits(bits):
    inputs = problem(9, 2100, 0, bits, 17)
    assert torch.equal(weight_only_linear(*inputs), weight_only_linear(*inputs))


@pytest.mark.parametrize("bits", BITS)
def test_many_rows(bits):
    assert_equals_definition(*problem(130, 96, 32, bits, 131))


def test_odd_columns_in_one_group():
    assert_equals_definition(*problem(5, 131, 0, 8, 3))


@pytest.mark.parametrize("rows", [(), (1, 1), (2, 3)])
def test_leading_dimensions(rows):
    assert_equals_definition(*problem(6, 64, 32, 4, *rows))


def test_a_row_that_is_nan_stays_alone():
    x, *rest = problem(5, 130, 0, 8, 3)
    x[1] = float("nan")
    y = weight_only_linear(x, *rest)
    assert torch.isfinite(y[[0, 2]]).all() and y[1].isnan().all()


def test_no_rows():
    x, *rest = problem(6, 64, 32, 4, 1)
    assert weight_only_linear(x[:0], *rest).shape == (0, 6)


def test_inputs_that_do_not_lie_one_after_the_other():
    x, q, scale, bits, group_size = problem(6, 64, 32, 8, 4)
    assert_equals_definition(x.T.contiguous().T, q.T.contiguous().T, scale.T.contiguous().T, bits, group_size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_weight_is_off_by_more_than_half_a_scale(shape, bits):
    d_out, d_in, group_size = shape
    weight = torch.randn(d_out, d_in) * torch.logspace(-4, 4, d_in)
    weight[0, : d_in // 2] = 0
    q, scale = quantize_weight(weight, bits, group_size)
    assert q.dtype == torch.int8 and q.shape == (d_out, d_in * bits // 8)
    assert scale.dtype == torch.float32 and scale.shape == (d_out, d_in // (group_size or d_in))
    error = (reference.dequantize_weight(q, scale, bits, group_size) - weight).abs()
    of_column = scale.repeat_interleave(group_size or d_in, dim=1)
    assert torch.all(error <= of_column * (0.5 + 1e-5))


def test_four_bits_lie_as_described():
    """A row whose integers are known: 7 makes the scale 1."""
    row = [7.0, -7, 3, -1, 0, 2, -5, 7]
    q, scale = quantize_weight(torch.tensor([row]), 4, 4)
    assert scale.tolist() == [[1.0, 1.0]]
    assert [(b + 8) % 16 - 8 for b in q[0].tolist()] == [7, -7, 0, 2]  # low halves: the first half of each group
    assert [b >> 4 for b in q[0].tolist()] == [3, -1, -5, 7]
    assert reference.dequantize_weight(q, scale, 4, 4)[0].tolist() == row


def test_bf16_weights_are_rounded_once():
    weight = torch.randn(4, 64).bfloat16()
    q, scale = quantize_weight(weight, 8, 32)
    wide_q, wide_scale = quantize_weight(weight.float(), 8, 32)
    assert torch.equal(q, wide_q) and torch.equal(scale, wide_scale)


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (3, 32, "bits=3 must be 4 or 8"),
        (8, 48, "group_size=48 must divide the weight's 100 columns"),
        (8, -10, "group_size=-10 must divide"),
        (4, 25, "group_size=25 must give an even number of columns at bits=4"),
    ],
)
def test_groups_that_do_not_fit_are_refused(bits, group_size, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(torch.randn(3, 100), bits, group_size)


def test_shapes_that_do_not_fit_are_refused():
    x, q, scale, bits, _ = problem(6, 64, 32, 4, 2)
    with pytest.raises(ValueError, match=r"x \(2, 63\).* must be \(..., 64\)"):
        weight_only_linear(x[:, 1:], q, scale, bits, 32)
    with pytest.raises(ValueError, match=r"scale \(6, 2\) must be .* and \(6, 4\)"):
        weight_only_linear(x, q, scale, bits, 16)


def test_has_no_gradient():
    x, *rest = problem(6, 64, 32, 4, 2)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        weight_only_linear(x.requires_grad_(), *rest).sum().backward()


def test_compiles_without_a_break():
    x, *rest = problem(6, 64, 32, 4, 2)
    compiled = torch.compile(lambda x: weight_only_linear(x * 2, *rest), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), weight_only_linear(x * 2, *rest))
    torch.library.opcheck(torch.ops.deepseek_exp.weight_only_linear, (x, *rest[:3]))
