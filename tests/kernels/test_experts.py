"""The routed experts in Triton against their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepseek_exp.kernels import reference
from deepseek_exp.kernels import routed_experts as operation
from deepseek_exp.kernels.routed_experts import routed_experts
from deepseek_exp.kernels.triton import experts
from deepseek_exp.kernels.triton.experts import permute, rows_of, unpermute
from tests.kernels.fused import assert_equals_definition, outputs_and_gradients

# tokens, experts, experts of a token, d_model, d_expert: one tile, several of rows, several of columns
SHAPES = [(5, 3, 2, 8, 16), (1, 4, 4, 16, 8), (90, 6, 3, 16, 24), (4, 2, 1, 1032, 8), (9, 2, 2, 8, 1032)]


def parts(tokens, experts, k, d, f, capacity=None, used=None):
    """Tensors of a layer; an expert takes `capacity` rows, and only the first `used` experts are chosen."""
    rand = torch.Generator().manual_seed(tokens + d)
    x, weights = torch.randn(tokens, d, generator=rand), torch.rand(tokens, k, generator=rand)
    ids = torch.rand(tokens, used or experts, generator=rand).argsort(-1)[:, :k].flatten()
    if capacity is not None:
        place = (ids[:, None] == ids).tril(-1).sum(1)
        ids = torch.where(place < capacity, ids, experts)
    order = ids.argsort(stable=True)
    ends = (ids[:, None] <= torch.arange(experts)).sum(0).int()
    w_gate, w_up = torch.randn(2, experts, f, d, generator=rand) * d**-0.5
    return x, weights, order, order.argsort(), ends, w_gate, w_up, torch.randn(experts, d, f, generator=rand) * f**-0.5


@pytest.fixture
def nan_in_empty_memory():
    """Every tensor that nobody has written holds NaN: here, deterministic algorithms do that."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class _Kept(torch.autograd.Function):
    """The first rows; the gradient of the others is NaN."""

    @staticmethod
    def forward(ctx, rows, n):
        ctx.n_rest = len(rows) - n
        return rows[:n].clone()

    @staticmethod
    def backward(ctx, grad):
        return F.pad(grad, (0, 0, 0, ctx.n_rest), value=float("nan")), None


def test_the_definition_is_a_loop_over_tokens():
    x, weights, order, inverse, ends, *w = (
        t.double() if t.is_floating_point() else t for t in parts(6, 4, 2, 8, 16, capacity=2)
    )
    y = reference.routed_experts(x, weights, order, inverse, ends, *w)
    dropped = 0
    for t in range(6):
        want = torch.zeros(8, dtype=torch.float64)
        for k in range(2):
            expert = int((ends <= inverse[2 * t + k]).sum())
            dropped += expert == 4
            if expert < 4:
                gate, up, down = (m[expert] for m in w)
                hidden = (gate @ x[t]) * torch.sigmoid(gate @ x[t]) * (up @ x[t])
                want += weights[t, k] * (down @ hidden)
        torch.testing.assert_close(y[t], want)
    assert 0 < dropped < 12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, nan_in_empty_memory):
    assert_equals_definition(routed_experts, reference.routed_experts, parts(*shape))


def test_experts_without_rows(nan_in_empty_memory):
    assert_equals_definition(routed_experts, reference.routed_experts, parts(5, 6, 2, 8, 16, used=3))


@pytest.mark.parametrize("capacity", [0, 1, 20])
def test_dropped_rows_count_nothing_whatever_their_memory_holds(capacity, nan_in_empty_memory):
    inputs = parts(60, 4, 2, 8, 16, capacity)
    assert inputs[4][-1] < 120
    assert_equals_definition(routed_experts, reference.routed_experts, inputs)


def test_tensors_that_do_not_lie_one_after_the_other():
    x, weights, *rest = parts(6, 3, 2, 8, 16)
    expanded, columns = x[:1].expand(6, 8), weights.T.contiguous().T
    inputs = (expanded, columns, *rest)
    assert_equals_definition(routed_experts, reference.routed_experts, inputs)
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    routed_experts(*leaves, *rest).sum().backward()  # a gradient expanded from one number
    wide = [t.detach().double().requires_grad_() for t in leaves]
    reference.routed_experts(*wide, *(t.double() if t.is_floating_point() else t for t in rest)).sum().backward()
    for got, want in zip(leaves, wide, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-5)


def test_keeps_tokens_gate_and_up_alone():
    """No gathered row, hidden layer or expert's output waits for the backward pass."""
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in parts(6, 3, 2, 8, 16)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        routed_experts(*inputs)
    given = {t.data_ptr() for t in inputs}
    assert [tuple(t.shape) for t in kept if t.nbytes and t.data_ptr() not in given] == [(12, 16), (12, 16)]


def test_copies_tokens_to_their_rows_once_a_pass_and_their_gradient_once(monkeypatch):
    copied = []
    for module in (experts, operation):
        monkeypatch.setattr(module, "rows_of", lambda x, *rest: copied.append(x) or rows_of(x, *rest))
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in parts(6, 3, 2, 8, 16)]
    grad = torch.randn(6, 8)
    routed_experts(*inputs).backward(grad)
    assert [t.data_ptr() for t in copied] == [t.data_ptr() for t in (inputs[0], grad, inputs[0])]


@pytest.mark.parametrize("capacity", [None, 1, 20])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_rows_that_are_sent_and_back(shape, capacity, nan_in_empty_memory):
    x, weights, _, inverse, ends, *_ = parts(*shape, capacity)
    inverse, n_kept, n_dropped = inverse.view(weights.shape), int(ends[-1]), len(inverse) - int(ends[-1])

    def there(function):
        """What dropped rows hold is not defined; nor is what comes back as their gradient."""
        return lambda x: _Kept.apply(function(x, inverse, ends), n_kept)

    def back(function):
        return lambda y: function(F.pad(y, (0, 0, 0, n_dropped), value=float("nan")), inverse, ends)

    assert_equals_definition(there(permute), there(reference.permute), [x])
    y = torch.randn(n_kept, x.shape[1], generator=torch.Generator().manual_seed(3))
    assert_equals_definition(back(unpermute), back(reference.unpermute), [y])


def test_compiles_without_a_break():
    inputs = parts(6, 3, 2, 8, 16, capacity=3)
    compiled = torch.compile(routed_experts, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(outputs_and_gradients(f, inputs) for f in (compiled, routed_experts)), strict=True):
        assert torch.equal(a, b)
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in parts(6, 3, 2, 8, 16)]
    torch.library.opcheck(torch.ops.deepseek_exp.routed_experts, (*inputs, "wide"))
