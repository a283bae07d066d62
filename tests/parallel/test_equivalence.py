"""Every layout trains what one process trains: what tells most of the whole matrix, tests/bench/equivalence.py."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from deepseek_exp.huggingface import read_release
from tests.huggingface.releases import model_config, some_tokenizer, their_model
from tests.parallel.layouts import FEW, RankDied, Watch, difference, layout, n_ranks

SEQUENCE = "parallel.sequence_parallel=true"
FULL = "trainer.activation_checkpointing=full"
# Losses of the routing are tied to the layers' outputs, so that every layout has to scale them itself.
V2 = ["model=v2_moe", "model.moe.aux_loss_weight=1", "model.moe.sequence_loss_weight=1"]
V3 = ["model=v3_moe", "model.moe.bias_update_rate=0.01"]
# what is trained, in which layout, and what one process does not know of
GLM4 = ["model=v4_distill", "model.qkv_bias=true", "model.rotary_dim=8", "model.sandwich_norm=true"]
CASES = {
    "v1 pp2 tp2": (["model=v1_dense"], {"pp": 2, "tp": 2}, []),
    "v1 tp2 dp2, sequences cut": (["model=v1_dense"], {"tp": 2, "dp": 2}, [SEQUENCE]),
    "v2.5 tp2": (["model=v2_5_sparse"], {"tp": 2}, []),
    "v2 tp2": (V2, {"tp": 2}, []),
    "v2 dp2": (V2, {"dp": 2}, []),
    "v2 dp2 ep2, rows dropped": (V2, {"dp": 2, "ep": 2}, []),
    # DeepSpeed's model axis holds other sequences here, not copies: activations must not be partitioned over it.
    "v2 pp2 dp2 ep2": (V2, {"pp": 2, "dp": 2, "ep": 2}, []),
    "v3 dp4 ep2": (V3, {"dp": 4, "ep": 2}, ["trainer.activation_checkpointing=selective"]),
    "v3 pp2 dp2 ep2, recomputed": ([*V3, FULL], {"pp": 2, "dp": 2, "ep": 2}, []),
    "v3 tp4": (V3, {"tp": 4}, []),
    "v3 tied pp2 tp2 dp2 ep2": (
        [*V3, "model.tie_embeddings=true"],
        {"pp": 2, "tp": 2, "dp": 2, "ep": 2},
        [],
    ),
    "v1 dp2, no ZeRO": (["model=v1_dense"], {"dp": 2, "zero_stage": 0}, []),
    "v1 dp2, no ZeRO, unclipped": (["model=v1_dense", "optim.clip_norm=100"], {"dp": 2, "zero_stage": 0}, []),
    "v3 dp2, ZeRO 3": (V3, {"dp": 2, "zero_stage": 3}, []),
    "v4 tp4, one key head": (
        ["model=v4_distill", "model.n_kv_heads=1", "model.qkv_bias=true"],
        {"tp": 4},
        ["trainer.activation_checkpointing=selective"],
    ),
    "norms after, pp2 tp2": (GLM4, {"pp": 2, "tp": 2}, []),
    "norms after, tp2 dp2, sequences cut": (GLM4, {"tp": 2, "dp": 2}, [SEQUENCE]),
    "norms after, dp2 ep2": ([*V3, "model.sandwich_norm=true"], {"dp": 2, "ep": 2}, []),
}

# every engine, every axis, and every collective at least once
QUICK = {
    "v1 pp2 tp2",
    "v1 tp2 dp2, sequences cut",
    "v2 dp2 ep2, rows dropped",
    "v3 pp2 dp2 ep2, recomputed",
    "v1 dp2, no ZeRO",
    "v1 dp2, no ZeRO, unclipped",
    "v3 dp2, ZeRO 3",
}

if shutil.which("g++") is not None:  # torch.compile needs a C++ compiler on a CPU
    CASES["v1 tp2, compiled"] = (["model=v1_dense"], {"tp": 2}, ["trainer.compile=true"])


class Traced(Watch):
    """Has blocks traced into graphs, which nothing is made of."""

    def before_build(self, cfg):
        from torch import nn

        compiled = nn.Module.compile
        nn.Module.compile = lambda module, **options: compiled(module, backend="eager", **options)
        return cfg


class Copies(Watch):
    """Notes what ranks of one stage should have alike: balance biases, and parameters that are not cut."""

    def before_fit(self, parts, trainer):
        self.lit, self.shard = parts.lit, parts.shard

    def result(self):
        model, params = self.lit.model, self.shard.params
        parameters = dict(model.named_parameters())
        alike = {p.name: parameters[p.name].detach() for p in params if not p.cuts and p.name in parameters}
        biases = {name: b for name, b in model.named_buffers() if name.endswith("router.bias")}
        assert alike
        digests = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in (alike | biases).items()}
        return digests, {name: b.tolist() for name, b in biases.items()}


def assert_same(one, many):
    """The bounds leave room for rounding, which grows from step to step; a bug is off by far more."""
    found = difference(one, many)
    assert found.loss <= 2e-6 and found.grad_norm <= 1e-5 and found.weight <= 1e-5 and found.routing <= 1e-9, found


@pytest.mark.parametrize(
    ("model", "degrees", "only_parts"),
    [pytest.param(*case, id=name, marks=[] if name in QUICK else pytest.mark.long) for name, case in CASES.items()],
)
def test_a_layout_trains_what_one_process_trains(layouts, alone, model, degrees, only_parts):
    one = alone(*FEW, *model)
    n, watch = n_ranks(degrees), Watch if degrees.get("zero_stage") == 3 else Copies
    many = layouts.run(n, *FEW, *model, *only_parts, *layout(**degrees), watch=watch)
    assert min(one.trace("optim/grad_norm")) > 0.5  # clipped
    assert len(set(one.trace("optim/lr"))) > 1
    assert_same(one, many)
    if watch is Copies:
        assert_copies_are_equal(one, many, n // degrees.get("pp", 1))


def assert_copies_are_equal(one, many, n_of_stage):
    """Routers, latents and norms are equal on all ranks that have them, though each saw a part of their gradient."""
    for stage in (many.said[i : i + n_of_stage] for i in range(0, len(many.said), n_of_stage)):
        assert all(said == stage[0] for said in stage)
    weights = one.weights()
    for name, bias in many.said[0][1].items():
        assert any(bias) and (weights[name] - torch.tensor(bias)).abs().max() == 0


@pytest.mark.long
def test_every_length_of_a_block_has_its_graphs(layouts):
    """Five look ahead, each at one token less, in training and validation: more than the compiler keeps by itself."""
    few = ("trainer.max_steps=1", "optim.warmup_steps=0", "trainer.eval_every_steps=1", "trainer.eval_seqs=1")
    model = ("model=v3_moe", "model.n_mtp_layers=5", "model.n_layers=2", "data.seq_len=16", "trainer.compile=true")
    many = layouts.run(2, *few, *model, "trainer.global_batch_seqs=1", *layout(tp=2), watch=Traced)
    assert "val/loss" in many.metrics[1]


class OnlyFused(Watch):
    """Stops where experts are reached by single operations."""

    def before_build(self, cfg):
        from deepseek_exp.models.moe.layer import Experts

        del Experts.forward
        return cfg


@pytest.mark.parametrize(
    ("model", "degrees"),
    [
        pytest.param("v1_dense", {"tp": 2, "dp": 2, "zero_stage": 0}, marks=pytest.mark.long),
        pytest.param("v3_moe", {"pp": 2, "tp": 2}, marks=pytest.mark.long),
        pytest.param("v2_moe", {"dp": 2, "ep": 2}, marks=pytest.mark.long),
    ],
)
def test_fused_kernels_in_a_layout(layouts, alone, model, degrees):
    few = ("trainer.max_steps=2", "trainer.eval_every_steps=2", "trainer.eval_seqs=1", "optim.warmup_steps=1")
    few = (*few, f"model={model}", "data.seq_len=24", "model.n_layers=2")
    assert_same(alone(*few), layouts.run(n_ranks(degrees), *few, "kernels=fused", *layout(**degrees), watch=OnlyFused))


def test_micro_batches_of_ranks_are_those_of_one_process(layouts, alone):
    model = ("model=v3_moe", "trainer.micro_batch_seqs=2")
    assert_same(alone(*FEW, *model), layouts.run(2, *FEW, *model, *layout(dp=2)))


class FromRelease(Watch):
    """Starts from a Hugging Face folder."""

    def __init__(self, folder):
        self.folder = folder

    def before_build(self, cfg):
        folder = Path(self.folder)
        data = replace(cfg.data, tokenizer=str(folder / "tokenizer.json"))
        return replace(cfg, init_from=self.folder, model=model_config(read_release(folder).model), data=data)


@pytest.mark.long
def test_a_release_is_divided(layouts, tmp_path):
    their_model("deepseek_v3").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(some_tokenizer().json)
    few = (*FEW, "model=deepseek_v3")
    one, many = (
        layouts.run(n, *few, *cut, watch=FromRelease, watch_args=(str(tmp_path),))
        for n, cut in ((1, ()), (8, layout(pp=2, tp=2, dp=2, ep=2)))
    )
    assert len({name.split(".")[1] for name in one.weights() if name.startswith("blocks.")}) != 4  # its own depth
    assert_same(one, many)


class Order(Watch):
    """Notes the sequences of each step."""

    def before_fit(self, parts, trainer):
        self.steps, step = [], parts.lit.training_step

        def noted(batch, batch_idx):
            self.steps.append([hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in batch.tokens])
            return step(batch, batch_idx)

        parts.lit.training_step = noted

    def result(self):
        return self.steps


def test_each_step_has_the_same_sequences_in_the_same_order(layouts):
    """And the same tokens in all ranks of one place on dp, which work on one model together."""
    few = ("model=v1_dense", "trainer.max_steps=2", "trainer.eval_every_steps=2", "optim.warmup_steps=1")
    one = layouts.run(1, *few, watch=Order).said[0]
    assert len(one) == 2 and len(set(chain(*one))) == 2 * 8
    by_two = layouts.run(4, *few, *layout(tp=2, dp=2), watch=Order).said  # ranks in the order dp, tp
    assert by_two[0] == by_two[1] and by_two[2] == by_two[3]
    by_four = layouts.run(4, *few, *layout(dp=4), watch=Order).said
    for shares in (by_two[::2], by_four):
        assert [list(chain(*step)) for step in zip(*shares, strict=True)] == one


class Counted(Watch):
    """Counts the rows of a validation that count, and those that fill up."""

    def before_fit(self, parts, trainer):
        self.rows, step = [], parts.lit.validation_step

        def noted(batch, batch_idx):
            self.rows.append([batch.n_counted, len(batch.tokens) - batch.n_counted])
            return step(batch, batch_idx)

        parts.lit.validation_step = noted

    def result(self):
        return self.rows


@pytest.mark.parametrize("degrees", [{"dp": 4}, {"pp": 2, "dp": 2}], ids=str)
def test_rows_that_fill_up_do_not_count(layouts, alone, degrees):
    few = ("model=v1_dense", "trainer.max_steps=1", "optim.warmup_steps=0", "trainer.eval_every_steps=1")
    few += ("trainer.eval_seqs=0", "trainer.micro_batch_seqs=2", "data.max_bytes=83000")
    one, many = alone(*few), layouts.run(4, *few, *layout(**degrees), watch=Counted)
    first = many.said[: degrees["dp"]]  # of the first stage
    counted, filled = (sum(rows[i] for rank in first for rows in rank) for i in (0, 1))
    assert filled and len({len(rank) for rank in many.said}) == 1
    assert counted % (2 * degrees["dp"]) and counted + filled == 2 * degrees["dp"] * len(first[0])
    assert many.trace("val/loss") == pytest.approx(one.trace("val/loss"), abs=1e-7)
    assert many.trace("val/bits_per_byte") == pytest.approx(one.trace("val/bits_per_byte"), abs=1e-7)


@pytest.mark.long
def test_validation_leaves_training_alone(layouts):
    model = ("model=v3_moe", *FEW)
    often, once = (layouts.run(4, *model, f"trainer.eval_every_steps={n}", *layout(pp=2, dp=2, ep=2)) for n in (1, 3))
    assert len(often.trace("val/loss")) == 3 and len(once.trace("val/loss")) == 1
    for name in ("train/loss", "train/mtp_loss", "optim/grad_norm", "moe/load_cv", "moe/balance_loss"):
        assert often.trace(name) == once.trace(name), name
    before, after = once.weights(), often.weights()
    assert all(before[name].equal(after[name]) for name in before)


class Dies(Watch):
    def before_fit(self, parts, trainer):
        if parts.groups.rank == 1:
            raise ValueError("died on purpose")


def test_a_rank_that_dies_is_told_and_the_next_run_works(layouts):
    few = ("trainer.max_steps=1", "optim.warmup_steps=0", *layout(dp=2))
    with pytest.raises(RankDied, match=r"(?s)rank \d of 2 ended with 1: .*rank-1.log.*ValueError: died on purpose"):
        layouts.run(2, *few, watch=Dies)
    assert len(layouts.run(2, *few).trace("train/loss")) == 1


class Hangs(Watch):
    def before_fit(self, parts, trainer):
        if parts.groups.rank == 1:
            parts.groups.barrier()


def test_ranks_that_hang_are_ended(layouts):
    with pytest.raises(RankDied, match=r"(?s)rank 0 of 2 did not end within 5 s: .*most recent call first"):
        layouts.run(2, "trainer.max_steps=1", "optim.warmup_steps=0", *layout(dp=2), watch=Hangs, hang_seconds=5)
