"""Attention that skips blocks of keys, in Triton, against its definition.

On a CPU tiles have 32 queries and 16 keys, or 16 and 32 for the gradients of keys and values: all cases but the
shortest have several of both.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from deepseek_exp.kernels import reference
from deepseek_exp.kernels.local_global_attention import local_global_attention
from tests.kernels.fused import assert_equals_definition, outputs_and_gradients

# the interpreter warns of queries past the last one, whose results are not stored, and of what tests make NaN
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),
]

# the terms of a gate's gradient nearly cancel, and their roundings do not
BOUND = 1e-5


class Case(NamedTuple):
    queries: int
    keys: int
    window: int
    n_global: int = 0
    n_memory: int = 0
    gated: bool = False
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    width: int = 8
    v_width: int = 8
    scale: float = 0.4


CASES = {
    "causal": Case(45, 45, 0),
    "causal with a gate": Case(33, 33, 0, 5, gated=True),
    "window": Case(61, 61, 21),
    "window of several tiles": Case(90, 90, 53, 2, gated=True),
    "window no wider than a token": Case(40, 40, 1, 3, gated=True),
    "window wider than all": Case(40, 40, 90, 3, gated=True),
    "window and global keys": Case(67, 67, 19, 3),
    "batches, and heads of their own": Case(33, 33, 12, 3, gated=True, batch=2, heads=2, kv_heads=2),
    "grouped heads": Case(33, 33, 13, 3, gated=True, heads=4, kv_heads=2),
    "global keys of several tiles": Case(70, 70, 7, 35, gated=True),
    "more global keys than tokens": Case(40, 40, 5, 50),
    "memory": Case(50, 75, 17, 4, 25, gated=True),
    "memory with keys that nobody sees": Case(33, 97, 9, 4, 64, gated=True),
    "memory within the window": Case(40, 50, 33, 4, 10, gated=True),
    "more global keys than follow the memory": Case(10, 50, 4, 20, 40, gated=True),
    "cached": Case(3, 90, 33, 5, gated=True),
    "one cached query": Case(1, 50, 0, heads=2),
    "cached, first query not at a tile's border": Case(37, 61, 11, 3, gated=True),
    "two tokens": Case(2, 2, 4, 1, gated=True),
    "widths that differ": Case(40, 40, 12, 3, gated=True, width=24, v_width=12),
    "wide values": Case(40, 40, 12, 3, gated=True, width=5, v_width=20, scale=1.3),
}


def tensors(case: Case) -> list[torch.Tensor | None]:
    """Queries, keys and values as projections give them, and gates."""
    torch.manual_seed(case.queries)
    q = torch.randn(case.batch, case.queries, case.heads, case.width).transpose(1, 2)
    k = torch.randn(case.batch, case.keys, case.kv_heads, case.width).transpose(1, 2)
    v = torch.randn(case.batch, case.keys, case.kv_heads, case.v_width).transpose(1, 2)
    return [q, k, v, 2 * torch.randn(case.heads) if case.gated else None]


def numbers(case: Case) -> tuple[float, int, int, int]:
    return case.scale, case.n_memory, case.window, case.n_global


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_its_definition(case):
    inputs = (*tensors(case), *numbers(case))
    assert_equals_definition(local_global_attention, reference.local_global_attention, inputs, BOUND)


def test_values_and_keys_cut_from_one_tensor():
    q, kv = torch.randn(1, 1, 40, 12), torch.randn(1, 40, 1, 20)

    def of(attend):
        return lambda q, kv, gate: attend(q, *kv.transpose(1, 2).split([12, 8], -1), gate, 0.3, 0, 12, 3)

    inputs = q, kv, torch.randn(1)
    assert_equals_definition(of(local_global_attention), of(reference.local_global_attention), inputs, BOUND)


@pytest.mark.parametrize("name", ["cached", "more global keys than tokens"])
def test_keys_and_values_of_a_cache_that_holds_more_than_is_read(name):
    q, *cache, gate = tensors(CASES[name])
    longer = [torch.cat([t, torch.full_like(t, float("nan"))], 2) for t in cache]
    k, v = (t[:, :, : CASES[name].keys] for t in longer)
    attend = local_global_attention
    assert torch.equal(attend(q, k, v, gate, *numbers(CASES[name])), attend(q, *cache, gate, *numbers(CASES[name])))


def test_tensors_whose_last_dimension_is_not_the_densest():
    q, k, v = (torch.randn(1, 1, 8, 40).transpose(2, 3) for _ in range(3))
    inputs = q, k, v, torch.randn(1), 0.3, 0, 12, 3
    assert_equals_definition(local_global_attention, reference.local_global_attention, inputs, BOUND)


def test_the_gradient_of_the_result_may_have_any_strides():
    """That of a sum is one number expanded."""
    found, wanted = tensors(CASES["grouped heads"]), tensors(CASES["grouped heads"])
    for attend, inputs in ((local_global_attention, found), (reference.local_global_attention, wanted)):
        attend(*(t.requires_grad_() for t in inputs), *numbers(CASES["grouped heads"])).sum().backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


class TestSkipping:
    """What a skipped block holds cannot matter, whatever it is.

    The window is 20: the tile of the queries 64 to 95 reaches back to key 45, the tile of the keys 0 to 31 ahead to
    query 50, whose tile ends at 63.
    """

    case = Case(100, 100, 20, 3, gated=True)

    def results(self, spoilt: dict[int, slice], value: float) -> list[torch.Tensor]:
        """Give the result and the gradients; parts of the inputs and, 4, of the result's gradient have one value."""
        inputs, grad = [t.detach() for t in tensors(self.case)], torch.randn(1, 1, 100, 8)
        for i, rows in spoilt.items():
            [*inputs, grad][i][:, :, rows] = value
        leaves = [t.requires_grad_() for t in inputs]
        out = local_global_attention(*leaves, *numbers(self.case))
        out.backward(grad)
        return [out.detach(), *(t.grad for t in leaves)]

    def test_keys_that_windows_have_left_behind(self):
        torch.manual_seed(0)
        behind = {1: slice(3, 45), 2: slice(3, 45)}
        out, dq, dk, dv, _ = self.results(behind, float("nan"))
        assert out[:, :, 45:64].isnan().any(), "this tile's window does hold them"
        torch.manual_seed(0)
        wanted = self.results(behind, 0.0)
        for a, b in zip((out, dq, dk, dv), wanted, strict=False):
            assert torch.equal(a[:, :, 64:], b[:, :, 64:]) and not b[:, :, 64:].isnan().any()

    def test_queries_whose_windows_have_left_the_keys_behind(self):
        torch.manual_seed(0)
        ahead = {0: slice(64, None), 4: slice(64, None)}
        _, _, dk, dv, _ = self.results(ahead, float("nan"))
        assert dk[:, :, :3].isnan().all(), "the global keys are not left behind"
        torch.manual_seed(0)
        _, _, *wanted, _ = self.results(ahead, 0.0)
        for a, b in zip((dk, dv), wanted, strict=True):
            assert torch.equal(a[:, :, 3:32], b[:, :, 3:32]) and not b.isnan().any()

    def test_keys_and_queries_ahead(self):
        torch.manual_seed(0)
        case = Case(100, 100, 0)
        q, k, v, _ = tensors(case)
        ahead = [t.clone() for t in (k, v)]
        for t in ahead:
            t[:, :, 64:] = float("nan")
        out = local_global_attention(q, *ahead, None, *numbers(case))
        assert torch.equal(out[:, :, :64], local_global_attention(q, k, v, None, *numbers(case))[:, :, :64])
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        grad = torch.ones(1, 1, 100, 8)
        grad[:, :, :64] = float("nan")
        local_global_attention(q, k, v, None, *numbers(case)).backward(grad)
        assert not k.grad[:, :, 64:].isnan().any() and not v.grad[:, :, 64:].isnan().any()


@pytest.mark.parametrize(("width", "scale"), [(264, 0.1), (8, -0.5)])
def test_what_the_kernels_are_not_made_for_is_right_all_the_same(width, scale):
    inputs = (*tensors(Case(6, 6, 3, 1, gated=True, width=width)), scale, 0, 3, 1)
    assert_equals_definition(local_global_attention, reference.local_global_attention, inputs, BOUND)


def test_inputs_that_need_no_gradient():
    case = CASES["memory"]
    q, k, v, gate = tensors(case)
    k.requires_grad_()
    local_global_attention(q, k, v, gate, *numbers(case)).sum().backward()
    assert k.grad is not None and q.grad is None


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_without_a_break(gated):
    case = Case(20, 40, 12, 3, gated=gated)
    inputs = [*tensors(case), *numbers(case)]
    compiled = torch.compile(local_global_attention, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(outputs_and_gradients(f, inputs) for f in (compiled, local_global_attention)), strict=True):
        assert torch.equal(a, b)
    leaves = [t if t is None else t.requires_grad_() for t in inputs[:4]]
    torch.library.opcheck(torch.ops.deepseek_exp.local_global_attention, (*leaves, *inputs[4:]))


@pytest.mark.parametrize(
    "name", ["window no wider than a token", "global keys of several tiles", "window and global keys"]
)
def test_the_gradient_of_a_gate_is_as_exact_as_fp32(name):
    """The result is rounded to fp16, and the gate's gradient, a sum of which all terms were off, is not."""
    case = CASES[name]._replace(heads=3, kv_heads=3, width=24, v_width=24, gated=True)
    q, k, v, gate = tensors(case)
    q, k, v = (t.half() for t in (q, k, v))
    above = torch.randn(case.batch, case.heads, case.queries, case.v_width).half()
    found = []
    for function, dtype in ((local_global_attention, None), (reference.local_global_attention, torch.float64)):
        inputs = [t.to(dtype or t.dtype).requires_grad_() for t in (q, k, v, gate)]
        out = function(*inputs, *numbers(case))
        (dgate,) = torch.autograd.grad(out, inputs[-1:], above.to(out.dtype))
        found.append(dgate.double())
    difference = (found[0] - found[1]).abs().max() / found[1].abs().max()
    assert difference < BOUND, f"{difference:.1e}"
