"""Bytes by hand, against what PyTorch saves for the backward pass, and as laws over layouts."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_exp.kernels import TORCH
from deepseek_exp.kernels import routed_experts as operation
from deepseek_exp.models import Transformer, init_weights
from deepseek_exp.models.moe import MoE
from deepseek_exp.planner import parameters
from deepseek_exp.planner.layers import largest_gathered, layers_of
from deepseek_exp.planner.memory import (
    activation_terms,
    block_activation_bytes,
    experts_at_work_bytes,
    product_bytes,
)
from deepseek_exp.train.optim import build_optimizer
from tests.planner.plan_parts import Products, blocks, experiment, layout, planned, saved_bytes

DENSE = ("model=v4_distill", "size=small")
EXPERTS = ("model=v3_moe", "size=small")


class TestStates:
    @pytest.mark.parametrize(
        ("overrides", "per_parameter"),
        [
            ((), 4 + 4 + 8),  # weight, gradient, two moments
            (("trainer.precision=bf16",), 2 + 4 + 8 + 4),  # and the fp32 master
            (("optim=adafactor",), 4 + 4),
            (("optim.ema_decay=0.9",), 4 + 4 + 8 + 4),
        ],
    )
    @pytest.mark.parametrize("model", [DENSE, EXPERTS])
    def test_one_rank(self, model, overrides, per_parameter):
        exp = experiment(*model, *overrides)
        (m,) = planned(exp, layout()).memory
        counted = parameters(exp.model)
        assert m.weights + m.gradients + m.optimizer == per_parameter * (counted.total + counted.mtp)

    @pytest.mark.parametrize(("precision", "per_parameter"), [("fp32", 4), ("bf16", 2)])
    def test_a_cuda_graph_keeps_the_gradients_of_a_micro_batch(self, precision, per_parameter):
        plain = experiment(*DENSE, f"trainer.precision={precision}")
        recorded = dataclasses.replace(plain, trainer=dataclasses.replace(plain.trainer, cuda_graphs=True))
        (a,), (b,) = (planned(exp, layout()).memory for exp in (plain, recorded))
        assert b.gradients - a.gradients == per_parameter * parameters(plain.model).total
        assert b.total - a.total == b.gradients - a.gradients

    @pytest.mark.parametrize("model", [("model=v1_dense", "size=tiny"), ("model=v3_moe", "size=tiny")])
    def test_muon_has_one_moment_for_the_blocks(self, model):
        exp = experiment(*model, "optim=muon")
        (m,) = planned(exp, layout()).memory
        whole = Transformer(exp.model, TORCH)
        init_weights(whole, exp.model, 0)
        optimizer = build_optimizer(exp.optim, whole)
        for p in whole.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
        assert m.optimizer == pytest.approx(held, rel=0.01)

    @pytest.mark.parametrize(("zero", "divided"), [(0, 0), (1, 8), (2, 12), (3, 16)])
    def test_zero_divides_more_and_more(self, zero, divided):
        (m,) = planned(experiment(*DENSE), layout(dp=4, zero=zero)).memory
        n = parameters(experiment(*DENSE).model).total
        assert m.weights + m.gradients + m.optimizer == n * (16 - divided + divided / 4)

    def test_zero_3_has_two_blocks_gathered(self):
        exp = experiment(*DENSE)
        (three,), (two,) = (planned(exp, layout(dp=4, zero=zero)).memory for zero in (3, 2))
        assert three.buffers - two.buffers == 2 * 4 * largest_gathered(exp.model, 256)
        assert planned(exp, layout(zero=3)).memory == planned(exp, layout(zero=2)).memory  # one rank gathers nothing

    def test_zero_shards_over_the_copies_of_an_expert(self):
        exp = experiment(*EXPERTS)
        (two,) = planned(exp, layout(dp=4, ep=2, zero=1)).memory
        assert two.optimizer == pytest.approx(2 * two.weights / 2)


@pytest.mark.parametrize("model", [DENSE, EXPERTS])
@pytest.mark.parametrize("pp", [2, 4])
class TestLaws:
    def test_stages_hold_the_whole_weights(self, model, pp):
        exp = experiment(*model)
        plan = planned(exp, layout(pp=pp))
        copies = sum(s.copies for s in plan.stages)
        counted = parameters(exp.model)
        assert sum(m.weights for m in plan.memory) == 4 * (counted.total + counted.mtp + copies)
        (whole,) = planned(exp, layout()).memory
        assert whole.weights == 4 * (counted.total + counted.mtp)

    def test_more_tp_takes_less_memory(self, model, pp):
        exp = experiment(*model)
        one, two = (planned(exp, layout(tp=tp, pp=pp)) for tp in (1, 2))
        for stage, a, b in zip(one.stages, one.memory, two.memory, strict=True):
            assert a.weights / 2 <= b.weights < a.weights
            assert a.activations / 2 <= b.activations
            assert b.activations < a.activations or not (stage.n_dense + stage.n_moe)
            assert b.buffers == a.buffers / 2

    def test_a_stage_keeps_as_many_micro_batches_as_follow_it(self, model, pp):
        exp = experiment(*model, "trainer.global_batch_seqs=64")
        many = planned(exp, layout(pp=pp))
        one = planned(experiment(*model, "trainer.global_batch_seqs=1", "trainer.micro_batch_seqs=1"), layout(pp=pp))
        ratios = [a.activations / b.activations for a, b in zip(many.memory, one.memory, strict=True)]
        assert ratios == pytest.approx(range(pp, 0, -1))

    def test_recomputing_takes_less(self, model, pp):
        exp = experiment(*model, "trainer.global_batch_seqs=64", "model.n_layers=16")
        kept, recomputed = (planned(exp, layout(pp=pp, full=full)).memory for full in (False, True))
        assert all(b.activations < a.activations for a, b in zip(kept, recomputed, strict=True))


def test_sequence_parallelism_cuts_the_inputs_of_norms_and_the_residual_stream():
    """Of 256 tokens and width 192 in fp32: 8 bytes of each norm, two a block and the last; where recomputed, 4 kept."""
    exp = experiment(*DENSE)
    hidden, n = 256 * 192, exp.model.n_layers

    def saved(full):
        off, on = (planned(exp, layout(tp=2, full=full, sequence=on)).memory[0] for on in (False, True))
        assert (off.weights, off.gradients, off.optimizer) == (on.weights, on.gradients, on.optimizer)
        return off.activations - on.activations

    assert saved(full=False) == (2 * n + 1) * 8 * hidden / 2
    assert saved(full=True) == (n * 4 + (1 + 2) * 8) * hidden / 2  # the block that is at work is recomputed


def test_experts_are_shared_out_over_ep():
    exp = experiment(*EXPERTS)
    weights = [planned(exp, layout(dp=4, ep=ep)).memory[0].weights for ep in (1, 2, 4)]
    experts = sum(s.experts for s in planned(exp, layout()).stages)
    assert weights[0] - weights[1] == 4 * experts / 2
    assert weights[1] - weights[2] == 4 * experts / 4


class Live(TorchDispatchMode):
    """Notes the most that was alive at once of what operations made."""

    def __init__(self):
        super().__init__()
        self.held, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        made = {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in made if s._cdata not in before}
        if not made or "set_" in str(func):  # that is how the interpreter looks at what there is
            return out
        self.held |= made
        if self.total() > self.most:
            gc.collect()  # it leaves circles behind
            self.most = max(self.most, self.total())
        return out

    def total(self):
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        return sum(size for _, size in self.held.values())


FUSED_EXPERTS = (*EXPERTS, "kernels.experts=triton", "model.moe.n_routed_experts=8")


@pytest.mark.parametrize(
    ("tp", "ep", "d_expert", "seq_len"),
    [
        (2, 2, 48, 64),
        *(pytest.param(*n, marks=pytest.mark.long) for n in [(1, 1, 48, 64), (1, 2, 48, 64), (2, 1, 48, 64)]),
        pytest.param(1, 8, 1536, 384, marks=pytest.mark.long),
    ],
)
def test_fused_experts_at_work_take_what_is_counted(tp, ep, d_expert, seq_len):
    """The backward pass itself, and its incoming gradient; with ep each row is a token of its own."""
    sizes = (f"model.moe.d_expert={d_expert}", f"model.max_seq_len={seq_len}", f"data.seq_len={seq_len}")
    exp = experiment(*FUSED_EXPERTS, *sizes)
    m, stage, n_experts = exp.model, layers_of(exp.model, exp.data.seq_len)[-2], 8 // ep
    n_rows = exp.data.seq_len * m.moe.top_k
    x = torch.randn(n_rows if ep > 1 else exp.data.seq_len, m.d_model, requires_grad=True)
    weights = torch.rand(len(x), n_rows // len(x), requires_grad=True)
    w = [torch.randn(n_experts, m.moe.d_expert // tp, m.d_model, requires_grad=True) for _ in range(2)]
    w.append(w[0].detach().transpose(1, 2).contiguous().requires_grad_())
    by_expert = TORCH.sort_by_expert(torch.randint(n_experts, weights.shape), n_experts)
    y = operation.routed_experts(x, weights, *by_expert, *w)
    live, backward = Live(), operation._routed_experts_backward

    def watched(*args):
        with live:
            return backward.function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operation, "_routed_experts_backward", watched)
        y.backward(torch.ones_like(y))
    counted = experts_at_work_bytes(exp, layout(dp=ep, tp=tp, ep=ep), stage)
    assert live.most + y.nbytes == pytest.approx(counted, rel=0.02)


def test_the_main_loss_is_there_while_experts_of_multi_token_prediction_work():
    """12 bytes a token and entry of the vocabulary, which is small, so that experts take more."""
    few = (*FUSED_EXPERTS, "model.vocab_size=512", "data.seq_len=64")
    with_mtp, without = (planned(experiment(*few, f"model.n_mtp_layers={n}"), layout()).memory[0] for n in (1, 0))
    assert with_mtp.buffers - without.buffers == 12 * 64 * 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["v1_dense", "v2_moe", "v2_5_sparse", "v3_moe", "v4_distill"])
def test_a_block_saves_what_pytorch_saves(name, dtype):
    """Within 5%: masks, which all blocks share, are not counted, nor are order and inverse of the dispatched rows."""
    exp = experiment(f"model={name}", "size=small")
    for block in blocks(exp, TORCH, dtype):
        counted = block_activation_bytes(
            exp.model, exp.kernels, dtype.itemsize, is_moe=isinstance(block.feed_forward, MoE)
        )
        assert counted == pytest.approx(saved_bytes(block, exp.model, dtype), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["v1_dense", "v2_moe", "v2_5_sparse", "v3_moe", "v4_distill", "v5_domain_moe"])
def test_products_are_as_large_as_counted(name, dtype):
    exp = experiment(f"model={name}", "size=small")
    cfg = exp.model
    for block in blocks(exp, TORCH, dtype):
        with Products() as products:
            block(torch.randn(2, cfg.max_seq_len, cfg.d_model, dtype=dtype))
        counted = product_bytes(cfg, exp.kernels, dtype.itemsize, is_moe=isinstance(block.feed_forward, MoE))
        assert counted == pytest.approx(products.n_bytes / (2 * cfg.max_seq_len), rel=0.02)


@pytest.mark.parametrize("name", ["v1_dense", "v2_5_sparse", "v3_moe"])
def test_the_terms_of_a_block_are_named_and_add_up(name):
    exp = experiment(f"model={name}", "size=tiny")
    for is_moe in (False, True):
        terms = activation_terms(exp.model, exp.kernels, 2, 2, ep=1, cut=1, is_moe=is_moe)
        assert len({term.name for term in terms}) == len(terms) and all(term.n_bytes >= 0 for term in terms)
        whole, sharded = (sum(t.n_bytes for t in terms if t.is_sharded is kind) for kind in (False, True))
        counted = block_activation_bytes(exp.model, exp.kernels, 2, tp=2, is_moe=is_moe)
        assert counted == whole + sharded / 2
