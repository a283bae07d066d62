"""The matrices that patterns select, by names that are known without building a model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from deepseek_exp.config.matrices import adapted, adapter_size, matrix_shapes
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer
from deepseek_exp.planner import coverage, misfit
from deepseek_exp.planner.layers import layers_of
from deepseek_exp.planner.search import asked_layout, make_plan
from tests.adapt.adapters import experiment
from tests.planner.test_cost import MODELS

OTHERS = {
    "no latent of queries": ("v3_moe", ("model.q_lora_rank=0",)),
    "tied": ("v3_moe", ("model.tie_embeddings=true",)),
    "biases": ("v4_distill", ("model.qkv_bias=true", "model.qk_norm=true")),
    "no shared experts": ("v2_moe", ("model.moe.n_shared_experts=0",)),
}
CASES = {**{name: (name, ()) for name in MODELS}, **OTHERS}


@pytest.mark.parametrize("case", CASES)
def test_the_matrices_are_those_of_the_model(case):
    version, changes = CASES[case]
    exp = experiment(version, *changes)
    with torch.device("meta"):
        model = Transformer(exp.model, TORCH)
    built = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}
    assert list(matrix_shapes(exp.model).items()) == list(built.items())


def chosen(exp, targets, exclude=()):
    return list(adapted(exp.model, dataclasses.replace(exp.lora, targets=list(targets), exclude=list(exclude))))


def test_patterns():
    exp = experiment("v5_domain_moe")
    every = list(matrix_shapes(exp.model))
    assert chosen(exp, ["*"]) == every
    rest = ("embedding.weight", "head.weight")
    assert chosen(exp, ["*.w*"]) == [n for n in every if n not in rest and ".router." not in n]
    assert chosen(exp, ["*.experts.*"], ["*.w_down"]) == [n for n in every if n.endswith(("s.w_gate", "s.w_up"))]
    assert chosen(exp, ["blocks.0.attention.wq"]) == chosen(exp, ["blocks.0.attention.wq.weight"])
    assert chosen(exp, ["head", "embedding"]) == ["embedding.weight", "head.weight"]
    assert adapted(exp.model, dataclasses.replace(exp.lora, rank=0)) == {}


def test_coverage_by_hand():
    assert adapter_size({"a": (10, 6), "b": (3, 10, 6)}, 4) == 4 * 16 + 3 * 4 * 16
    exp = experiment("v2_moe", "lora.targets=[*.experts.w_up,head]")
    found, m = coverage(exp), exp.model
    n, d, f = m.moe.n_routed_experts, m.d_model, m.moe.d_expert
    n_moe = m.n_layers - m.moe.n_dense_layers
    assert found.n_trained == 4 * (n_moe * n * (d + f) + m.vocab_size + d)
    assert found.n_covered == n_moe * n * d * f + m.vocab_size * d
    assert len(found.with_adapter) == n_moe + 1
    assert f"rank 4 on {n_moe + 1} of " in found.sentence()
    assert found.table().count("none, frozen") == len(found.without)


def planned(exp):
    return make_plan(exp, asked_layout(exp), layers_of(exp.model, exp.data.seq_len, exp.lora))


def test_the_plan_counts_what_is_trained():
    exp = experiment("v3_moe")
    whole, adapters = planned(dataclasses.replace(exp, lora=dataclasses.replace(exp.lora, rank=0))), planned(exp)
    (before,), (after,), found = whole.memory, adapters.memory, coverage(exp)
    assert after.weights - before.weights == 4 * found.n_trained
    assert (after.gradients, after.optimizer) == (4 * found.n_trained, 8 * found.n_trained)
    assert before.gradients == 4 * found.n_parameters
    summed = [n for n in found.with_adapter if any(p in n for p in ("experts.", "wkv_b", "router", "embed", "head"))]
    kept = sum(math.prod(found.with_adapter[name]) for name in summed)
    assert after.activations - before.activations == 4 * kept


def test_a_stage_without_an_adapter_is_refused():
    layout = ("parallel.pp=2", "parallel.zero_stage=1", "model.n_layers=4", "trainer.micro_batch_seqs=1")
    problem = misfit(experiment("v1_dense", *layout, "lora.targets=[blocks.0.*]"))
    assert problem is not None and (problem.key, problem.id) == ("lora.targets", "misfit")
    assert "selects no matrix of stage 1 of parallel.pp=2" in problem.rule
    assert misfit(experiment("v1_dense", *layout, "lora.targets=[*.wq]")) is None
