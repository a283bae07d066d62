"""Parameter names without a model, and the groups that share optimizer settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deepseek_exp.config.parameter_groups import GroupSettings, group_names, parameter_names, settings_of
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer
from tests.config.test_config import composed

VERSIONS = ("v1_dense", "v2_moe", "v2_5_sparse", "v3_moe", "v4_distill", "v5_domain_moe", "deepseek_v3")
VARIED = {
    "v1_dense": ("model.qkv_bias=true", "model.qk_norm=true", "model.tie_embeddings=false"),
    "v2_moe": ("model.moe.n_shared_experts=1",),
    "v3_moe": ("model.q_lora_rank=0", "model.n_mtp_layers=2"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_names_are_those_of_the_model(version):
    for more in ((), VARIED.get(version, ())):
        cfg = composed(f"model={version}", "size=tiny", *more).model
        with torch.device("meta"):
            model = Transformer(cfg, TORCH)
        assert sorted(parameter_names(cfg)) == sorted(name for name, _ in model.named_parameters())


def test_factors_of_matching_patterns_multiply():
    optim = dataclasses.replace(composed().optim, lr_multipliers={"blocks.*": 0.5, "*.wo.*": 0.1})
    assert settings_of(optim, "blocks.3.attention.wo.weight", 2) == GroupSettings(True, False, 0.05)
    assert settings_of(optim, "blocks.3.attention_norm.weight", 1) == GroupSettings(False, False, 0.5)
    assert settings_of(optim, "head.weight", 2) == GroupSettings(True)


def test_groups_that_decay_come_first():
    optim, ndims = composed("optim=muon").optim, {"head.norm.weight": 1, "embedding.weight": 2, "blocks.0.wq.weight": 2}
    assert group_names(optim, ndims) == {
        GroupSettings(True): ["embedding.weight"],
        GroupSettings(True, True): ["blocks.0.wq.weight"],
        GroupSettings(False): ["head.norm.weight"],
    }
