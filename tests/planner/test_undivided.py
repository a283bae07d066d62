"""What every tensor rank moves through its memory alike, counted on the meta device, is what the plan says of it."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from deepseek_exp.config import ModelConfig
from deepseek_exp.kernels import resolve, routed_experts
from deepseek_exp.kernels.triton import experts
from deepseek_exp.models import Transformer
from deepseek_exp.models.moe import MoE
from deepseek_exp.planner.layers import layers_of
from deepseek_exp.planner.speed import exchanged_bytes, expert_product_bytes, undivided_bytes
from tests.planner.plan_parts import exchange, experiment

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


def attention(q, k, v, gate, scale, n_memory, window, n_global_tokens, document):
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

    said = undivided_bytes(exp, layers_of(exp.model, SEQ)[1])
    if kernels == "fused" and exp.model.moe.n_routed_experts:  # inside of routed_experts: see kernels/experts.py
        said -= (6 * exp.model.moe.top_k + 5) * 2 * exp.model.d_model
    assert said == pytest.approx(undivided(3) - undivided(2), rel=0.15)


def test_compiled_norms_count_as_fused_ones():
    def said(*overrides: str) -> float:
        exp = experiment("model=v3_moe", *SIZES, *MOE, "trainer.precision=bf16", *overrides)
        return undivided_bytes(exp, layers_of(exp.model, SEQ)[1])

    assert said("trainer.compile=true") == said("kernels.rms_norm=triton") < said()


class Wide(TorchDispatchMode):
    """Adds up those operands and results of grouped products that have d_model columns for each row."""

    def __init__(self, n_rows: int, width: int) -> None:
        super().__init__()
        self.shapes, self.total = {(n_rows, width), (width, n_rows)}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "grouped" in str(func):
            self.total += sum(t.nbytes for t in (*args[:2], out) if tuple(t.shape) in self.shapes)
        return out


def test_products_of_experts_move_what_the_plan_says():
    exp = experiment("model=v3_moe", *SIZES, *MOE, "trainer.precision=bf16")
    with torch.device("meta"):
        net = MoE(exp.model, resolve(exp.kernels)).to(torch.bfloat16)
        x = torch.zeros(BATCH, SEQ, exp.model.d_model, dtype=torch.bfloat16, requires_grad=True)
    with Wide(BATCH * SEQ * exp.model.moe.top_k, exp.model.d_model) as wide:
        net(x)[0].backward(x)
    said = expert_product_bytes(exp, layers_of(exp.model, SEQ)[1])
    assert said * BATCH * SEQ == wide.total


class Copied(Bytes):
    """Adds up what copies and sums of rows move, those of fused kernels by their tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for name in ("rows_of", "sum_rows"):
            counted = functools.partial(self.also, getattr(experts, name))
            for module in (experts, routed_experts):
                monkeypatch.setattr(module, name, counted)

    def also(self, function, *args):
        with _disable_current_modes():
            out = function(*args)
        moved = [t for t in (out, *args[:2]) if isinstance(t, Tensor) and t.is_floating_point()]
        self.total += sum(t.nbytes for t in moved)
        return out


@pytest.mark.parametrize("kernels", ["torch", pytest.param("fused", marks=pytest.mark.long)])
def test_experts_elsewhere_move_what_the_plan_says(kernels, monkeypatch):
    """fp32: here the interpreter runs the kernels."""
    exp = experiment("model=v3_moe", *SIZES, *MOE, f"kernels={kernels}", "model.d_model=256", "model.moe.d_expert=16")

    def counted(net: MoE, x: Tensor) -> float:
        before = copied.total
        with copied:
            net(x)[0].backward(x)
        net.zero_grad()
        x.grad = None
        return (copied.total - before) / (BATCH * SEQ)

    torch.manual_seed(0)
    copied = Copied(monkeypatch)
    net, x = MoE(exp.model, resolve(exp.kernels)), torch.randn(BATCH, SEQ, exp.model.d_model, requires_grad=True)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    here = counted(net, x)
    exchange(net, monkeypatch)
    said = exchanged_bytes(exp, layers_of(exp.model, SEQ)[1], 2)
    assert said == pytest.approx(counted(net, x) - here, rel=0.15)
    assert exchanged_bytes(exp, layers_of(exp.model, SEQ)[1], 1) == 0
