"""The mixture-of-experts layer against loops over tokens, its edges, its repeatability, and the sources' routers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from deepseek_exp.kernels import TORCH, reference
from deepseek_exp.models.moe import MoE
from tests.models.moe.moe_parts import D_MODEL, build, by_loop, distance, gradients, swiglu_network, tokens

CASES = {
    "softmax": {},
    "softmax, raw weights": {"norm_top_k": False},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, raw weights": {"score": "sigmoid", "norm_top_k": False},
    "scaled": {"score": "sigmoid", "route_scale": 2.5, "n_shared_experts": 1},
    "raw and scaled": {"norm_top_k": False, "route_scale": 16.0},
    "groups by their best": {"n_groups": 4, "top_k_groups": 2, "group_score": "max", "top_k": 3},
    "groups by their best two": {
        "score": "sigmoid",
        "n_groups": 2,
        "top_k_groups": 1,
        "group_score": "top2_sum",
        "top_k": 3,
    },
    "groups by their sum": {"n_groups": 4, "top_k_groups": 2, "group_score": "sum"},
    "sigmoid groups by their best two": {
        "score": "sigmoid",
        "n_groups": 4,
        "top_k_groups": 3,
        "group_score": "top2_sum",
        "n_shared_experts": 2,
    },
    "two shared experts": {"n_shared_experts": 2},
    "bias": {"balance": "bias", "score": "sigmoid"},
    "bias and groups": {"balance": "bias", "n_groups": 4, "top_k_groups": 2, "group_score": "top2_sum"},
    "one expert a token": {"top_k": 1, "norm_top_k": False},
    "all experts": {"top_k": 8},
}


def with_bias(layer: MoE) -> MoE:
    if layer.router.bias is not None:
        layer.router.bias = torch.linspace(0.6, -0.6, 8, dtype=layer.router.weight.dtype)[torch.randperm(8)]
    return layer


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_loop_with_every_gradient(case):
    layer, x = with_bias(build(**case)), tokens()
    got, want = gradients(layer, x, lambda x: layer(x)[0]), gradients(layer, x, lambda x: by_loop(layer, x)[0])
    assert {n: d for n in want if (d := distance(got[n], want[n])) > 1e-12} == {}
    assert all(want[n].norm() > 0 for n in want)
    _, counts = layer(x)
    load = torch.tensor(by_loop(layer, x)[1]).flatten().bincount(minlength=8)
    assert counts[:8].tolist() == load.tolist()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fp32_is_as_exact_as_the_loop_in_fp32(case):
    """Errors against float64 are at most twice those of the loop, and half an ulp of fp32 a product summed."""
    layer, x = with_bias(build(torch.float32, TORCH, **case)), tokens(dtype=torch.float32)
    wide = copy.deepcopy(layer).double()
    exact = gradients(wide, x.double(), lambda x: by_loop(wide, x)[0])
    plain = gradients(layer, x, lambda x: by_loop(layer, x)[0])
    fast = gradients(layer, x, lambda x: layer(x)[0])
    for name, want in exact.items():
        assert distance(fast[name], want) <= 2 * distance(plain[name], want) + 2**-24 * D_MODEL**0.5, name


def test_the_bias_chooses_and_does_not_weigh():
    layer = build(balance="bias", score="sigmoid", norm_top_k=False)
    x = tokens(1, 1)[0]
    before = layer.router(x)
    outsider = next(e for e in range(8) if e not in before.ids_TK[0])
    layer.router.bias[outsider] = 10
    after = layer.router(x)
    assert after.ids_TK[0, 0] == outsider
    assert after.weights_TK[0, 0] == before.scores_TE[0, outsider] < 1
    assert torch.equal(after.scores_TE, before.scores_TE)


@pytest.mark.parametrize(("score", "group"), [("max", 0), ("top2_sum", 1), ("sum", 2)])
def test_each_group_score_names_its_own_group(score, group):
    """Of three groups one has the best expert, one the best two, and one the most in all."""
    layer = build(n_routed_experts=12, n_groups=3, top_k_groups=1, group_score=score, score="sigmoid")
    wanted = torch.tensor([9.0, 1, 1, 1, 8, 7, 1, 1, 6, 6, 6, 5], dtype=torch.float64) / 10
    x = torch.zeros(1, D_MODEL, dtype=torch.float64)
    x[0, 0] = 1
    with torch.no_grad():
        layer.router.weight[:, 0] = wanted.logit()
    ids = layer.router(x).ids_TK
    assert torch.all(ids // 4 == group)
    assert set(wanted[ids[0]].tolist()) == set(wanted[4 * group : 4 * group + 4].topk(2).values.tolist())


class TestEdges:
    @pytest.mark.parametrize("ops", [None, TORCH], ids=["definition", "grouped"])
    def test_all_tokens_on_one_expert_and_seven_idle(self, ops):
        kwargs = {"top_k": 1, "norm_top_k": False, "score": "sigmoid"}
        layer = build(torch.float32, TORCH, **kwargs) if ops else build(**kwargs)
        x = tokens(dtype=layer.router.weight.dtype).abs()
        with torch.no_grad():
            layer.router.weight.fill_(-0.1)[5] = 0.1
        got, want = gradients(layer, x, lambda x: layer(x)[0]), gradients(layer, x, lambda x: by_loop(layer, x)[0])
        assert layer(x)[1][:8].tolist() == [0, 0, 0, 0, 0, x.shape[0] * x.shape[1], 0, 0]
        for name in want:
            assert distance(got[name], want[name]) < (1e-6 if ops else 1e-12), name
        idle = [e for e in range(8) if e != 5]
        assert all(torch.all(got[f"experts.{w}"][idle] == 0) for w in ("w_gate", "w_up", "w_down"))

    @pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7)], ids=str)
    def test_few_tokens(self, shape):
        layer, x = build(n_shared_experts=1), tokens(*shape)
        assert distance(layer(x)[0], by_loop(layer, x)[0]) < 1e-12

    def test_every_expert_is_weighed_by_its_probability(self):
        layer, x = build(top_k=8, norm_top_k=False), tokens(1, 3)
        e = layer.experts
        rows = [
            sum(
                p * swiglu_network(t, e.w_gate[i], e.w_up[i], e.w_down[i])
                for i, p in enumerate((layer.router.weight @ t).softmax(0))
            )
            for t in x[0]
        ]
        assert distance(layer(x)[0][0], torch.stack(rows)) < 1e-12

    def test_small_sigmoids_still_weigh(self):
        """Weights are divided by their sum even where it is far below one."""
        layer, x = build(score="sigmoid"), tokens(1, 2).abs()
        with torch.no_grad():
            layer.router.weight.copy_(-0.8 - torch.rand(8, D_MODEL, dtype=torch.float64) / 10)
        assert layer.router(x[0]).scores_TE.max() < 1e-3
        torch.testing.assert_close(layer.router(x[0]).weights_TK.sum(-1), torch.ones(2, dtype=torch.float64))


def test_router_stays_in_fp32_for_bf16_tokens():
    layer = build(torch.bfloat16, TORCH)
    x = tokens(dtype=torch.bfloat16)
    y, _ = layer(x)
    routing = layer.router(x.flatten(0, 1))
    assert y.dtype is torch.bfloat16
    assert routing.weights_TK.dtype is routing.scores_TE.dtype is torch.float32
    want = (x.flatten(0, 1).float() @ layer.router.weight.float().T).softmax(-1)
    assert torch.equal(routing.scores_TE, want)


def test_bf16_is_as_exact_as_the_loop_in_bf16():
    layer, x = build(torch.bfloat16, TORCH, n_shared_experts=1), tokens(dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    chosen = [sorted(ids) for ids in by_loop(wide, x.double())[1]]
    assert [sorted(ids) for ids in layer.router(x.flatten(0, 1)).ids_TK.tolist()] == chosen
    exact = gradients(wide, x.double(), lambda x: by_loop(wide, x)[0])
    plain = gradients(layer, x, lambda x: by_loop_of(layer, x, chosen))
    fast = gradients(layer, x, lambda x: layer(x)[0])
    for name, want in exact.items():
        assert distance(fast[name], want) <= 2 * distance(plain[name], want), name


def by_loop_of(layer: MoE, x, chosen):
    """The loop in bf16 with the experts of float64, for bf16 scores would choose others."""
    rows, e = [], layer.experts
    for token, ids in zip(x.flatten(0, 1), chosen, strict=True):
        scores = (layer.router.weight.float() @ token.float()).softmax(0)[ids]
        parts = [swiglu_network(token, e.w_gate[i], e.w_up[i], e.w_down[i]) for i in ids]
        row = sum(w.bfloat16() * part for w, part in zip(scores / scores.sum(), parts, strict=True))
        rows.append(row + layer.shared(token))
    return torch.stack(rows).view_as(x)


class TestRepeatability:
    @pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_bit_for_bit(self, dtype, capacity_factor):
        layer = build(
            dtype,
            TORCH,
            n_shared_experts=1,
            balance="aux_loss",
            sequence_loss_weight=0.1,
            capacity_factor=capacity_factor,
        )
        x = tokens(4, 32, dtype)
        first = gradients(layer, x, lambda x: layer(x)[0])
        for _ in range(3):
            again = gradients(layer, x, lambda x: layer(x)[0])
            assert all(torch.equal(first[n], again[n]) for n in first)

    @pytest.mark.parametrize("capacity_factor", [0.0, 0.5])
    def test_no_token_feels_a_later_one(self, capacity_factor):
        layer, x = build(capacity_factor=capacity_factor), tokens(1, 24)
        changed = x.clone()
        changed[:, 10:] = tokens(1, 14, seed=7)
        before, after = layer(x)[0], layer(changed)[0]
        torch.testing.assert_close(after[:, :10], before[:, :10], rtol=0, atol=1e-12)
        assert distance(after[:, 10:], before[:, 10:]) > 0.1

    def test_no_sequence_feels_another(self):
        layer, x = build(n_shared_experts=1), tokens(3, 8)
        alone = torch.cat([layer(sequence[None])[0] for sequence in x])
        torch.testing.assert_close(layer(x)[0], alone, rtol=0, atol=1e-12)


class TheirRouter(nn.Module):
    """The sources' router, as printed there."""

    def __init__(self, experts, top_k=2):
        super().__init__()
        self.experts = nn.ModuleDict(experts)
        self.top_k = top_k

    def forward(self, x):
        logits = self.gate(x)
        top_k_idx = torch.topk(logits, self.top_k).indices
        outputs = [self.experts[str(i)](x) for i in top_k_idx]
        return sum(outputs) / len(outputs)


class TheirRouterMended(TheirRouter):
    """The same with a gate of our router's weights and keys that are numbers."""

    def __init__(self, layer: MoE):
        super().__init__({str(i): OneExpert(layer, i) for i in range(8)})
        self.gate = nn.Linear(D_MODEL, 8, bias=False, dtype=torch.float64)
        self.gate.weight.data.copy_(layer.router.weight)

    def forward(self, x):
        indices = torch.topk(self.gate(x), self.top_k).indices.tolist()
        outputs = [self.experts[str(i)](x) for i in indices]
        return sum(outputs) / len(outputs)


class OneExpert(nn.Module):
    def __init__(self, layer: MoE, index: int):
        super().__init__()
        self.w = nn.ParameterList(w[index].detach().clone() for w in layer.experts.parameters())
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return swiglu_network(x, *self.w)


class TestTheSourcesRouter:
    def test_as_printed_it_does_not_run(self):
        experts = {str(i): OneExpert(build(), i) for i in range(8)}
        router, token = TheirRouter(experts), tokens(1, 1)[0, 0]
        with pytest.raises(AttributeError, match="gate"):
            router(token)
        router.gate = nn.Linear(D_MODEL, 8, dtype=torch.float64)
        with pytest.raises(KeyError, match="tensor"):  # str(i) of a tensor is no key
            router(token)

    def test_no_gradient_reaches_its_gate_and_it_does_not_weigh(self):
        layer, x = build(), tokens(1, 6)
        theirs = TheirRouterMended(layer)
        y = torch.stack([theirs(t) for t in x[0]])
        y.sum().backward()
        assert theirs.gate.weight.grad is None
        ours = layer(x)[0][0]
        ours.sum().backward()
        assert layer.router.weight.grad.norm() > 0
        assert distance(y, ours) > 0.05
        with torch.no_grad():  # with equal scores the two are one
            layer.router.weight.zero_()
            theirs.gate.weight.zero_()
        assert distance(layer(x)[0][0], torch.stack([theirs(t) for t in x[0]])) < 1e-12

    def test_their_two_stages_run_all_experts_and_ours_only_the_chosen(self):
        """Their progressive_routing, and the dense formula of ours with weight 0 on all that was not chosen."""
        layer = build(n_groups=4, top_k_groups=2, group_score="sum", top_k=3)
        x = tokens(1, 10)
        routing = layer.router(x[0])
        weights_TE = torch.zeros(10, 8, dtype=torch.float64).scatter(1, routing.ids_TK, routing.weights_TK)
        experts = [OneExpert(layer, i) for i in range(8)]
        dense = sum(
            torch.stack([w * e(t) for w, t in zip(weights_TE[:, i], x[0], strict=True)]) for i, e in enumerate(experts)
        )
        assert distance(layer(x)[0][0], dense) < 1e-12

        for i, e in enumerate(experts):
            e.calls = 0
            e.gate = lambda t, i=i: layer.router.weight[i] @ t
            e.refine = lambda t, w, e=e: w * e(t)
        for t in x[0]:
            progressive_routing(t, experts)
        assert sum(e.calls for e in experts) == 10 * 8
        assert layer(x)[1][:8].sum() == 10 * 3
        rows = []

        def counting(rows_RD, weight, ends):
            rows.append(len(rows_RD))
            return reference.grouped_mm(rows_RD, weight, ends)

        layer.experts.ops = dataclasses.replace(TORCH, grouped_mm=counting)
        layer(x)
        assert rows == [10 * 3] * 3


def progressive_routing(x, experts):
    """The sources' two stages, as printed there."""
    gate_scores = torch.stack([e.gate(x) for e in experts])
    coarse_weights = torch.softmax(gate_scores, dim=0)
    refined_weights = []
    for i, e in enumerate(experts):
        adjusted = e.refine(x, coarse_weights[i])
        refined_weights.append(adjusted)
    return sum(refined_weights)
