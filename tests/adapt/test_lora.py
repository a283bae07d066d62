"""Adapters against models whose weights are the explicit sum, and every path through a model against each other."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.func import functional_call

from deepseek_exp import adapt
from deepseek_exp.config.matrices import matrix_shapes
from deepseek_exp.kernels import TORCH, resolve
from tests.adapt.adapters import SCALE, WIDE, attached, base, experiment, narrow, some_tokens

IN_ONE = narrow(WIDE, in_one=True)
VERSIONS = ("v1_dense", "v2_moe", "v3_moe", "v5_domain_moe")


def loss_of(losses):
    (mean, _), ahead = losses
    return mean + sum(x for x, _ in ahead)


def backward(model, tokens, losses=None):
    """Return the loss and the gradients of what is trained."""
    loss = loss_of((losses or model.losses)(tokens))
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def explicit(exp, model, tokens):
    """Do `backward` with the plain model, whose weights are W + scale * B A written out."""
    plain = base(exp, WIDE, torch.float64)
    leaves = {n: p.detach().requires_grad_() for n, p in model.named_parameters() if n.endswith(("lora_a", "lora_b"))}
    weights = dict(plain.named_parameters())
    for name, w in list(weights.items()):
        if f"{name}.lora_a" in leaves:
            product = torch.einsum("...or,...ri->...oi", leaves[f"{name}.lora_b"], leaves[f"{name}.lora_a"])
            weights[name] = w.detach() + SCALE * product

    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain

        def forward(self, tokens):
            return loss_of(self.inner.losses(tokens))

    loss = functional_call(Losses(), {f"inner.{name}": w for name, w in weights.items()}, (tokens,))
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, found, strict=True))}


def assert_near(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize(
    "ops",
    [WIDE, narrow(WIDE), IN_ONE],
    ids=["sums of weights", "narrow products", "one operation"],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_loss_and_gradients_are_those_of_the_explicit_sum(version, ops):
    """Matrices, stacks of experts, latent attention, routers, tables and multi-token prediction, in float64."""
    labels = ["lora.exclude=[*.domain_weight]"] if version == "v5_domain_moe" else []  # it learns from labels only
    exp = experiment(version, *labels)
    model, tokens = attached(exp, ops, torch.float64), some_tokens(exp)
    wanted = explicit(exp, model, tokens)
    assert all(value.abs().max() > 0 for value in wanted.values())
    assert_near(backward(model, tokens), wanted, 1e-9)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_layers_of_one_input_of_which_some_have_an_adapter():
    exp = experiment("v1_dense", "lora.targets=[*.wq.weight,*.wv.weight]", "model.qkv_bias=true")
    tokens, (found, wanted) = some_tokens(exp), (attached(exp, ops, torch.float64) for ops in (IN_ONE, narrow(WIDE)))
    for model in (found, wanted):
        for block in model.blocks:
            block.attention.wq.bias.data.fill_(0.3)
            block.attention.wk.bias.data.fill_(0.2)
    assert_near(backward(found, tokens), backward(wanted, tokens), 1e-9)


def test_a_tied_table_is_adapted_as_embedding_and_as_head():
    exp = experiment("v1_dense", "model.tie_embeddings=true", "lora.targets=[embedding]")
    model, tokens = attached(exp, dtype=torch.float64), some_tokens(exp)
    assert_near(backward(model, tokens), explicit(exp, model, tokens), 1e-9)
    before = model(tokens)
    adapt.merge(model)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("ops", [TORCH, narrow(TORCH)], ids=["sums of weights", "narrow products"])
def test_the_first_output_is_that_of_the_base(ops):
    exp = experiment("v3_moe")
    tokens = some_tokens(exp)
    assert torch.equal(attached(exp, ops, b_std=0.0)(tokens), base(exp)(tokens))


@pytest.mark.parametrize("version", ["v1_dense", "v3_moe"])
def test_cached_decoding_is_the_full_forward_pass(version):
    """With a cache latent attention reads wkv_b as a tensor, not through its layer."""
    exp = experiment(version)
    model, tokens = attached(exp).eval(), some_tokens(exp)
    caches = model.new_caches(len(tokens), tokens.shape[1])
    steps = [model(tokens[:, i : i + 1], caches) for i in range(tokens.shape[1])]
    whole = model(tokens)
    assert (torch.cat(steps, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert (base(exp).eval()(tokens) - whole).abs().max() > 0.1 * whole.abs().max()


def test_merging_changes_no_bit():
    for version in ("v2_moe", "v3_moe"):
        for dtype in (torch.float32, torch.bfloat16):
            exp = experiment(version)
            model, tokens = attached(exp, dtype=dtype).eval(), some_tokens(exp)
            before = model(tokens)
            adapt.merge(model)
            assert torch.equal(model(tokens), before)
            assert list(model.state_dict()) == list(base(exp).state_dict())


def test_state_has_the_names_of_the_weights():
    exp = experiment("v3_moe")
    model, plain = attached(exp), base(exp)
    state = model.state_dict()
    added = {f"{name}.{part}" for name in matrix_shapes(exp.model) for part in ("lora_a", "lora_b")}
    assert set(state) == set(plain.state_dict()) | added
    assert {n for n, p in model.named_parameters() if p.requires_grad} == added
    other = attached(exp, b_std=0.5)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))
    with pytest.raises(RuntimeError, match=r"Missing key.*wq_a.*lora_a"):
        other.load_state_dict(plain.state_dict())


@functools.cache
def eager(version):
    exp = experiment(version)
    return exp, backward(attached(exp, narrow(TORCH)), some_tokens(exp))


@pytest.mark.parametrize("version", ["v3_moe", pytest.param("v2_moe", marks=pytest.mark.long)])
def test_fused_kernels_read_the_adapted_weights(version):
    exp, wanted = eager(version)
    fused = experiment(version, "kernels=fused", "do=plan")
    assert_near(backward(attached(fused, narrow(resolve(fused.kernels))), some_tokens(exp)), wanted, 5e-5)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_activations(kind):
    exp, wanted = eager("v3_moe")
    recomputed = experiment("v3_moe", f"trainer.activation_checkpointing={kind}")
    assert_near(backward(attached(recomputed, narrow(TORCH)), some_tokens(exp)), wanted, 1e-6)


@pytest.mark.long
def test_compiled_without_a_break():
    exp, wanted = eager("v3_moe")
    model = attached(exp, narrow(TORCH))
    compiled = torch.compile(model.losses, backend="aot_eager", fullgraph=True)
    assert_near(backward(model, some_tokens(exp), compiled), wanted, 5e-5)


def test_products_in_fp8_add_the_adapter():
    """The error of the loss is that of rounding the frozen weights to 8 bits, not the adapters'."""
    exp = experiment("v1_dense", "model.head_dim=32", "model.d_ff=128")
    tokens, ops = some_tokens(exp, n=17), resolve(exp.kernels, fp8=True)
    wanted, of_the_base = (loss_of(model.losses(tokens)).detach() for model in (attached(exp), base(exp)))
    error = (backward(attached(exp, narrow(ops)), tokens)["loss"] - wanted).abs()
    of_rounding = (loss_of(base(exp, ops).losses(tokens)).detach() - of_the_base).abs()
    assert error <= 4 * of_rounding
    assert (wanted - of_the_base).abs() > 10 * error


def test_frozen_routers_keep_their_bias():
    exp = experiment("v3_moe")
    for model, changes in ((attached(exp), False), (base(exp), True)):
        model.losses(some_tokens(exp))
        for layer in model.routed_layers():
            layer.update_bias()
            assert bool(layer.router.bias.any()) is changes
