import pytest
import torch
from torch import nn

from deepseek_exp.kernels import reference
from deepseek_exp.kernels.linears import linears
from tests.kernels.fused import assert_equals_definition

WIDTHS = [(5,), (7, 3), (8, 8, 1)]


def of(function, n):
    """Give a function of x, weights and biases."""

    def apply(x, *matrices):
        layers = [nn.Module() for _ in range(n)]
        for layer, weight, bias in zip(layers, matrices[:n], matrices[n:], strict=True):
            layer.weight, layer.bias, layer.forward = weight, bias, lambda x, w=weight, b=bias: x @ w.T + b
        return torch.cat(function(x, layers), -1)

    return apply


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_results_and_gradients(widths, shape):
    torch.manual_seed(0)
    inputs = torch.randn(shape), *(torch.randn(n, 6) for n in widths), *(torch.randn(n) for n in widths)
    assert_equals_definition(of(linears, len(widths)), of(reference.linears, len(widths)), inputs)


def test_layers_without_bias_are_one_operation_each_way():
    x, layers = torch.randn(4, 6, requires_grad=True), [nn.Linear(6, n, bias=False) for n in (3, 2)]
    y, z = linears(x, layers)
    (node, _), (other, _) = y.grad_fn.next_functions[0], z.grad_fn.next_functions[0]
    assert node is other and "deepseek_exp_linears" in type(node).__name__
    with torch.no_grad():
        assert torch.equal(linears(x, layers)[1], layers[1](x))


def test_compiles_whole():
    x, layers = torch.randn(4, 6, requires_grad=True), nn.ModuleList(nn.Linear(6, n) for n in (3, 2))
    compiled = torch.compile(lambda x: sum(y.sum() for y in linears(x, layers)), backend="aot_eager", fullgraph=True)
    compiled(x).backward()
    torch.testing.assert_close(x.grad, sum(layer.weight.sum(0) for layer in layers).expand(4, 6))
    torch.library.opcheck(torch.ops.deepseek_exp.linears, (x, [layer.weight for layer in layers]))
