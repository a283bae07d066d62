"""What goes wrong in silence with pipelines, experts and tensors in parts: each has a guard, and here its test.

Some are guarded by what test_equivalence.py compares too; here the numbers are chosen so that a missing guard shows at
once.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._ops import OpOverload

from deepseek_exp.errors import UserError
from deepseek_exp.parallel.tensor import Region, Rule, match_plan, tensor_plan
from tests.config.test_config import composed
from tests.operators import Called
from tests.parallel.layouts import FEW, FEW_STEPS, SHORT, Watch, difference, labelled_texts, layout


def assert_same(one, many):
    found = difference(one, many)
    assert found.loss <= 2e-6 and found.grad_norm <= 1e-5 and found.weight <= 1e-5 and found.routing <= 1e-9, found


class NormsWithoutZero(Watch):
    """Has DeepSpeed's pipeline work without ZeRO, and notes the norms that it clips gradients by."""

    def before_build(self, cfg):
        from deepspeed.runtime import engine

        from deepseek_exp.parallel import engines

        self.norms, clip, config = [], engine.clip_grad_norm_, engines.deepspeed_config

        def noted(*args, **kwargs):
            self.norms.append(float(clip(*args, **kwargs)))

        engine.clip_grad_norm_ = noted
        engine.DeepSpeedEngine.get_global_grad_norm = lambda engine: self.norms[-1]
        engines.deepspeed_config = lambda exp, groups, zero_stage: config(exp, groups, 0)
        return cfg

    def result(self):
        return self.norms


def test_clipping_in_a_pipeline_needs_zero_1(layouts, alone):
    """Without ZeRO DeepSpeed counts a table that the first and the last stage have twice."""
    model = ("model=v1_dense", *FEW)
    with pytest.raises(UserError, match=r"parallel\.zero_stage=0 cannot be used with parallel\.pp=2 "):
        composed(*SHORT, *model, *layout(pp=2, zero_stage=0))
    one, many = alone(*model), layouts.run(2, *model, *layout(pp=2), watch=NormsWithoutZero)
    for norms in many.said:
        assert norms[0] > 1.01 * one.trace("optim/grad_norm")[0]


class Sent(Watch):
    """Notes what goes from a stage to the next."""

    def before_fit(self, parts, trainer):
        from deepspeed.runtime.pipe import engine

        self.sent, send = set(), engine.p2p.send

        def noted(tensor, stage):
            self.sent.add((str(tensor.dtype), tensor.ndim))
            return send(tensor, stage)

        engine.p2p.send = noted

    def result(self):
        return sorted(self.sent)


def test_labels_reach_every_stage_and_do_not_travel_through_the_pipeline(layouts, alone, tmp_path):
    model = ("model=v5_domain_moe", "model.moe.domain_loss_weight=1", *FEW, *labelled_texts(tmp_path))
    one, many = alone(*model), layouts.run(4, *model, *layout(pp=4), watch=Sent)
    assert len(set(one.trace("moe/domain_accuracy"))) > 1
    assert {f"val/loss/{name}" for name in ("general", "finance", "medical", "law")} <= one.metrics[FEW_STEPS].keys()
    assert len(many.said) == 4
    for sent in many.said:  # beside activations and gradients, (batch, seq, d_model), DeepSpeed says what it sends
        assert ["torch.float32", 3] in sent and "torch.int64" not in dict(sent), sent
    assert_same(one, many)


class Held(Watch):
    """Notes what a rank holds of the row-parallel matrices when training begins."""

    def before_fit(self, parts, trainer):
        from pytorch_lightning.callbacks import Callback

        class Note(Callback):
            def on_train_start(callback, trainer, module):
                named = module.model.named_parameters()
                self.held = {n: p.tolist() for n, p in named if n.endswith(("wo.weight", "w_down.weight"))}

        trainer.callbacks.append(Note())

    def result(self):
        return self.held


def test_row_parallel_matrices_are_cut_along_their_inputs(layouts, alone):
    """A checkpoint of tp=1, which knows of no cut, loaded by tp=2."""
    model = ("model=v4_distill", *FEW)
    first = layouts.run(2, *model, *layout(dp=2))
    further = (*model, f"trainer.max_steps={FEW_STEPS + 1}", *layout(tp=2))
    whole, again = first.weights(), layouts.run(2, *further, resume=first, watch=Held)
    assert len(again.said[0]) == 8
    for rank, held in enumerate(again.said):
        for name, values in held.items():
            half = whole[name].shape[1] // 2
            assert torch.equal(torch.tensor(values), whole[name][:, rank * half : (rank + 1) * half]), name
    one = layouts.run(1, *model, f"trainer.max_steps={FEW_STEPS + 1}", *layout(), resume=alone(*model))
    assert_same(one, again)


class Gradient(Watch):
    """Notes a matrix's gradient before the first step; of one process its sum in bf16 too, of parts how it is added."""

    NAME = "blocks.0.feed_forward.w_down.weight"

    def before_fit(self, parts, trainer):
        self.found, self.p = [], dict(parts.lit.model.named_parameters())[self.NAME]
        if parts.groups is not None:
            self.watch_stage(trainer.strategy)
        else:
            self.watch_one()

    def watch_one(self):
        from deepseek_exp.train import local_engine

        narrow, clip = torch.zeros_like(self.p), local_engine.clip_gradients

        def add(p):
            narrow.add_(p.grad)

        self.p.register_post_accumulate_grad_hook(add)

        def clipped(optimizer, clip_norm):
            place = [q is self.p for q in optimizer.params].index(True)
            self.found = [optimizer.masters[place].grad.flatten().tolist(), narrow.flatten().tolist()]
            return clip(optimizer, clip_norm)

        local_engine.clip_gradients = clipped

    def watch_stage(self, strategy):
        setup = strategy.setup

        def noted(trainer):
            setup(trainer)
            optimizer, called = strategy.engine.optimizer, Called()
            step, add = optimizer.step, optimizer._update_hp_grad

            def stepped(*args, **kwargs):
                self.found = [self.p._hp_grad.tolist(), sorted(called.names)]
                return step(*args, **kwargs)

            def added(p, *args, **kwargs):
                with called if p is self.p else contextlib.nullcontext():
                    add(p, *args, **kwargs)

            optimizer.step, optimizer._update_hp_grad = stepped, added

        strategy.setup = noted

    def result(self):
        return self.found


def test_bf16_gradients_add_up_in_fp32(layouts):
    """Over micro batches, of which one process has 128 and each of two ranks 64, and over ranks."""
    model = ("model=v1_dense", "trainer.precision=bf16", "trainer.global_batch_seqs=128", "trainer.max_steps=1")
    model += ("optim.warmup_steps=0", "trainer.eval_every_steps=1")
    one, in_bf16 = torch.tensor(layouts.run(1, *model, watch=Gradient).said[0])
    for said, called in layouts.run(2, *model, *layout(dp=2), watch=Gradient).said:
        assert (torch.tensor(said) - one).norm() / one.norm() < 1e-5
        assert "aten::add_.Tensor" in called and "aten::_to_copy" not in called  # no copy in fp32 is made first
    assert (in_bf16 - one).norm() / one.norm() > 5e-3  # what a sum in bf16 would be off by


class Buffers(Watch):
    """Notes the types of a model's buffers and how even the routing is."""

    def before_fit(self, parts, trainer):
        self.lit = parts.lit

    def result(self):
        kinds = {name: str(b.dtype) for name, b in self.lit.named_buffers()}
        return kinds, str(next(self.lit.model.parameters()).dtype)


def test_buffers_keep_their_type_under_bf16(layouts):
    """A load in bf16 stops counting at 256, and steps of a bias of 0.001 are lost."""
    few = ("trainer.max_steps=1", "optim.warmup_steps=0", "trainer.eval_every_steps=1", "trainer.precision=bf16")
    one = layouts.run(1, "model=v3_moe", *few, watch=Buffers).said[0]
    kinds = one[0]
    assert {kind for name, kind in kinds.items() if name.endswith("counts")} == {"torch.float64"}
    assert {kind for name, kind in kinds.items() if name.endswith("router.bias")} == {"torch.float32"}
    many = layouts.run(2, "model=v3_moe", *few, *layout(tp=2), watch=Buffers).said
    assert many == [one, one] and one[1] == "torch.bfloat16"


def test_a_tensor_plan_that_matches_nothing_is_an_error():
    plan = tensor_plan(composed("size=tiny").model)
    names = ["embedding.weight", *(f"blocks.0.{name}.weight" for name in ("attention.wq", "attention.wk"))]
    with pytest.raises(ValueError, match=r"the tensor-parallel plan's pattern '.*wo.*' matches none of 3 parameters"):
        match_plan(plan, names)
    with pytest.raises(ValueError, match=r"matches 'embedding\.weight' twice"):
        match_plan({r"embedding\.weight": Rule(0), r"embedding\..*": Rule(1)}, names)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("sequence_parallel", "names"), [(False, {"all_reduce"}), (True, {"all_gather", "reduce_scatter"})]
)
def test_no_compiler_looks_into_the_exchanges_of_a_block(one_rank, sequence_parallel, names):
    """Torch 2.11 would put collectives of its own in their place, and take the gradient for 0."""
    region, seen = Region(one_rank, sequence_parallel=sequence_parallel), set()

    def note(graph, _):
        seen.update(node.target.name() for node in graph.graph.nodes if isinstance(node.target, OpOverload))
        return make_boxed_func(graph.forward)

    w = torch.randn(8, 8, requires_grad=True)
    block = torch.compile(lambda x: region.leave(region.enter(x) @ w), backend=aot_autograd(fw_compiler=note))
    block(torch.randn(2, 4, 8, requires_grad=True)).sum().backward()
    assert w.grad.abs().max() > 0
    assert {name.partition("::")[2] for name in seen if name.startswith("deepseek_exp::")} == names
    assert not any("c10d" in name for name in seen)
