"""What fused kernels keep for the backward pass is what the plan counts."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.kernels import resolve
from deepseek_exp.models.moe import MoE
from deepseek_exp.planner.memory import block_activation_bytes, product_bytes
from tests.planner.plan_parts import Products, blocks, exchange, experiment, saved_bytes


@pytest.mark.parametrize("name", ["v1_dense", "v2_moe", "v3_moe", "v4_distill"])
def test_a_block_saves_what_is_counted(name):
    """Within 10%, as numbers a row or a token and head weigh more in so small a model; masks are not counted."""
    exp = experiment(f"model={name}", "size=tiny", "kernels=fused", "model.max_seq_len=64")
    for block in blocks(exp, resolve(exp.kernels), torch.float32):
        counted = block_activation_bytes(exp.model, exp.kernels, 4, is_moe=isinstance(block.feed_forward, MoE))
        assert counted == pytest.approx(saved_bytes(block, exp.model, torch.float32), rel=0.1)


@pytest.mark.parametrize("name", ["v1_dense", "v2_moe", "v3_moe", "v4_distill"])
def test_products_are_as_large_as_counted(name):
    exp = experiment(f"model={name}", "size=tiny", "kernels=fused", "model.max_seq_len=64")
    for block in blocks(exp, resolve(exp.kernels), torch.float32):
        with Products() as products:
            block(torch.randn(2, 64, exp.model.d_model))
        counted = product_bytes(exp.model, exp.kernels, 4, is_moe=isinstance(block.feed_forward, MoE))
        assert counted == pytest.approx(products.n_bytes / (2 * 64), rel=0.05)


@pytest.mark.parametrize("name", [pytest.param("v2_moe", marks=pytest.mark.long), "v3_moe"])
def test_with_experts_elsewhere_a_block_saves_the_rows_that_came(name, monkeypatch):
    sizes = ("size=tiny", "model.max_seq_len=64", "model.moe.capacity_factor=0")  # a dropped row is not sent
    exp = experiment(f"model={name}", "kernels=fused", *sizes)
    block = blocks(exp, resolve(exp.kernels), torch.float32)[-1]
    exchange(block, monkeypatch)
    counted = block_activation_bytes(exp.model, exp.kernels, 4, ep=2, is_moe=True)
    assert counted == pytest.approx(saved_bytes(block, exp.model, torch.float32), rel=0.1)
    with Products() as products:
        block(torch.randn(2, 64, exp.model.d_model))
    counted = product_bytes(exp.model, exp.kernels, 4, ep=2, is_moe=True)
    assert counted == pytest.approx(products.n_bytes / (2 * 64), rel=0.05)
