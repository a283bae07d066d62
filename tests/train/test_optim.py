"""Parameter groups, fp32 master weights, the schedule and clipping."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch

from deepseek_exp.config import DecayShape
from deepseek_exp.kernels import reference
from deepseek_exp.train.optim import MasterWeights, build_optimizer, clip_gradients
from deepseek_exp.train.schedule import lr_factor, schedule_of, wsd_factor
from tests.config.test_config import composed
from tests.models.test_transformer import build, some_tokens

CFG = composed("size=tiny", "optim.lr=0.01").optim


def backward(model, seed=0, share=1.0):
    tokens = some_tokens(seed=seed)
    (reference.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:]).mean() * share).backward()


def test_matrices_decay_and_vectors_do_not():
    model = build()
    groups = build_optimizer(CFG, model).param_groups
    assert [g["weight_decay"] for g in groups] == [CFG.weight_decay, 0.0]
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in groups[1]["params"]} == {
        "attention_norm",
        "feed_forward_norm",
        "norm",
        "attention",
    }
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_the_configured_class_and_arguments_are_used():
    optimizer = build_optimizer(CFG, build())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert tuple(optimizer.defaults["betas"]) == (0.9, 0.95) and optimizer.defaults["lr"] == 0.01
    assert isinstance(build_optimizer(composed("optim=adafactor").optim, build()), torch.optim.Adafactor)


class TestMasterWeights:
    def test_are_used_for_bf16_alone(self):
        assert isinstance(build_optimizer(CFG, build(torch.bfloat16)), MasterWeights)
        assert not isinstance(build_optimizer(CFG, build()), MasterWeights)

    def test_updates_too_small_for_bf16_add_up(self):
        model = build(torch.bfloat16)
        cfg = dataclasses.replace(CFG, lr=1e-5, weight_decay=0.0)
        optimizer = build_optimizer(cfg, model)
        weight = model.blocks[0].attention_norm.weight  # ones: bf16 has no number between 1 and 1 + 2^-7
        before = [m.clone() for m in optimizer.masters]
        for step in range(20):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.all(weight == 1)
        moved = max(
            (a - b).abs().max() for a, b in zip(before, optimizer.masters, strict=True) if b.shape == weight.shape
        )
        assert 5e-5 < moved < 3e-4

    def test_gradients_accumulate_in_fp32(self):
        """Eight micro batches against the exact sum of their bf16 gradients; a bf16 sum rounds at each addition."""
        alone, summed, model = (build(torch.bfloat16) for _ in range(3))
        optimizer = build_optimizer(CFG, model)
        exact = [torch.zeros_like(p, dtype=torch.float64) for p in alone.parameters()]
        for seed in range(8):
            for m in (alone, summed, model):
                backward(m, seed)
            for total, p in zip(exact, alone.parameters(), strict=True):
                total += p.grad.double()
            alone.zero_grad()
        of_param = {id(p): m.grad for p, m in zip(optimizer.params, optimizer.masters, strict=True)}

        def error(grads):
            return max(((g.double() - e).abs().max() / e.abs().max()).item() for g, e in zip(grads, exact, strict=True))

        assert all(p.grad is None for p in model.parameters())
        assert error(of_param[id(p)] for p in model.parameters()) < 1e-6
        assert error(p.grad for p in summed.parameters()) > 1e-3

    def test_parameters_are_the_rounded_masters(self):
        model = build(torch.bfloat16)
        optimizer = build_optimizer(CFG, model)
        backward(model)
        optimizer.step()
        for p, master in zip(optimizer.params, optimizer.masters, strict=True):
            assert torch.equal(p, master.bfloat16())

    def test_state_round_trips(self):
        a, b = build(torch.bfloat16), build(torch.bfloat16, seed=9)
        first, second = build_optimizer(CFG, a), build_optimizer(CFG, b)
        for seed in range(3):
            backward(a, seed)
            first.step()
            first.zero_grad()
        b.load_state_dict(a.state_dict())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for model, optimizer in ((a, first), (b, second)):
            backward(model, 7)
            optimizer.step()
        assert all(torch.equal(x, y) for x, y in zip(first.masters, second.masters, strict=True))


class TestSchedule:
    def test_warms_up_to_the_peak_and_falls_to_the_ratio(self):
        factors = [lr_factor(s, 10, 100, 0.1) for s in range(101)]
        assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
        assert factors[55] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)
        assert all(a >= b for a, b in itertools.pairwise(factors[10:]))

    def test_no_warm_up(self):
        assert lr_factor(0, 0, 10, 0.0) == 1.0

    def test_is_the_cosine(self):
        assert lr_factor(25, 0, 100, 0.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)

    def test_wsd_stays_at_the_peak_and_falls_at_the_end(self):
        factors = [wsd_factor(s, 10, 100, 0.1, 0.2, DecayShape.linear) for s in range(101)]
        assert factors[:10] == [lr_factor(s, 10, 100, 0.1) for s in range(10)]
        assert factors[10:81] == [1.0] * 71 and factors[90::10] == pytest.approx([0.55, 0.1])

    def test_wsd_before_the_decay_does_not_know_the_length(self):
        short, long = ([wsd_factor(s, 5, n, 0.0, 0.25, DecayShape.sqrt) for s in range(61)] for n in (80, 800))
        assert short == long

    @pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.75), ("sqrt", 0.5), ("cosine", (2 + 2**0.5) / 4)])
    def test_shapes_of_the_decay(self, shape, quarter):
        factors = [wsd_factor(s, 0, 40, 0.0, 1.0, DecayShape(shape)) for s in range(41)]
        assert (factors[0], factors[40]) == (1.0, 0.0) and factors[10] == pytest.approx(quarter)

    def test_the_configuration_chooses(self):
        wsd = schedule_of(composed("optim=wsd", "optim.warmup_steps=1").optim, 100)
        assert (wsd(50), wsd(80), wsd(100)) == (1.0, 1.0, 0.0) and wsd(85) == pytest.approx(0.5)
        cosine = schedule_of(dataclasses.replace(CFG, warmup_steps=10), 100)
        assert [cosine(s) for s in range(101)] == [lr_factor(s, 10, 100, CFG.min_lr_ratio) for s in range(101)]


def test_factors_on_the_learning_rate_make_groups():
    cfg = dataclasses.replace(CFG, lr_multipliers={"embedding.*": 0.1, "*norm*": 0.5})
    groups = build_optimizer(cfg, build()).param_groups
    found = {(g["decays"], g["lr_multiplier"]): (g["lr"], g["weight_decay"], g["param_names"]) for g in groups}
    assert found[True, 0.1][0] == pytest.approx(0.001) and found[True, 0.1][2] == ["embedding.weight"]
    assert found[True, 1.0][:2] == (0.01, cfg.weight_decay) and found[False, 0.5][:2] == (0.005, 0.0)
    assert sum(len(names) for _, _, names in found.values()) == len(list(build().parameters()))


def test_clipping_scales_all_gradients_together():
    model = build()
    optimizer = build_optimizer(CFG, model)
    backward(model)
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert clip_gradients(optimizer, 0).item() == pytest.approx(norm, rel=1e-5)
    clip_gradients(optimizer, norm / 3)
    after = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert after == pytest.approx(norm / 3, rel=1e-4)
    clip_gradients(optimizer, norm)  # they are within the bound, and not scaled up to it
    assert math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters())) == after
