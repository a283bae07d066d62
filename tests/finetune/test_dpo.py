"""Preference losses against their formulas, and their gradients through the head against plain autograd."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from deepseek_exp.config import DPOConfig, PreferenceLoss
from deepseek_exp.finetune.dpo import PreferenceObjective
from deepseek_exp.finetune.log_probs import loss_through_head
from deepseek_exp.finetune.preference_loss import accuracy, preference_loss
from deepseek_exp.models import MicroBatch
from tests.models.test_transformer import build, some_tokens

POLICY = torch.tensor([[-3.0, -5.0], [-8.0, -2.5], [-1.0, -1.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-4.0, -4.5], [-7.0, -3.5], [-1.0, -1.0]], dtype=torch.float64)
N_TOKENS = torch.tensor([[3, 5], [4, 2], [2, 2]])


def cfg_of(loss="dpo", beta=0.2, label_smoothing=0.0):
    return DPOConfig(loss=PreferenceLoss(loss), beta=beta, label_smoothing=label_smoothing, reference=None)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo():
    found = preference_loss(cfg_of(), POLICY, REFERENCE, N_TOKENS)
    margins = [0.2 * (1.0 - -0.5), 0.2 * (-1.0 - 1.0), 0.0]
    assert found.loss.tolist() == pytest.approx([-math.log(sigmoid(m)) for m in margins], rel=1e-12)
    assert found.rewards.tolist() == [pytest.approx(row) for row in ([0.2, -0.1], [-0.2, 0.2], [0.0, 0.0])]
    assert accuracy(found.rewards).tolist() == [1.0, 0.0, 0.5]


def test_label_smoothing():
    found = preference_loss(cfg_of(label_smoothing=0.1), POLICY, REFERENCE, N_TOKENS).loss[0].item()
    assert found == pytest.approx(-0.9 * math.log(sigmoid(0.3)) - 0.1 * math.log(sigmoid(-0.3)), rel=1e-12)


def test_ipo():
    found = preference_loss(cfg_of("ipo"), POLICY, REFERENCE, N_TOKENS)
    wanted = [(1.0 / 3 - -0.5 / 5 - 2.5) ** 2, (-1.0 / 4 - 1.0 / 2 - 2.5) ** 2, 2.5**2]
    assert found.loss.tolist() == pytest.approx(wanted, rel=1e-12)


def test_orpo():
    found = preference_loss(cfg_of("orpo"), POLICY, REFERENCE, N_TOKENS)
    for i in range(3):
        chosen, rejected = (POLICY[i] / N_TOKENS[i]).exp().tolist()
        log_odds = math.log(chosen / (1 - chosen)) - math.log(rejected / (1 - rejected))
        wanted = -math.log(chosen) - 0.2 * math.log(sigmoid(log_odds))
        assert found.loss[i].item() == pytest.approx(wanted, rel=1e-12)


def test_orpo_of_certain_and_hopeless_completions_is_finite():
    policy = torch.tensor([[-1e-9, -1e4], [-1e4, -1e-9]], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(cfg_of("orpo"), policy, policy.detach(), torch.ones(2, 2)).loss
    loss.sum().backward()
    assert loss.isfinite().all() and policy.grad.isfinite().all()


def pairs(n=4, seq=20):
    """Return tokens of n pairs with masks of different lengths, and reference log-probabilities."""
    tokens = some_tokens(2 * n, seq + 1)
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(2, 8, (2 * n, 1), generator=generator)
    last = first + torch.randint(1, 10, (2 * n, 1), generator=generator)
    place = torch.arange(seq)
    mask = (place >= first) & (place < last)
    reference = -torch.rand(2 * n, generator=generator, dtype=torch.float64) * 50 - 20
    return tokens, mask, reference


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo"])
def test_gradients_are_those_of_plain_autograd(loss):
    model, cfg = build(torch.float64, init_std=0.2), cfg_of(loss, 0.3)
    tokens, mask, reference = pairs()
    found = PreferenceObjective(cfg).from_tokens(model, MicroBatch(tokens, None, mask, reference=reference))
    found.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    log_probs = -F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    policy = (log_probs.view(8, 20) * mask).sum(1).view(4, 2)
    each = preference_loss(cfg, policy, reference.view(4, 2), mask.sum(1).view(4, 2))
    each.loss.mean().backward()
    torch.testing.assert_close(found.loss.double(), each.loss.mean(), rtol=1e-6, atol=1e-7)
    wanted = [each.loss.sum(), accuracy(each.rewards).sum(), (each.rewards[:, 0] - each.rewards[:, 1]).sum()]
    torch.testing.assert_close(found.sums[:3], torch.stack(wanted).detach(), rtol=1e-9, atol=1e-9)
    assert found.sums[-1] == 4
    torch.testing.assert_close(-found.nll, (log_probs.view(8, 20) * mask).detach(), rtol=1e-9, atol=1e-9)
    for mine, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-6, atol=1e-9)


def test_micro_batches_of_one_and_of_four_pairs_are_equal():
    model, objective = build(torch.float64, init_std=0.2), PreferenceObjective(cfg_of())
    tokens, mask, reference = pairs()

    def gradients(rows):
        model.zero_grad()
        total = 0.0
        for i in range(0, 8, rows):
            part = slice(i, i + rows)
            batch = MicroBatch(tokens[part], None, mask[part], reference=reference[part])
            losses = objective.from_tokens(model, batch)
            (losses.loss * rows / 8).backward()
            total += losses.sums[0].item()
        return total, [p.grad.clone() for p in model.parameters()]

    (one, found), (four, wanted) = gradients(2), gradients(8)
    assert one == pytest.approx(four, rel=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_padding_does_not_count():
    model, objective = build(), PreferenceObjective(cfg_of())
    tokens, mask, reference = pairs()
    with torch.no_grad():
        whole = objective.from_tokens(model, MicroBatch(tokens[:4], None, mask[:4], reference=reference[:4]))
        mask[4:] = False
        padded = objective.from_tokens(model, MicroBatch(tokens, None, mask, reference=reference))
    torch.testing.assert_close(padded.sums, whole.sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded.loss, whole.loss, rtol=1e-5, atol=1e-6)


def test_without_gradient_the_head_runs_once():
    calls = []

    class Head:
        def loss(self, h, targets, token_weights=None):
            calls.append(token_weights)
            return h.sum(), h.detach()

    with torch.no_grad():
        loss, found, log_probs = loss_through_head(Head(), torch.ones(2, 3), None, lambda p: (p.sum(), "x"))
    assert (loss.item(), found, log_probs.tolist(), calls) == (-6.0, "x", [[-1.0] * 3] * 2, [None])
    assert dataclasses.is_dataclass(DPOConfig)
