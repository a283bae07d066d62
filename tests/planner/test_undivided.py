"""What every tensor rank moves through its memory alike, counted on the meta device, is what the plan says of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_exp.config import ModelConfig
from deepseek_exp.kernels import resolve
from deepseek_exp.models import Transformer
from deepseek_exp.planner.layers import layers_of
from deepseek_exp.planner.speed import undivided_bytes
from tests.planner.plan_parts import experiment

BATCH, SEQ = 2, 64
# products, and one operation that is products and more: its rows are counted by its docstring
PRODUCTS = ("mm", "linears", "routed_experts", "grouped", "linear_cross_entropy")
SIZES = (
    "size=1b", "model.vocab_size=512", "model.n_mtp_layers=0", "model.n_layers=3",
    "model.window=0", "model.n_global_tokens=0", f"data.seq_len={SEQ}",
)  # fmt: skip
MOE = ("model.moe.n_routed_experts=64", "model.moe.d_expert=768", "model.moe.n_dense_layers=0", "model.moe.top_k=4")


class Bytes(TorchDispatchMode):
    """Adds up what operations read and write, but for products and what only looks at memory another way."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), out))
        held = {t.untyped_storage()._cdata for t in read}
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in held for t in written)
        if not is_view and "empty" not in str(func) and not any(p in str(func) for p in PRODUCTS):
            self.total += sum(t.numel() * t.element_size() for t in (*read, *written) if t.dim())
        return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def attention(q, k, v, gate, scale, n_memory, window, n_global_tokens):
    """Stand in for attention: its gradients without its work, which is none of what is counted."""
    return _Attention.apply(q, k, v)


def count(cfg: ModelConfig, ops, dtype: torch.dtype) -> float:
    """Count the bytes of a training step's forward and backward pass, for one token."""
    with torch.device("meta"):
        model = Transformer(cfg, dataclasses.replace(ops, local_global_attention=attention)).to(dtype)
        tokens = torch.zeros(BATCH, SEQ + 1, dtype=torch.long)
    with Bytes() as counted:
        model.losses(tokens)[0][0].backward()
    return counted.total / (BATCH * SEQ)


def on_each_of_two(cfg: ModelConfig) -> ModelConfig:
    """Give the model whose matrices are what one of two tensor ranks has."""
    moe = dataclasses.replace(cfg.moe, d_expert=cfg.moe.d_expert // 2)
    halves = {key: getattr(cfg, key) // 2 for key in ("n_heads", "n_kv_heads", "d_ff")}
    return dataclasses.replace(cfg, moe=moe, **halves)


@pytest.mark.parametrize(
    ("kernels", "dtype"), [("torch", torch.bfloat16), ("fused", torch.bfloat16), ("torch", torch.float32)]
)
@pytest.mark.parametrize("model", [("model=v1_dense",), ("model=v2_moe", "model.moe.capacity_factor=0", *MOE),
                                   ("model=v3_moe", *MOE)], ids=lambda m: m[0])  # fmt: skip
def test_each_of_two_tensor_ranks_moves_what_the_plan_says(model, kernels, dtype):
    """Twice what one of two ranks moves is what one alone moves and once more what is not divided; blocks 2 and 3."""
    precision = "bf16" if dtype is torch.bfloat16 else "fp32"
    exp = experiment(*model, *SIZES, f"kernels={kernels}", f"trainer.precision={precision}")
    ops = resolve(exp.kernels)

    def undivided(n_layers: int) -> float:
        cfg = dataclasses.replace(exp.model, n_layers=n_layers)
        return 2 * count(on_each_of_two(cfg), ops, dtype) - count(cfg, ops, dtype)

    said = undivided_bytes(exp, layers_of(exp.model, SEQ)[1], 1)
    if kernels == "fused" and exp.model.moe.n_routed_experts:  # inside of routed_experts: see kernels/experts.py
        said -= (6 * exp.model.moe.top_k + 5) * 2 * exp.model.d_model
    assert said == pytest.approx(undivided(3) - undivided(2), rel=0.15)


def test_compiled_norms_count_as_fused_ones_and_experts_elsewhere_as_torchs():
    def said(ep: int, *overrides: str) -> float:
        exp = experiment("model=v3_moe", *SIZES, *MOE, "trainer.precision=bf16", *overrides)
        return undivided_bytes(exp, layers_of(exp.model, SEQ)[1], ep)

    fused_norms = said(1, "kernels.rms_norm=triton")
    assert said(1, "trainer.compile=true") == fused_norms < said(1)
    assert said(2, "kernels=fused") == fused_norms != said(1, "kernels=fused")
