"""Linear layers with adapters as one operation, against the products written out."""

import pytest
import torch

from deepseek_exp.kernels.low_rank_linears import low_rank_linears
from tests.kernels.fused import assert_equals_definition

SCALE = 1.5
RANKS, WIDTHS = (2, 3, 1), (5, 7, 4)


def written_out(x, weights, a, b, scale):
    return [x @ w.T + scale * (x @ a_i.T) @ b_i.T for w, a_i, b_i in zip(weights, a, b, strict=True)]


def of(function, weights):
    n = len(weights)
    return lambda x, *pairs: function(x, [w.to(x) for w in weights], pairs[:n], pairs[n:], SCALE)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_results_and_gradients(n, shape):
    torch.manual_seed(0)
    weights = [torch.randn(d, 6) for d in WIDTHS[:n]]
    a, b = [torch.randn(r, 6) for r in RANKS[:n]], [torch.randn(d, r) for d, r in zip(WIDTHS, RANKS[:n], strict=False)]
    assert_equals_definition(of(low_rank_linears, weights), of(written_out, weights), (torch.randn(shape), *a, *b))


def test_an_input_without_gradient_gets_none():
    x, (w, a) = torch.randn(4, 6), (torch.randn(5, 6), torch.randn(2, 6, requires_grad=True))
    b = torch.randn(5, 2, requires_grad=True)
    (y,) = low_rank_linears(x, [w], [a], [b], SCALE)
    y.sum().backward()
    wanted = torch.autograd.grad(written_out(x, [w], [a], [b], SCALE)[0].sum(), (a, b))
    assert x.grad is None
    torch.testing.assert_close((a.grad, b.grad), wanted)


def test_compiles_whole():
    torch.manual_seed(0)
    x, weights = torch.randn(4, 6, requires_grad=True), [torch.randn(d, 6) for d in (5, 7)]
    a = [torch.randn(r, 6, requires_grad=True) for r in (2, 3)]
    b = [torch.randn(d, r, requires_grad=True) for d, r in ((5, 2), (7, 3))]

    def total(function, x, a, b):
        return sum((y * y).sum() for y in function(x, weights, a, b, SCALE))

    compiled = torch.compile(lambda *given: total(low_rank_linears, *given), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, a, b), (x, *a, *b))
    torch.testing.assert_close(found, torch.autograd.grad(total(written_out, x, a, b), (x, *a, *b)))
    torch.library.opcheck(torch.ops.deepseek_exp.low_rank_linears, (x, weights, a, b, SCALE))
