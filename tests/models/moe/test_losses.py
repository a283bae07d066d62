"""What keeps the load even: the balance losses against their formulas, how they reach the router, and the bias."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.models.moe.layer import COUNTS, balance_loss
from tests.models.moe.moe_parts import build, counted, distance, tokens


def formula(scores, ids, n_experts, top_k):
    """Sum over experts of f P, expert by expert: DeepSeekMoE, equations 12 to 14, with scores that sum to one."""
    total, n_tokens = 0, len(scores)
    for e in range(n_experts):
        f = n_experts / (top_k * n_tokens) * sum(e in chosen for chosen in ids)
        p = sum(s[e] / s.sum() for s in scores) / n_tokens
        total = total + f * p
    return total


class TestBalanceLoss:
    def test_is_one_when_the_load_is_even(self):
        scores = torch.rand(3, 10, 8)
        assert balance_loss(scores, torch.full((3, 8), 10 * 2 // 8 + 0.5), 2).item() == pytest.approx(1, abs=1e-6)

    def test_is_one_when_the_scores_are_even(self):
        load = torch.tensor([[20, 0, 0, 0], [5, 5, 5, 5]])
        assert balance_loss(torch.full((2, 10, 4), 0.3), load, 2).item() == pytest.approx(1)

    def test_is_experts_over_top_k_when_all_go_to_the_same(self):
        scores = torch.tensor([0.5, 0.5, 0, 0]).expand(1, 10, 4)
        assert balance_loss(scores, torch.tensor([[10, 10, 0, 0]]), 2).item() == pytest.approx(4 / 2)

    def test_by_hand(self):
        """Two sequences of two tokens, three experts, one each; the second's scores do not sum to one."""
        scores = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]], [[0.8, 0.8, 0.4], [0.1, 0.2, 0.1]]])
        load = torch.tensor([[2, 0, 0], [1, 1, 0]])
        first = 3 / 2 * 2 * (0.5 + 0.6) / 2
        second = 3 / 2 * 1 * (0.4 + 0.25) / 2 + 3 / 2 * 1 * (0.4 + 0.5) / 2
        assert balance_loss(scores, load, 1).item() == pytest.approx((first + second) / 2)

    def test_the_gradient_lowers_the_scores_of_the_overloaded(self):
        logits = torch.zeros(1, 10, 4, requires_grad=True)
        balance_loss(logits.softmax(-1), torch.tensor([[14, 2, 2, 2]]), 2).backward()
        assert torch.all(logits.grad[..., 0] > 0) and torch.all(logits.grad[..., 1:] < 0)


LOSSES = {
    "batch": {"balance": "aux_loss", "aux_loss_weight": 0.3},
    "batch, sigmoid": {"balance": "aux_loss", "aux_loss_weight": 0.3, "score": "sigmoid"},
    "sequence": {"balance": "bias", "sequence_loss_weight": 0.7, "score": "sigmoid"},
    "both": {"balance": "aux_loss", "aux_loss_weight": 0.3, "sequence_loss_weight": 0.7},
    "grouped": {"balance": "aux_loss", "aux_loss_weight": 0.3, "n_groups": 4, "top_k_groups": 2},
    "dropping": {"balance": "aux_loss", "aux_loss_weight": 0.3, "capacity_factor": 0.5},
}


def explicit_loss(layer, x, case):
    """The weighted balance losses by the formula: one batch, or the mean over the sequences."""
    total = 0
    if case["balance"] == "aux_loss":
        routing = layer.router(x.flatten(0, 1))
        total = 0.3 * formula(routing.scores_TE, routing.ids_TK.tolist(), 8, 2)
    for sequence in x if "sequence_loss_weight" in case else ():
        routing = layer.router(sequence)
        total = total + 0.7 * formula(routing.scores_TE, routing.ids_TK.tolist(), 8, 2) / len(x)
    return total


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_tied_loss_is_the_loss_added_to_the_models(case, scale):
    """Same gradients of the router and of x as (model's loss + loss_scale * balance loss).backward()."""
    tied, apart = build(**case), build(**case | {"balance": "none", "sequence_loss_weight": 0.0})
    tied.loss_scale = scale
    xs = [tokens(3, 8).requires_grad_() for _ in range(2)]
    y, counts = tied(xs[0])
    (1e-4 * y.square().mean()).backward()
    z, _ = apart(xs[1])
    loss = explicit_loss(apart, xs[1], case)
    (1e-4 * z.square().mean() + scale * loss).backward()
    assert torch.equal(y, z)
    assert distance(tied.router.weight.grad, apart.router.weight.grad) < 1e-12
    assert distance(xs[0].grad, xs[1].grad) < 1e-12
    assert counted(counts, "balance_loss") == pytest.approx([loss.item()])  # what is logged is weighted, and not scaled
    plain = build(**case | {"balance": "none", "sequence_loss_weight": 0.0})
    (1e-4 * plain(tokens(3, 8))[0].square().mean()).backward()
    assert distance(tied.router.weight.grad, plain.router.weight.grad) > 0.1


def test_a_loss_is_neither_computed_nor_tied_outside_of_training():
    layer, x = build(balance="aux_loss", sequence_loss_weight=1.0).eval(), tokens()
    y, counts = layer(x)
    assert counted(counts, "balance_loss") == [0]
    y.sum().backward()
    plain = build()
    plain(x)[0].sum().backward()
    assert torch.equal(layer.router.weight.grad, plain.router.weight.grad)


class TestBias:
    def test_moves_by_the_rate_towards_the_mean(self):
        layer = build(torch.float32, balance="bias", bias_update_rate=0.01)
        layer.record(torch.tensor([9.0, 1, 5, 5, 6, 4, 10, 0] + [0] * len(COUNTS), dtype=torch.float64))
        layer.update_bias()
        step = [-0.01, 0.01, 0, 0, -0.01, 0.01, -0.01, 0.01]
        assert layer.router.bias.tolist() == pytest.approx(step)
        layer.update_bias()
        assert layer.router.bias.tolist() == pytest.approx([2 * s for s in step])

    def test_even_loads_move_nothing(self):
        layer = build(torch.float32, balance="bias")
        layer.record(torch.full((8 + len(COUNTS),), 3.0, dtype=torch.float64))
        layer.update_bias()
        assert torch.all(layer.router.bias == 0)

    def test_the_mean_is_that_of_the_experts_domain(self):
        layer = build(torch.float32, balance="bias", bias_update_rate=0.01, domains=["general", "law"])
        layer.record(torch.tensor([90.0, 110, 100, 100, 1, 3, 2, 2] + [0] * len(COUNTS), dtype=torch.float64))
        layer.update_bias()
        assert layer.router.bias.tolist() == pytest.approx([0.01, -0.01, 0, 0, 0.01, -0.01, 0, 0])

    def test_a_model_without_it_has_none(self):
        layer = build(balance="aux_loss")
        layer.update_bias()
        assert layer.router.bias is None and "router.bias" not in layer.state_dict()

    def test_it_is_part_of_the_weights_and_no_parameter(self):
        layer = build(balance="bias")
        assert "router.bias" in layer.state_dict() and "router.bias" not in dict(layer.named_parameters())

    def test_it_evens_out_a_skewed_load(self):
        layer = build(torch.float32, balance="bias", bias_update_rate=0.01, score="sigmoid").eval()
        with torch.no_grad():
            layer.router.weight[:2] += 0.1
        x, worst = tokens(8, 64, torch.float32).abs(), []
        for _ in range(120):
            layer.reset_counts()
            layer.record(layer(x)[1])
            worst.append((layer.counts[:8].max() / layer.counts[:8].mean()).item())
            layer.update_bias()
        assert worst[0] > 2 and worst[-1] < 1.3
