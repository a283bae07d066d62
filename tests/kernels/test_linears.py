from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepseek_exp.kernels import reference
from deepseek_exp.kernels.linears import _linears, _summed_linear, linears, summed_linear
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
    torch.library.opcheck(_linears, (x, [layer.weight for layer in layers], ""))


@pytest.fixture
def one_rank():
    """The name of a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_sums_over_ranks_are_no_others_of_one_rank(one_rank, shape):
    """What they are of several, `tests/parallel/test_tensor.py` compares."""
    torch.manual_seed(0)
    inputs = torch.randn(shape), torch.randn(5, 6), torch.randn(5)
    assert_equals_definition(of(lambda x, layers: linears(x, layers, one_rank), 1), of(reference.linears, 1), inputs)
    assert_equals_definition(lambda x, w: summed_linear(x, w, one_rank), lambda x, w: x @ w.T, inputs[:2])


def test_products_of_weight_gradients_hide_the_sum(one_rank, monkeypatch):
    x, layers, order = torch.randn(4, 6, requires_grad=True), [nn.Linear(6, n, bias=False) for n in (3, 2)], []
    multiply, exchange = torch.Tensor.__matmul__, dist.all_reduce

    def begin(tensor, **kwargs):
        order.append("begin")
        work = exchange(tensor, **kwargs)
        return SimpleNamespace(wait=lambda: (order.append("wait"), work.wait()))

    loss = sum(y.sum() for y in linears(x, layers, one_rank))
    monkeypatch.setattr(dist, "all_reduce", begin)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (order.append("product"), multiply(a, b))[1])
    loss.backward()
    assert order == ["product", "begin", "product", "product", "wait"]  # the second part of dx is no product alone


def test_sums_over_ranks_compile_whole(one_rank):
    x, layers = torch.randn(4, 6, requires_grad=True), nn.ModuleList(nn.Linear(6, n) for n in (3, 2, 7))

    def both(x):
        y, z = linears(x, layers[:2], one_rank)
        return y.sum() + z.sum() + summed_linear(x, layers[2].weight, one_rank).sum()

    torch.compile(both, backend="aot_eager", fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, sum(layer.weight.sum(0) for layer in layers).expand(4, 6))
    weights = [layer.weight for layer in layers]
    torch.library.opcheck(_linears, (x, weights, one_rank))
    torch.library.opcheck(_summed_linear, (x, weights[0], one_rank))
