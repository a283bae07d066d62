"""Muon against PyTorch's on the same matrices, and AdamW for all that is no matrix of a block."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.optim import _muon

from deepseek_exp.train import muon
from deepseek_exp.train.muon import Muon, orthogonalize
from deepseek_exp.train.optim import MasterWeights, build_optimizer
from tests.config.test_config import composed
from tests.models.test_transformer import build, some_tokens

CFG = composed("optim=muon", "size=tiny").optim


def matrices(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    x = matrices(*shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = torch.linalg.svdvals(orthogonalize(x, 5))
    assert found.min() > 0.6 and found.max() < 1.3
    aligned = u.mT @ orthogonalize(x, 5) @ vh.mT  # diagonal if the singular vectors are the same
    assert (aligned - aligned.diag().diag()).abs().max() < 1e-4


def test_the_iteration_is_pytorchs():
    x = matrices(24, 64)
    theirs = _muon._zeropower_via_newtonschulz(x, muon.QUINTIC, 5, 1e-7).float()  # in bf16
    exact = orthogonalize(x.double(), 5).float()
    ours = orthogonalize(x.bfloat16(), 5).float()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert (orthogonalize(x, 5) - exact).abs().max() < 1e-5


def test_each_expert_is_orthogonalized_alone():
    stack = matrices(3, 8, 16) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    alone = torch.stack([orthogonalize(x, 5) for x in stack])
    assert (orthogonalize(stack, 5) - alone).abs().max() < 1e-6


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torch_optim_muon_and_adamw(nesterov, monkeypatch):
    """In fp32, to which PyTorch's iteration is lifted for the comparison."""
    fp32 = lambda g, coefficients, steps, eps: orthogonalize(g, steps)  # noqa: E731
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", fp32)
    monkeypatch.setattr(muon, "CHUNK", 24 * 64)  # one matrix at a time
    start = [matrices(24, 64), matrices(24, 64, seed=1), matrices(64, 24, seed=2), matrices(5, seed=3)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    mine = Muon(
        [{"params": ours[:3], "orthogonal": True}, {"params": ours[3:]}], lr=0.1, weight_decay=0.3, nesterov=nesterov
    )
    others = [
        torch.optim.Muon(theirs[:3], 0.1, 0.3, 0.95, nesterov, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[3:], 0.1, (0.9, 0.95), 1e-8, 0.3),
    ]
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = matrices(*a.shape, seed=10 + step)
            b.grad = a.grad.clone()
        mine.step()
        for other in others:
            other.step()
    assert all((a - b).abs().max() < 2e-6 for a, b in zip(ours, theirs, strict=True))
    assert not any(torch.equal(a, x) for a, x in zip(ours, start, strict=True))


def test_blocks_have_one_moment_and_the_rest_two():
    model = build()
    optimizer = build_optimizer(CFG, model)
    tokens = some_tokens()
    model(tokens).square().mean().backward()
    optimizer.step()
    kinds = {name: set(optimizer.state[p]) - {"step"} for name, p in model.named_parameters()}
    two, one = {"exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
    assert kinds["blocks.0.attention.wq.weight"] == kinds["blocks.1.feed_forward.w_down.weight"] == one
    assert kinds["embedding.weight"] == kinds["head.norm.weight"] == kinds["blocks.0.attention_norm.weight"] == two


def test_masters_are_stepped_in_fp32():
    model = build(torch.bfloat16)
    optimizer = build_optimizer(dataclasses.replace(CFG, lr=1e-4), model)
    assert isinstance(optimizer, MasterWeights) and isinstance(optimizer.inner, Muon)
    model(some_tokens()).float().square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, master.bfloat16()) for p, master in zip(optimizer.params, optimizer.masters, strict=True))
    assert {s["momentum_buffer"].dtype for s in optimizer.state.values() if "momentum_buffer" in s} == {torch.float32}


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"not for a parameter of shape \(5,\)"):
        Muon([{"params": [torch.nn.Parameter(torch.ones(5))], "orthogonal": True}])
