"""Models with integers for weights: what is replaced, how near they stay, and that they generate."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.inference import generate, quantize_matrices
from deepseek_exp.inference.weight_only import WeightOnlyLinear
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed


def build(version):
    cfg = composed(f"model={version}", "size=tiny", "model.n_layers=2").model
    model = Transformer(cfg, TORCH).eval()
    init_weights(model, cfg, 0)
    return model


@pytest.mark.parametrize("version", ["v1_dense", "v2_moe", "v3_moe"])
def test_fewer_bits_are_further_off(version):
    tokens, off = torch.arange(24).view(1, 24) * 7, []
    wanted = build(version)(tokens)
    for bits in (8, 4):
        model = build(version)
        before = sum(p.nbytes for p in model.blocks.parameters())
        saved = quantize_matrices(model, bits)
        integers = [b for name, b in model.blocks.named_buffers() if name.endswith((".q", ".scale"))]
        assert sum(t.nbytes for t in (*model.blocks.parameters(), *integers)) == before - saved
        off.append(((model(tokens) - wanted).norm() / wanted.norm()).item())
    assert 0 < off[0] < 0.01 < off[1] < 0.2


def test_generates_with_a_cache_as_without():
    model = build("v3_moe")
    quantize_matrices(model, 8)
    ways = {"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0, "end_id": -1}
    with_cache, without = (generate(model, [1, 2, 3], use_cache=cache, **ways) for cache in (True, False))
    assert with_cache == without and len(with_cache) == 3


def test_what_stays():
    model = build("v3_moe")
    quantize_matrices(model, 8)
    found = {n.rsplit(".", 1)[1] for n, m in model.named_modules() if isinstance(m, WeightOnlyLinear)}
    stays = {n.rsplit(".", 1)[1] for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert found == {"wq_a", "wq_b", "wkv_a", "wo", "w_gate", "w_up", "w_down"}
    assert "wkv_b" in stays
