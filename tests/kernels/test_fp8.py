"""Products in 8-bit floating numbers: rounding, linear layers, and models that train with them.

Triton's interpreter rounds to 8 bits wrongly where the fraction carries into the exponent, so here it has PyTorch do
that one conversion; tests/bench/fp8.py compares the GPU's own.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime import interpreter

from deepseek_exp.config import ActivationCheckpointing, Precision
from deepseek_exp.kernels import TORCH, fp8, fp8_grouped, reference, resolve
from deepseek_exp.kernels.routed_experts import routed_experts, routed_experts_in_fp8
from deepseek_exp.kernels.triton import fp8_quantize
from deepseek_exp.models import Transformer, init_weights
from deepseek_exp.planner.memory import block_activation_bytes, product_bytes
from deepseek_exp.train.build import build_model
from deepseek_exp.train.optim import build_optimizer
from tests.config.test_config import composed
from tests.kernels.fused import outputs_and_gradients
from tests.planner.plan_parts import Products, blocks, experiment, saved_bytes

TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]
TORCH_TYPE = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
# rows, columns: less than a tile, more than one each way, rows that a sum wants filled up
SHAPES = [(1, 16), (16, 16), (37, 48), (130, 272), (300, 144)]


@pytest.fixture(autouse=True)
def _rounds_as_pytorch(monkeypatch):
    convert = interpreter._convert_float

    def exact(x, from_type, to_type, rounding):
        if to_type.name not in TORCH_TYPE:
            return convert(x, from_type, to_type, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
        return wide.to(TORCH_TYPE[to_type.name]).view(torch.uint8).numpy().reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", exact)


def numbers(*shape, seed=0):
    """Numbers of very different magnitudes, of which 8 bits hold the larger ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 2 ** (4 * torch.randn(*shape, generator=generator))


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class TestQuantize:
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_the_definition_bit_for_bit(self, shape, dtype):
        x = numbers(*shape)
        q, q_T, scale = fp8.cast([x], fp8.largest([x], True), dtype, 0, True, as_is=True, transposed=True)
        wanted, wanted_scale = reference.quantize_fp8(x, dtype)
        assert same_bits(q, wanted) and scale == wanted_scale and scale.dtype == torch.float32
        assert same_bits(q_T[:, : shape[0]].contiguous(), wanted.T.contiguous())
        assert q_T.shape[1] % 16 == 0 and not q_T[:, shape[0] :].float().any()
        assert (q.float() * scale - x).abs().max() <= x.abs().max() / (16 if dtype is TYPES[0] else 8)

    @pytest.mark.parametrize("dim", [0, 1])
    @pytest.mark.parametrize("fused", [True, False])
    def test_several_share_a_scale(self, dim, fused):
        tensors = [numbers(*((n, 48) if dim == 0 else (37, n)), seed=n) for n in (16, 144, 32)]
        wanted, wanted_scale = reference.quantize_fp8(torch.cat(tensors, dim), TYPES[0])
        parts = fp8.largest(tensors, fused)
        assert len(parts) == fp8.n_parts(tensors, fused)
        q, q_T, scale = fp8.cast(tensors, parts, TYPES[0], dim, fused, as_is=True, transposed=True)
        assert same_bits(q, wanted) and scale == wanted_scale
        assert same_bits(q_T[:, : len(q)].contiguous(), wanted.T.contiguous())
        assert not q_T[:, len(q) :].float().any()
        alone, none, _ = fp8.cast(tensors, parts, TYPES[0], dim, fused, as_is=True)
        assert same_bits(alone, q) and none is None
        none, alone, _ = fp8.cast(tensors, parts, TYPES[0], dim, fused, transposed=True)
        assert same_bits(alone, q_T) and none is None

    @pytest.mark.parametrize("fused", [True, False])
    def test_a_stack(self, fused):
        x = numbers(3, 144, 48)
        q, q_T, scale = fp8.cast([x], fp8.largest([x], fused), TYPES[0], 0, fused, as_is=True, transposed=True)
        wanted, wanted_scale = reference.quantize_fp8(x, TYPES[0])
        assert same_bits(q, wanted) and scale == wanted_scale
        assert same_bits(q_T, wanted.transpose(1, 2).contiguous())

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])  # of bf16 many lie halfway, where each bit counts
    def test_rows_with_scales_of_their_own(self, of, dtype):
        x = numbers(37, 272).to(of)
        x[3], x[4, 5], x[5, 6] = 0, float("nan"), float("inf")
        q, scale = fp8_quantize.cast_rows(x, dtype)
        wanted, wanted_scale = reference.quantize_fp8(x, dtype, by_row=True)
        whole = [i for i in range(37) if i not in (4, 5)]
        assert same_bits(q[whole], wanted[whole]) and torch.equal(scale[whole], wanted_scale[whole])
        assert scale[[4, 5]].isnan().all() and not q[3].float().any() and scale[3].isfinite()

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_no_number_is_seen(self, fused, bad):
        x = numbers(37, 48)
        x[20, 30] = bad
        assert fp8.cast([x], fp8.largest([x], fused), TYPES[0], 0, fused, as_is=True)[2].isnan()
        y = fp8.linears(x, [nn.Linear(48, 16)], fused=fused)[0]
        assert y.isnan().all()

    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("value", [0.0, 1e-40, 2.0**-120, 1e-30, 1e38])
    def test_the_smallest_and_the_largest(self, fused, value):
        x = torch.full((4, 16), value)
        q, _, scale = fp8.cast([x], fp8.largest([x], fused), TYPES[0], 0, fused, as_is=True)
        assert (q.float() * scale - x).abs().max() <= max(2.0**-100, value / 16) and scale.isfinite()

    def test_inputs_that_do_not_lie_one_after_the_other(self):
        x = numbers(48, 37).T
        q, q_T, _ = fp8.cast([x], fp8.largest([x], True), TYPES[0], 0, True, as_is=True, transposed=True)
        wanted = reference.quantize_fp8(x, TYPES[0])[0]
        assert same_bits(q, wanted.contiguous()) and same_bits(q_T[:, :37].contiguous(), wanted.T.contiguous())


def layers_of(*widths, d_in=48, dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    return [nn.Linear(d_in, n, bias=bias, dtype=dtype) for n in widths]


def rounded(tensors, dim, dtype):
    """What 8 bits make of tensors that share a scale, in float64."""
    q, scale = reference.quantize_fp8(torch.cat(tensors, dim).detach(), dtype)
    return (q.double() * scale.double()).split([t.shape[dim] for t in tensors], dim)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("widths", "bias"), [((16,), False), ((48, 16, 16), True)])
def test_equals_products_of_rounded_operands(fused, widths, bias):
    """Forward and every gradient, from operands that the definition rounds, in float64."""
    layers, x = layers_of(*widths, bias=bias), numbers(3, 7, 48).requires_grad_()
    ys = fp8.linears(x, layers, fused=fused)
    grads = [numbers(3, 7, n, seed=n) for n in widths]
    torch.autograd.backward(ys, grads)
    (x_TD,) = rounded([x.flatten(0, 1)], 0, torch.float8_e4m3fn)
    ws = rounded([layer.weight for layer in layers], 0, torch.float8_e4m3fn)
    gs = rounded([g.flatten(0, 1) for g in grads], 1, torch.float8_e5m2)
    wanted = [x_TD @ w.T + (layer.bias.double() if bias else 0) for w, layer in zip(ws, layers, strict=True)]
    found = [y.flatten(0, 1) for y in ys] + [x.grad.flatten(0, 1)] + [layer.weight.grad for layer in layers]
    wanted += [sum(g @ w for g, w in zip(gs, ws, strict=True)), *(g.T @ x_TD for g in gs)]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    if bias:
        torch.testing.assert_close(layers[0].bias.grad, grads[0].sum((0, 1)))


@pytest.mark.parametrize("fused", [True, False])
def test_is_near_the_layers_themselves(fused):
    """Rounding to 4 bits (e4m3) or 3 (e5m2) is off by up to 1/16 or 1/8 each, evenly spread, so by about a third."""
    results = []
    for way in (lambda x, layers: fp8.linears(x, layers, fused=fused), reference.linears):
        layers, x = layers_of(64, 32, d_in=96), torch.randn(50, 96, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        ys = way(x, layers)
        torch.autograd.backward(ys, [torch.randn(y.shape, generator=torch.Generator().manual_seed(2)) for y in ys])
        results.append([*ys, x.grad, *(layer.weight.grad for layer in layers)])
    for a, b in zip(*results, strict=True):
        assert 1e-3 < (a - b).norm() / b.norm() < 0.08


def test_repeats_bit_for_bit_and_compiles_whole():
    def run(way):
        layers, x = layers_of(48, 16, dtype=torch.bfloat16, bias=True), numbers(2, 9, 48).bfloat16().requires_grad_()
        a, b = way(x * 2, layers)
        (a.square().sum() + b.sum()).backward()
        return [a, b, x.grad, *(p.grad for layer in layers for p in layer.parameters())]

    for fused in (True, False):

        def linears(x, layers, fused=fused):
            return fp8.linears(x, layers, fused=fused)

        first, again = run(linears), run(linears)
        compiled = run(torch.compile(linears, backend="aot_eager", fullgraph=True))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, compiled, strict=True))
        x, weights = numbers(9, 48).requires_grad_(), [layer.weight for layer in layers_of(48, 16)]
        torch.library.opcheck(torch.ops.deepseek_exp.fp8_linears, (x, weights, fused))


def test_keeps_one_byte_of_the_input():
    saved = []
    layers, x = layers_of(64, 64), numbers(32, 48).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8.linears(x, layers, fused=True)
    own = [t for t in saved if not any(t is layer.weight for layer in layers)]
    assert sum(t.nbytes for t in own if t.numel() > 16) == 32 * 48


def test_outside_of_training_the_layers_are_as_they_are():
    layers, x = layers_of(48, 16, bias=True), numbers(5, 48)
    with torch.no_grad():
        found = fp8.linears(x, layers, fused=True)
        assert all(torch.equal(a, layer(x)) for a, layer in zip(found, layers, strict=True))


def grouped_case():
    """Rows of four experts, one of which has none, and three rows past the end that hold anything."""
    torch.manual_seed(0)
    x, ends = numbers(40, 48), torch.tensor([17, 17, 20, 37], dtype=torch.int32)
    x[37:] = float("nan")
    return x, torch.randn(4, 32, 48) / 7, ends, numbers(40, 32, seed=3)


def by_row(x):
    q, scale = reference.quantize_fp8(x, fp8.INPUT, by_row=True)
    return q.double() * scale.double()[:, None]


@pytest.mark.parametrize("fused", [True, False])
def test_grouped_products_equal_those_of_rounded_operands(fused):
    x, weight, ends, grad = grouped_case()
    x.requires_grad_()
    weight.requires_grad_()
    y = fp8_grouped.grouped_mm(x, weight, ends, fused=fused)
    y.backward(grad)
    (w,) = rounded([weight], 0, fp8.INPUT)
    wanted, dx = (reference.grouped_mm(by_row(t.detach()), m, ends) for t, m in ((x, w), (grad, w.transpose(1, 2))))
    exact = [grad[a:b].double().T @ x.detach()[a:b].double() for a, b in ((0, 17), (17, 17), (17, 20), (20, 37))]
    for a, b in ((y[:37], wanted[:37]), (x.grad[:37], dx[:37]), (weight.grad, torch.stack(exact))):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    with torch.no_grad():
        as_is = fp8_grouped.grouped_mm(x, weight, ends, fused=fused)
        torch.testing.assert_close(as_is[:37], reference.grouped_mm(x, weight, ends)[:37])


def experts_case(dropped=0):
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(21)])
    ids[:dropped, 0] = 4
    x, weights = torch.randn(21, 48), torch.rand(21, 2)
    w_gate, w_up, w_down = (torch.randn(4, *shape) / 7 for shape in ((32, 48), (32, 48), (48, 32)))
    return x, weights, *reference.sort_by_expert(ids, 4), w_gate, w_up, w_down


def composed_experts(x, weights, order, inverse, ends, w_gate, w_up, w_down):
    """The same from operations of its own, each of which rounds; a dropped row counts as 0."""
    taken = (torch.arange(len(order)) < ends[-1])[:, None]

    def product(rows, w):
        return torch.where(taken, fp8_grouped.grouped_mm(rows, w, ends, fused=False), 0)

    rows = x[order // 2]
    hidden = reference.swiglu(product(rows, w_gate), product(rows, w_up)) * weights.flatten()[order][:, None]
    return product(hidden, w_down)[inverse].unflatten(0, (-1, 2)).sum(1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dropped", [0, 5])
def test_routed_experts(fused, dropped):
    """Next to the composed form, where single numbers round the other way, and within rounding of the definition."""
    found, composed_, exact = (
        outputs_and_gradients(f, experts_case(dropped))
        for f in (functools.partial(routed_experts_in_fp8, fused=fused), composed_experts, reference.routed_experts)
    )
    for a, b, c in zip(found, composed_, exact, strict=True):
        assert (a - b).norm() < 3e-3 * b.norm() and (a - c).norm() < 0.1 * c.norm()
    again = outputs_and_gradients(functools.partial(routed_experts_in_fp8, fused=fused), experts_case(dropped))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.long
def test_experts_compile_whole():
    case = [t.requires_grad_() if t.is_floating_point() else t for t in experts_case()]
    compiled = torch.compile(functools.partial(routed_experts_in_fp8, fused=True), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*case), routed_experts_in_fp8(*case, fused=True))
    torch.library.opcheck(torch.ops.deepseek_exp.routed_experts, (*case, "fp8_fused"))
    x, weight, ends, _ = grouped_case()
    torch.library.opcheck(
        torch.ops.deepseek_exp.fp8_grouped,
        (x.nan_to_num().requires_grad_(), weight.requires_grad_(), ends, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_experts_outside_of_training_are_as_they_are():
    case = experts_case()
    with torch.no_grad():
        assert torch.equal(routed_experts_in_fp8(*case, fused=True), routed_experts(*case))


DENSE = ("model=v1_dense", "size=tiny", "model.n_layers=2", "data.seq_len=32")


def losses(*overrides):
    """Train a tiny model on one batch, as `build` builds it, and give the loss of each step and of a validation."""
    cfg = composed(*DENSE, "optim.lr=3e-3", *overrides)
    model = build_model(cfg, torch.device("cpu"), None).train()
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    names = dict(Transformer(cfg.model, TORCH).named_parameters()).keys()
    assert dict(model.named_parameters()).keys() == names
    optimizer = build_optimizer(cfg.optim, model)
    tokens, found = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(0)), []
    for _ in range(12):
        (loss, _), _ = model.losses(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    with torch.no_grad():
        return [*found, model.eval().losses(tokens)[0][0].item()]


def test_training_is_near_bf16():
    narrow, wide = losses("trainer.precision=fp8"), losses("trainer.precision=bf16")
    assert narrow[:-1] != wide[:-1] and narrow[0] == pytest.approx(wide[0], rel=2e-3)
    assert narrow[-1] < narrow[0] - 1
    assert narrow == pytest.approx(wide, rel=0.02)


def test_sampling_and_evaluation_take_the_weights_as_they_are():
    """Without a step to take there is nothing in 8 bits: the operations are those of bf16."""
    assert Precision.fp8.dtype_name == "bfloat16"
    cfg = composed(*DENSE, "trainer.precision=fp8", "do=eval")
    assert build_model(cfg, torch.device("cpu"), None).ops.linears is reference.linears


@pytest.mark.parametrize("version", ["v1_dense", pytest.param("v3_moe", marks=pytest.mark.long)])
def test_fused_models_train_as_with_the_definition(version):
    """Whole models in fp32, MLA and prediction ahead too: with PyTorch's rounding, with the kernel, once compiled."""
    cfg = composed(f"model={version}", "size=tiny", "model.head_dim=32", "data.seq_len=16")
    cfg.kernels.fp8_experts, grads = True, []
    for fused in ("torch", "triton"):
        cfg.kernels.fp8_quantize = type(cfg.kernels.fp8_quantize)(fused)
        ops = resolve(cfg.kernels, fp8=True)
        model = Transformer(cfg.model, ops).train()
        init_weights(model, cfg.model, 0)
        if fused == "triton" and version == "v3_moe":
            torch._dynamo.reset()
            model.losses = torch.compile(model.losses, backend="eager", fullgraph=True)
        (loss, _), ahead = model.losses(torch.arange(2 * 17).view(2, 17) * 7 % 512)
        (loss + sum(mean for mean, _ in ahead)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kernels",
    [
        (),
        ("trainer.precision=fp8", "kernels.fp8_experts=true"),
        pytest.param(
            (
                "trainer.precision=fp8",
                "kernels.fp8_experts=true",
                "kernels.experts=triton",
                "kernels.fp8_quantize=triton",
            ),
            marks=pytest.mark.long,
        ),
    ],
)
def test_checkpointing_changes_no_bit(kernels):
    cfg, grads = composed("model=v2_moe", "size=tiny", "model.n_layers=1", "data.seq_len=16", *kernels), []
    for checkpointing in ActivationCheckpointing:
        model = Transformer(cfg.model, resolve(cfg.kernels, fp8=True), checkpointing).train()
        init_weights(model, cfg.model, 0)
        model.losses(torch.arange(2 * 17).view(2, 17) * 7 % 512)[0][0].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("v1_dense", "torch"), ("v3_moe", "torch"), ("v4_distill", "torch"), ("v1_dense", "fused"), ("v3_moe", "fused")],
)
def test_the_plan_counts_what_is_kept(name, kernels):
    exp = experiment(f"model={name}", "size=tiny", f"kernels={kernels}", "model.max_seq_len=32")
    dtype = torch.bfloat16 if kernels == "torch" else torch.float32
    for block in blocks(exp, resolve(exp.kernels, fp8=True), dtype):
        is_moe = hasattr(block.feed_forward, "router")
        counted = block_activation_bytes(exp.model, exp.kernels, dtype.itemsize, kept_input=1, is_moe=is_moe)
        assert counted == pytest.approx(saved_bytes(block, exp.model, dtype), rel=0.1)
        with Products() as products:
            block(torch.randn(2, 32, exp.model.d_model, dtype=dtype))
        counted = product_bytes(exp.model, exp.kernels, dtype.itemsize, kept_input=1, is_moe=is_moe)
        assert counted == pytest.approx(products.n_bytes / (2 * 32), rel=0.05)
