"""Whole models of the fused kernels against the same models of PyTorch's."""

from __future__ import annotations

import functools

import pytest
import torch

from deepseek_exp.config import ActivationCheckpointing
from deepseek_exp.kernels import TORCH, resolve
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed

MODELS = ("v1_dense", "v2_moe", "v2_5_sparse", "v3_moe", "v4_distill", "v5_domain_moe", "deepseek_v3")


def gradients(cfg, ops, checkpointing=ActivationCheckpointing.none, *, compiled=False):
    """Give the nll of a micro batch and every parameter's gradient."""
    torch.manual_seed(0)
    model = Transformer(cfg, ops, checkpointing)
    init_weights(model, cfg, 0)
    tokens = torch.randint(0, cfg.vocab_size, (2, 21))
    losses = torch.compile(model.losses, backend="aot_eager", fullgraph=True) if compiled else model.losses
    (mean, nll), ahead = losses(tokens)
    sum(x for x, _ in ((mean, nll), *ahead)).backward()
    return {"nll": nll, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def assert_same(found, wanted):
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 2e-5 * value.abs().max() + 1e-9, name


def fused(version):
    return composed(f"model={version}", "size=tiny", "model.n_layers=2", "kernels=fused", "do=plan")


@functools.cache
def fused_gradients(version):
    exp = fused(version)
    return gradients(exp.model, resolve(exp.kernels))


QUICK = ("v1_dense", "v3_moe")  # with all kernels between them


@pytest.mark.parametrize("version", [v if v in QUICK else pytest.param(v, marks=pytest.mark.long) for v in MODELS])
def test_every_version(version):
    assert_same(fused_gradients(version), gradients(fused(version).model, TORCH))


def test_heads_with_norms_and_biases():
    changes = ("model.qk_norm=true", "model.qkv_bias=true", "model.n_kv_heads=1", "model.rotary_dim=8")
    changes = (*changes, "model.sandwich_norm=true")
    exp = composed("model=v4_distill", "size=tiny", "model.n_layers=2", "kernels=fused", "do=plan", *changes)
    assert_same(gradients(exp.model, resolve(exp.kernels)), gradients(exp.model, TORCH))


@pytest.mark.parametrize("version", ["v1_dense", pytest.param("v3_moe", marks=pytest.mark.long)])
def test_compiled_without_a_break(version):
    exp = fused(version)
    assert_same(gradients(exp.model, resolve(exp.kernels), compiled=True), gradients(exp.model, TORCH))


@pytest.mark.parametrize(
    "checkpointing",
    [
        pytest.param(c, marks=pytest.mark.long if c is ActivationCheckpointing.selective else [])
        for c in ActivationCheckpointing
    ],
)
def test_compiled_with_checkpointing(checkpointing):
    model = composed("size=tiny", "model.n_layers=2", "do=plan").model
    assert_same(gradients(model, TORCH, checkpointing, compiled=True), gradients(model, TORCH))


@pytest.mark.parametrize("version", [pytest.param("v1_dense", marks=pytest.mark.long), "v3_moe"])
@pytest.mark.parametrize("checkpointing", [ActivationCheckpointing.selective, ActivationCheckpointing.full])
def test_what_is_computed_again_is_the_same(version, checkpointing):
    exp, wanted = fused(version), fused_gradients(version)
    found = gradients(exp.model, resolve(exp.kernels), checkpointing)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
