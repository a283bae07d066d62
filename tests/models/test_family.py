"""What holds for every version: generation with a cache, initialisation, recomputed blocks, compilation, counts."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from deepseek_exp.config import ActivationCheckpointing
from deepseek_exp.inference import generate
from deepseek_exp.kernels import TORCH, reference
from deepseek_exp.models import Transformer, init_weights
from deepseek_exp.models.moe import MoE
from deepseek_exp.models.moe.layer import COUNTS
from tests.config.test_config import MODELS, composed

DEFINITION = dataclasses.replace(TORCH, grouped_mm=reference.grouped_mm)


@functools.cache
def config(version: str):
    return composed(f"model={version}", "size=tiny").model


def build(
    version, dtype=torch.float32, seed=0, ops=TORCH, checkpointing=ActivationCheckpointing.none, **changes
) -> Transformer:
    cfg = dataclasses.replace(config(version), **changes)
    model = Transformer(cfg, ops, checkpointing)
    for p in model.parameters():  # counts and biases keep their types
        p.data = p.data.to(dtype)
    init_weights(model, cfg, seed)
    for i, (name, p) in enumerate(model.named_parameters()):
        if name.endswith("attention.gate"):  # gates start at 0, where they do nothing
            torch.nn.init.normal_(p, std=2.0, generator=torch.Generator().manual_seed(i))
    return model


def some_tokens(batch=2, seq=48, seed=0):
    return torch.randint(0, 512, (batch, seq), generator=torch.Generator().manual_seed(seed))


def experts_of(model):
    return [m for m in model.modules() if isinstance(m, MoE)]


VERSIONS = [(v, {}) for v in MODELS] + [
    ("v1_dense", {"memory_len": 7, "window": 8}),
    ("v3_moe", {"memory_len": 7, "window": 8, "n_global_tokens": 2}),
    ("deepseek_v3", {"window": 5, "q_lora_rank": 0}),
]


@pytest.mark.parametrize(("version", "changes"), VERSIONS, ids=str)
class TestGeneration:
    def test_cached_logits_equal_uncached(self, version, changes):
        model = build(version, torch.float64, ops=DEFINITION, init_std=0.2, **changes).eval()
        tokens, caches = some_tokens(2, 40), None
        with torch.inference_mode():
            for split in ([17, 1, 1, 5, 16], [1] * 3 + [37], [40]):
                caches = model.new_caches(2, 40)
                parts = [model(part, caches) for part in tokens.split(split, dim=1)]
                torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-8, atol=1e-8)

    def test_cached_text_equals_uncached(self, version, changes):
        model = build(version, init_std=0.3, **changes).eval()
        texts = [
            generate(model, [5, 6, 7], max_new_tokens=40, temperature=0, top_p=1.0, seed=3, end_id=-1, use_cache=cache)
            for cache in (True, False)
        ]
        assert texts[0] == texts[1] and len(texts[0]) == 40 and len(set(texts[0])) > 1


@pytest.mark.parametrize("version", MODELS)
class TestInitialisation:
    def test_sets_every_parameter(self, version):
        cfg = config(version)
        model = Transformer(cfg, TORCH)
        for p in model.parameters():
            torch.nn.init.constant_(p, float("nan"))
        init_weights(model, cfg, 0)
        assert [n for n, p in model.named_parameters() if p.isnan().any()] == []
        assert [n for n, b in model.named_buffers() if not b.isfinite().all()] == []

    def test_depends_on_seed_and_name_alone(self, version):
        a, b, c = (dict(build(version, seed=s).named_parameters()) for s in (1, 1, 2))
        assert all(torch.equal(a[n], b[n]) for n in a)
        drawn = [n for n, p in a.items() if p.ndim > 1]
        assert not any(torch.equal(a[n], c[n]) for n in drawn)
        assert len({a[n].flatten()[0].item() for n in drawn}) == len(drawn)  # no two are the same draw
        deeper = dict(build(version, seed=1, n_layers=3, moe=config(version).moe).named_parameters())
        scaled = [n for n in drawn if n.endswith(("wo.weight", "w_down.weight", "experts.w_down"))]
        shared = set(deeper) & set(drawn) - set(scaled)
        assert all(torch.equal(a[n], deeper[n]) for n in shared)

    def test_deviations(self, version):
        model, cfg = build(version), config(version)
        found = {"residual": 0, "other": 0}
        for name, p in model.named_parameters():
            if p.ndim == 1 or p.numel() < 4000:
                continue
            writes = name.split(".")[-1] == "w_down" or name.split(".")[-2] in ("wo", "w_down")
            found["residual" if writes else "other"] += 1
            want = 0.02 / (2 * cfg.n_layers) ** 0.5 if writes else 0.02
            assert p.std().item() == pytest.approx(want, rel=0.05), name
        assert min(found.values()) > 0

    def test_scales_start_at_one_and_biases_at_zero(self, version):
        cfg = config(version)
        extra = {"qkv_bias": True, "qk_norm": True} if cfg.attention == "gqa" else {}
        model = Transformer(cfg := dataclasses.replace(cfg, **extra), TORCH)
        init_weights(model, cfg, 0)
        for name, p in model.named_parameters():
            if p.ndim == 1:
                assert torch.all(p == (1 if "norm" in name else 0)), name


def trained(model, tokens, domain=None):
    """One forward and backward pass with the losses ahead, the gradients by name."""
    model.zero_grad()
    main, ahead = model.losses(tokens, domain)
    sum(mean for mean, _ in [main, *ahead]).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None or (domain is None and n.endswith("domain_weight")) for n, g in grads.items())
    return {n: g.clone() for n, g in grads.items() if g is not None}


@pytest.mark.parametrize("version", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputed_blocks_count_once_and_give_the_same_gradients(version, dtype):
    tokens, results = some_tokens(4, 33), []
    domain = torch.tensor([0, 1, -1, 3]) if config(version).moe.domains else None
    for checkpointing in ActivationCheckpointing:
        model = build(version, dtype, checkpointing=checkpointing)
        grads = trained(model, tokens, domain)
        results.append((grads, [layer.counts for layer in experts_of(model)]))
    (grads, counts), *others = results
    for again, counts_again in others:
        assert all(torch.equal(grads[n], again[n]) for n in grads)
        assert all(torch.equal(a, b) for a, b in zip(counts, counts_again, strict=True))
    moe = config(version).moe
    slots = [c[: moe.n_routed_experts].sum().item() for c in counts]
    n_ahead = config(version).n_mtp_layers
    expected = [4 * 32 * moe.top_k] * (len(counts) - n_ahead) + [4 * 31 * moe.top_k] * n_ahead
    assert slots == expected


@pytest.mark.parametrize("version", ["v2_moe", "v3_moe", "v5_domain_moe"])
def test_counts_add_up_over_passes_also_in_evaluation(version):
    model, moe = build(version).eval(), config(version).moe
    with torch.no_grad():
        for _ in range(3):
            model(some_tokens(2, 8))
    for layer in experts_of(model)[: config(version).n_layers - moe.n_dense_layers]:
        assert layer.counts[: moe.n_routed_experts].sum() == 3 * 16 * moe.top_k
        rest = dict(zip(COUNTS, layer.counts[moe.n_routed_experts :].tolist(), strict=True))
        assert rest == dict.fromkeys(COUNTS, 0) | {"passes": 3}
        layer.reset_counts()
        assert torch.all(layer.counts == 0)


@pytest.mark.parametrize("version", MODELS)
def test_compiles_whole_and_loses_no_count(version):
    """No graph break in a training pass: what is compiled is one graph."""
    tokens, results = some_tokens(2, 17), []
    domain = torch.tensor([2, -1]) if config(version).moe.domains else None
    for compiled in (False, True):
        model = build(version)
        if compiled:
            torch._dynamo.reset()
            model.losses = torch.compile(model.losses, backend="eager", fullgraph=True)
        grads = [trained(model, tokens, domain) for _ in range(2)][1]
        results.append((grads, [layer.counts for layer in experts_of(model)]))
    (grads, counts), (compiled_grads, compiled_counts) = results
    assert all(torch.equal(a, b) for a, b in zip(counts, compiled_counts, strict=True))
    for name in grads:
        torch.testing.assert_close(compiled_grads[name], grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("version", MODELS)
def test_bf16_trains_on_the_cpu(version):
    """In bf16 the gradients are near those of fp32 and finite."""
    tokens, results = some_tokens(4, 33), []
    for dtype in (torch.float32, torch.bfloat16):
        results.append(trained(build(version, dtype), tokens))
    wide, narrow = results
    assert all(g.isfinite().all() for g in narrow.values())
    name = "embedding.weight"
    assert (narrow[name].float() - wide[name]).norm() / wide[name].norm() < 0.1
