"""Operations called straight do what their operators do."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.kernels.linears import _linears
from deepseek_exp.kernels.local_global_attention import _attention
from deepseek_exp.kernels.triton.rms_norm import _add_rms_norm
from deepseek_exp.kernels.triton.sorting import _sort_by_expert
from deepseek_exp.kernels.triton.swiglu import _swiglu
from tests.kernels.fused import outputs_and_gradients
from tests.operators import Called

W = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
QKV = torch.randn(3, 1, 2, 9, 4, generator=torch.Generator().manual_seed(1))
# an operation, how it is called, and with what
CASES = {
    "two tensors": (_swiglu, lambda op: op, (QKV[0], QKV[1])),
    "several results": (_add_rms_norm, lambda op: op, (QKV[0], QKV[1], W[0, 0], 1e-6)),
    "lists": (_linears, lambda op: lambda x, a, b: op(x, [a, b]), (QKV[0, 0, 0], W[0], W[1])),
    "an absent tensor": (_attention, lambda op: op, (*QKV, None, 0.5, 0, 4, 0)),
    "unused results": (_attention, lambda op: lambda *args: op(*args)[0], (*QKV, torch.zeros(2), 0.5, 0, 4, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_operator(name):
    op, calling, inputs = CASES[name]
    direct, dispatched = (outputs_and_gradients(calling(f), inputs) for f in (op, op.operator))
    for a, b in zip(direct, dispatched, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_who_looks_sees_the_operator():
    with Called() as called:
        _swiglu(QKV[0], QKV[1])
    assert called.names >= {"deepseek_exp::swiglu"}
    x = QKV[0].clone().requires_grad_()
    assert type(_swiglu(x, x).grad_fn).__name__ == "deepseek_exp_swigluBackward"
    assert _swiglu(QKV[0].to("meta"), QKV[1].to("meta")).shape == QKV[0].shape
    with torch.no_grad():
        assert torch.equal(_swiglu(QKV[0], QKV[1]), _swiglu.operator(QKV[0], QKV[1]))


def test_without_a_gradient_to_find_the_function_alone_is_called(monkeypatch):
    ids = torch.tensor([[1, 0], [2, 1]])
    want = _sort_by_expert.operator(ids, 3)
    monkeypatch.setattr(_sort_by_expert, "operator", None)
    assert all(torch.equal(a, b) for a, b in zip(_sort_by_expert(ids, 3), want, strict=True))
    with pytest.raises(TypeError):  # it would be the operator that says that it has none
        _sort_by_expert(ids.double().requires_grad_(), 3)
