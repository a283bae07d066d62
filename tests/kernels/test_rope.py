"""Rotary positions in Triton, with and without the norm before them, against their definition."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.kernels import reference
from deepseek_exp.kernels.triton.rope import rope
from tests.kernels.fused import assert_equals_definition

# batch, heads, tokens, width of a head, columns of it that turn; the last three have more tiles than programs
SHAPES = [(2, 3, 5, 8, 8), (1, 1, 1, 2, 2), (2, 4, 9, 24, 8), (2, 1, 11, 18, 6), (1, 5, 67, 64, 64), (2, 3, 37, 96, 32),
          (1, 2, 9, 1030, 514)]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tables(seq, turn):
    angle = torch.randn(seq, turn // 2, dtype=torch.float64) * 3
    return angle.cos().float(), angle.sin().float()


def kernel(cos, sin, prepare=lambda x: x, eps=0.0):
    """Apply to what `prepare` makes of x; weight is left out where there is none."""
    return lambda x, *weight: rope(prepare(x), cos, sin, *weight, eps=eps)


def definition(cos, sin, prepare=lambda x: x, eps=0.0):
    """Do the same, by the definition in float64."""
    return lambda x, *weight: reference.rope(prepare(x), cos.double(), sin.double(), *weight, eps=eps)


def assert_right(shape, turn, prepare=lambda x: x, eps=0.0, weight=()):
    seq = prepare(torch.empty(shape)).shape[2]
    arguments = (*tables(seq, turn), prepare, eps)
    assert_equals_definition(kernel(*arguments), definition(*arguments), (torch.randn(shape) * 3, *weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_alone(shape):
    assert_right(shape[:-1], shape[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_after_the_norm_of_each_head(shape, eps):
    assert_right(shape[:-1], shape[-1], eps=eps, weight=(torch.randn(shape[3]),))


def copies_fail(monkeypatch):
    def contiguous(self):
        assert self.is_contiguous()
        return self

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)


# what a model hands over: heads of a projection, some of its heads, one head that is a part of a latent
LAYOUTS = [
    ((2, 5, 24), lambda x: x.view(2, 5, 3, 8).transpose(1, 2)),
    ((2, 5, 32), lambda x: x.view(2, 5, 4, 8).transpose(1, 2)[:, 1:3]),
    ((2, 5, 14), lambda x: x[:, None, :, 6:]),
    ((2, 1, 5, 8), lambda x: x.expand(2, 3, 5, 8)),
]


@pytest.mark.parametrize("shape, prepare", LAYOUTS)
@pytest.mark.parametrize("weight", [(), (torch.linspace(-1, 2, 8),)], ids=["alone", "normed"])
def test_heads_are_read_where_they_are(shape, prepare, weight, monkeypatch):
    copies_fail(monkeypatch)
    assert_right(shape, 4, prepare, 1e-6, weight)


@pytest.mark.parametrize("weight", [(), (torch.linspace(-1, 2, 8),)], ids=["alone", "normed"])
def test_columns_that_do_not_lie_side_by_side(weight):
    assert_right((2, 8, 5, 3), 8, lambda x: x.transpose(1, 3), 1e-6, weight)


@pytest.mark.parametrize("weight", [(), (torch.linspace(-1, 2, 8),)], ids=["alone", "normed"])
@pytest.mark.parametrize("read", [lambda y: y.transpose(1, 2).flatten(2), lambda y: y.sum(), lambda y: y[..., 1:]])
def test_gradients_of_every_layout(weight, read):
    cos, sin = tables(5, 4)
    ours, theirs = kernel(cos, sin, eps=1e-6), definition(cos, sin, eps=1e-6)
    x = torch.randn(2, 3, 5, 8)
    assert_equals_definition(lambda *a: read(ours(*a)), lambda *a: read(theirs(*a)), (x, *weight))


@pytest.mark.parametrize("weight", [(), (torch.ones(8),)], ids=["alone", "normed"])
def test_results_and_gradients_lie_as_the_projections_read_them(weight):
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    y = rope(x, *tables(5, 8), *weight, eps=1e-6)
    (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape))
    assert y.transpose(1, 2).is_contiguous() and dx.transpose(1, 2).is_contiguous()


def test_nothing_but_the_tables_is_kept_without_the_norm():
    kept = []
    cos, sin = tables(5, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        rope(torch.randn(2, 3, 5, 8, requires_grad=True), cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()]


def test_no_tokens():
    x, weight = torch.randn(2, 3, 0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    rope(x, *tables(0, 8), weight, 1e-6).sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.parametrize("seq, turn", [(4, 8), (6, 8), (5, 10)])
def test_tables_that_do_not_fit_stop_it(seq, turn):
    with pytest.raises(ValueError, match="do not fit"):
        rope(torch.randn(2, 3, 5, 8), *tables(seq, turn))


@pytest.mark.parametrize("weight", [(), (torch.linspace(-1, 2, 8),)], ids=["alone", "normed"])
def test_compiles_without_a_break(weight):
    shape, prepare = LAYOUTS[0]
    arguments = (*tables(5, 4), prepare, 1e-6)
    compiled = torch.compile(kernel(*arguments), backend="aot_eager", fullgraph=True)
    assert_equals_definition(compiled, definition(*arguments), (torch.randn(shape), *weight))


def test_the_operations_are_registered_whole():
    shape, prepare = LAYOUTS[0]
    x, weight = prepare(torch.randn(shape, requires_grad=True)), torch.ones(8, requires_grad=True)
    torch.library.opcheck(torch.ops.deepseek_exp.rope, (x, *tables(5, 4), False))
    torch.library.opcheck(torch.ops.deepseek_exp.norm_rope, (x, *tables(5, 4), weight, 1e-6))
