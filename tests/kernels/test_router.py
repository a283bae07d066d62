"""Routing in Triton against its definition, and the definition against the router of a layer."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.config import GroupScore, Score
from deepseek_exp.kernels import reference
from deepseek_exp.kernels.triton.router import TILE, route
from tests.kernels.fused import assert_equals_definition

# experts, then what differs from two experts a token, softmax, one group, weights as they are
CASES = {
    "softmax": (8, {}),
    "sigmoid": (8, {"score": "sigmoid"}),
    "normalised and scaled": (8, {"norm_top_k": True, "route_scale": 2.5}),
    "sigmoid, normalised": (33, {"score": "sigmoid", "norm_top_k": True, "top_k": 5}),
    "one expert": (1, {"top_k": 1}),
    "one expert a token": (6, {"top_k": 1}),
    "all experts": (7, {"top_k": 7, "norm_top_k": True}),
    "groups by their best": (24, {"n_groups": 4, "top_k_groups": 2, "group_score": "max", "top_k": 6}),
    "groups by their best two": (24, {"n_groups": 3, "top_k_groups": 2, "group_score": "top2_sum", "score": "sigmoid"}),
    "groups by their sum": (20, {"n_groups": 5, "top_k_groups": 3, "group_score": "sum", "norm_top_k": True}),
    "groups with padding": (21, {"n_groups": 7, "top_k_groups": 3, "group_score": "max"}),
    "groups of one": (5, {"n_groups": 5, "top_k_groups": 3, "group_score": "max"}),
    "as in DeepSeek-V3": (
        256,
        {
            "n_groups": 8, "top_k_groups": 4, "group_score": "top2_sum", "score": "sigmoid", "top_k": 8,
            "norm_top_k": True, "route_scale": 2.5,
        },
    ),
    "as many as there may be": (512, {"top_k": 4}),
}  # fmt: skip
PLAIN = {
    "score": "softmax",
    "top_k": 2,
    "n_groups": 1,
    "top_k_groups": 1,
    "group_score": "max",
    "norm_top_k": False,
    "route_scale": 1.0,
}


@pytest.fixture(autouse=True)
def first_of_equals(monkeypatch):
    """The definition leaves open which of equals is chosen; the kernel takes the first."""
    monkeypatch.setattr(
        reference, "_best", lambda scores, k: scores.sort(dim=-1, descending=True, stable=True)[1][:, :k]
    )


def settings(**changes):
    values = PLAIN | changes
    return values | {"score": Score(values["score"]), "group_score": GroupScore(values["group_score"])}


def random_logits(n_tokens, n_experts):
    return torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(n_experts))


def some_open(n_tokens, n_experts, at_least):
    order = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return order < max(at_least, n_experts // 2)


def assert_routes(logits, bias, open_, changes, route=route):
    """Ids to the bit; weights, scores and gradients of one, of the other and of both closely."""
    chosen = settings(**changes)
    wide_bias = None if bias is None else bias.double()
    wanted = reference.route(logits.double(), wide_bias, open_, **chosen)
    found = route(logits, bias, open_, **chosen)
    assert torch.equal(found[0], wanted[0]) and [t.dtype for t in found[1:]] == [torch.float32] * 2
    for part in ((1, 2), (1,), (2,)):

        def kernel(logits, part=part):
            out = route(logits, bias, open_, **chosen)
            return [out[i] for i in part]

        def definition(logits, part=part):
            out = reference.route(logits, wide_bias, open_, **chosen)
            return [out[i] for i in part]

        assert_equals_definition(kernel, definition, (logits,))


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition(case, with_bias):
    n_experts, changes = case
    bias = torch.linspace(0.3, -0.3, n_experts) if with_bias else None
    assert_routes(random_logits(9, n_experts), bias, None, changes)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_several_programs(score):
    n_tokens = 2 * TILE // 16 + 3
    assert_routes(random_logits(n_tokens, 12), torch.linspace(0.1, -0.1, 12), None, {"score": score, "top_k": 3})


@pytest.mark.parametrize("changes", [{}, {"score": "sigmoid", "norm_top_k": True}], ids=str)
def test_experts_that_are_not_open(changes):
    open_ = some_open(10, 12, 2)
    logits, bias = random_logits(10, 12), torch.linspace(-0.5, 0.5, 12)
    assert_routes(logits, bias, open_, changes)
    assert_routes(logits, None, open_.T.contiguous().T, changes)


def test_fewer_open_than_chosen():
    open_ = torch.zeros(3, 6, dtype=torch.bool)
    open_[0, 4] = open_[1, 0] = open_[2, 5] = True
    ids, weights, _ = route(random_logits(3, 6), None, open_, **settings(top_k=3))
    assert ids.tolist() == [[4, 0, 1], [0, 1, 2], [5, 0, 1]] and weights.tolist() == [[1, 0, 0]] * 3
    assert_routes(random_logits(3, 6), None, open_, {"top_k": 3})
    in_one_group = settings(top_k=5, n_groups=2, top_k_groups=1)  # of groups of three
    ids, _, _ = route(torch.stack([torch.arange(6.0), -torch.arange(6.0)]), None, None, **in_one_group)
    assert ids.tolist() == [[5, 4, 3, 0, 1], [0, 1, 2, 3, 4]]


def test_scores_that_are_all_zero():
    open_ = torch.tensor([[False] * 4, [True] * 4])
    assert_routes(random_logits(2, 4), None, open_, {"score": "sigmoid", "norm_top_k": True})


@pytest.mark.parametrize("group_score", ["max", "top2_sum", "sum"])
def test_a_bias_may_make_all_choices_negative(group_score):
    changes = {"n_groups": 3, "top_k_groups": 2, "group_score": group_score, "top_k": 4}
    assert_routes(random_logits(9, 15), torch.linspace(-2, -1, 15), None, changes)


@pytest.mark.parametrize("group_score", ["max", "top2_sum", "sum"])
@pytest.mark.parametrize("n_groups", [1, 4])
def test_of_equals_the_first_is_chosen(n_groups, group_score):
    """Scores are 0, 1/2 or 1 and biases multiples of 1/4, so that sums are exact."""
    rand = torch.Generator().manual_seed(n_groups)
    values = torch.tensor([float("-inf"), 0, float("inf")])
    logits = values[torch.randint(3, (60, 12), generator=rand)]
    bias = torch.randint(-1, 2, (12,), generator=rand) / 4
    chosen = settings(
        score="sigmoid", top_k=5, n_groups=n_groups, top_k_groups=(n_groups + 1) // 2, group_score=group_score
    )
    assert torch.equal(route(logits, bias, None, **chosen)[0], reference.route(logits, bias, None, **chosen)[0])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("n_groups", [1, 2])
def test_what_is_not_a_number_gets_different_experts(n_groups):
    logits = random_logits(4, 6)
    logits[0], logits[1, 2], logits[2, 0], logits[3] = float("nan"), float("nan"), float("inf"), float("-inf")
    ids, _, _ = route(logits, None, None, **settings(top_k=3, n_groups=n_groups, group_score="top2_sum"))
    assert all(len(set(row)) == 3 and set(row) <= set(range(6)) for row in ids.tolist())


def test_logits_that_do_not_lie_one_after_the_other():
    assert_routes(random_logits(12, 7).T, None, None, {"norm_top_k": True})


def test_compiles_without_a_break():
    open_, bias = some_open(5, 12, 6), torch.linspace(0.3, -0.3, 12)
    changes = {"score": "sigmoid", "top_k": 3, "n_groups": 2, "top_k_groups": 1, "norm_top_k": True}
    compiled = torch.compile(route, backend="aot_eager", fullgraph=True)
    assert_routes(random_logits(5, 12), bias, None, changes, compiled)
    arguments = (random_logits(5, 12).requires_grad_(), bias, open_, "softmax", 3, 1, 1, "max", True, 2.0)
    torch.library.opcheck(torch.ops.deepseek_exp.route, arguments)
