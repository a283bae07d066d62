"""Multi-head latent attention against its formula head by head, and its cache against computing all anew."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer, init_weights
from deepseek_exp.models.mla import LatentAttention
from deepseek_exp.planner.cost import cache_bytes_per_token
from tests.config.test_config import composed

TINY = composed("model=v3_moe", "size=tiny").model
GATED = {"window": 5, "n_global_tokens": 2}


def latent_attention(seed=0, **changes) -> LatentAttention:
    layer = LatentAttention(dataclasses.replace(TINY, **changes), TORCH).double()
    for i, p in enumerate(layer.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(100 * seed + i))
    return layer


def hidden(batch, seq, seed=0):
    return torch.randn(batch, seq, TINY.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + TINY.norm_eps).sqrt() * weight


def turned(x, position):
    """Pairs half a head apart turned by position * theta^(-2i / width), as complex numbers."""
    half = x.shape[-1] // 2
    angle = position * TINY.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def by_formula(layer: LatentAttention, x, memory=None):
    """The paper's equations for every query, head and key, one after the other (DeepSeek-V2, section 2.1)."""
    cfg, rows = layer.cfg, []
    nope, rope, v_dim = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    context = x if memory is None else torch.cat([memory, x], 1)
    n_memory = context.shape[1] - x.shape[1]
    w_kv = layer.wkv_b.weight.view(cfg.n_heads, nope + v_dim, cfg.kv_lora_rank)
    for b in range(len(x)):
        keys = [layer.wkv_a.weight @ t for t in context[b]]
        latents = [norm(c[: cfg.kv_lora_rank], layer.kv_norm.weight) for c in keys]
        shared = [turned(c[cfg.kv_lora_rank :], j) for j, c in enumerate(keys)]
        for i in range(n_memory, context.shape[1]):
            if cfg.q_lora_rank:
                q = layer.wq_b.weight @ norm(layer.wq_a.weight @ context[b, i], layer.q_norm.weight)
            else:
                q = layer.wq.weight @ context[b, i]
            heads = []
            for h, q_h in enumerate(q.view(cfg.n_heads, nope + rope)):
                scores, values = [], []
                for j in range(i + 1):
                    is_global = n_memory <= j < n_memory + cfg.n_global_tokens
                    if cfg.window and i - j >= cfg.window and not is_global:
                        continue
                    k = torch.cat([w_kv[h, :nope] @ latents[j], shared[j]])
                    score = torch.cat([q_h[:nope], turned(q_h[nope:], i)]) @ k / math.sqrt(nope + rope)
                    if layer.gate is not None:
                        score = score + torch.nn.functional.logsigmoid(layer.gate[h] * (-1 if is_global else 1))
                    scores.append(score)
                    values.append(w_kv[h, nope:] @ latents[j])
                heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
            rows.append(layer.wo.weight @ torch.cat(heads))
    return torch.stack(rows).view_as(x)


CASES = {
    "plain": ({}, 0),
    "queries without a latent": ({"q_lora_rank": 0}, 0),
    "wide values": ({"v_head_dim": 24, "qk_nope_head_dim": 8}, 0),
    "window": ({"window": 3}, 0),
    "window and gate": (GATED, 0),
    "window, gate and memory": (GATED, 4),
}


@pytest.mark.parametrize(("changes", "n_memory"), CASES.values(), ids=CASES)
def test_is_its_formula_with_every_gradient(changes, n_memory):
    layer, x = latent_attention(**changes), hidden(2, 7)
    memory = hidden(2, n_memory, seed=1) if n_memory else None
    results = []
    for forward in (layer, lambda *a: by_formula(layer, *a)):
        x = x.detach().requires_grad_()
        y = forward(x, memory)
        grads = torch.autograd.grad((y * hidden(2, 7, seed=2)).sum(), [x, *layer.parameters()])
        results.append([y.detach(), *grads])
    for got, want in zip(*results, strict=True):  # angles are rounded to fp32 once
        assert (got - want).norm() / want.norm() < 1e-6


SPLITS = [[12], [1] * 12, [5, 1, 1, 5], [1, 11], [11, 1], [4, 4, 4], [3, 2, 7]]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": 0, "v_head_dim": 24}, {"window": 3}, GATED], ids=str)
def test_cached_equals_uncached(changes, split):
    layer, x = latent_attention(**changes), hidden(2, 12)
    cache = layer.new_cache(2, 12, layer.wkv_b.weight)
    with torch.no_grad():
        parts = [layer(part, None, cache) for part in x.split(split, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-10, atol=1e-10)


def test_cached_is_absorbed_and_makes_no_old_key_again():
    layer, x = latent_attention(), hidden(2, 12)
    cache, expanded = layer.new_cache(2, 12, layer.wkv_b.weight), layer.wkv_b.forward
    with torch.no_grad():
        layer(x[:, :11], None, cache)
        layer.wkv_b.forward = None  # calling it would raise
        y = layer(x[:, 11:], None, cache)
        layer.wkv_b.forward = expanded
        torch.testing.assert_close(y, layer(x)[:, 11:], rtol=1e-10, atol=1e-10)


def test_a_full_cache_says_so():
    layer = latent_attention()
    with torch.no_grad(), pytest.raises(ValueError, match="cache of 4 tokens is too short for 5"):
        layer(hidden(1, 5), None, layer.new_cache(1, 4, layer.wkv_b.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["v1_dense", "v3_moe", "deepseek_v3"])
def test_the_caches_take_what_the_planner_says(model, dtype):
    cfg = composed(f"model={model}", "size=tiny").model
    built = Transformer(cfg, TORCH)
    init_weights(built, cfg, 0)
    caches = built.to(dtype).new_caches(3, 10)
    size = torch.finfo(dtype).bits // 8
    assert sum(c.bytes_per_token for c in caches) == cache_bytes_per_token(cfg, size)
    stored = sum(t.numel() * t.element_size() for c in caches for t in (c.k, c.v))
    assert stored == 3 * 10 * cache_bytes_per_token(cfg, size)
    if model != "v1_dense":
        as_mha = 2 * cfg.n_layers * cfg.n_heads * cfg.v_head_dim * size
        assert sum(c.bytes_per_token for c in caches) < as_mha


def test_bf16_cache_is_near_the_uncached():
    """Absorbing rounds in other places: errors of both against float64 are of one size."""
    layer, x = latent_attention(**GATED), hidden(2, 12)
    with torch.no_grad():
        x = x.bfloat16()
        layer.bfloat16()
        cache = layer.new_cache(2, 12, layer.wkv_b.weight)
        cached = torch.cat([layer(part, None, cache) for part in x.split([5, 1, 6], dim=1)], 1).double()
        uncached = layer(x).double()
        exact = layer.double()(x.double())
    assert (cached - exact).norm() <= 2 * (uncached - exact).norm()
