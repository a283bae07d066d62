"""The trial before the training: it does what a training step does, and leaves no trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.train import build, probe
from deepseek_exp.train.probe import step_seconds
from tests.config.test_config import composed

SMALL = ("size=tiny", "device=cpu", "trainer.global_batch_seqs=8", "trainer.micro_batch_seqs=4")
MEMORY = ("model=v1_dense", "data=synthetic", "data.order=contiguous", "model.memory_len=15")


def experiment(folder, *overrides: str) -> tuple[ExperimentConfig, build.Parts]:
    cfg = composed(*SMALL, *overrides, f"output_dir={folder}", f"data.cache_dir={folder}")
    return cfg, build.build_parts(cfg)


def mixture(folder) -> list[str]:
    names = ("general", "law")
    for name in names:
        (folder / f"{name}.txt").write_text(f"the {name} of things\n" * 3000)
    return ["model=v5_domain_moe", "data=mixture", *(f"+data.mixture.{n}.path={folder / n}.txt" for n in names)]


def state(lit) -> dict[str, torch.Tensor]:
    named = {**dict(lit.named_parameters()), **dict(lit.named_buffers())}  # the counts are no part of state_dict()
    return {"rng": torch.get_rng_state(), **{name: t.detach().clone() for name, t in named.items()}}


def test_it_leaves_no_trace(tmp_path):
    for overrides in (["model=v3_moe", "data=synthetic"], MEMORY, mixture(tmp_path)):
        cfg, parts = experiment(tmp_path, *overrides)
        before = state(parts.lit)
        assert step_seconds(cfg, parts) > 0
        after = state(parts.lit)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert all(p.grad is None for p in parts.lit.parameters())
        assert (parts.lit.engine.memories, parts.datamodule.position) == ({}, 0)


def test_tokens_further_ahead_are_predicted(tmp_path):
    cfg, parts = experiment(tmp_path, "model=v3_moe", "data=synthetic", "model.n_mtp_layers=1")
    seen = []
    parts.lit.model.mtp[0].register_forward_hook(lambda *_: seen.append(1))
    step_seconds(cfg, parts)
    assert len(seen) == 3


def test_a_memory_is_attended_to_where_there_is_one(tmp_path):
    cfg, parts = experiment(tmp_path, *MEMORY)
    seen = []
    parts.lit.model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1].shape[1]))
    step_seconds(cfg, parts)
    assert seen == [0, 15, 15]


def test_the_domain_of_the_text_is_known_as_in_training(tmp_path):
    cfg, parts = experiment(tmp_path, *mixture(tmp_path))
    seen = []
    parts.lit.model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[3].tolist()))
    step_seconds(cfg, parts)
    assert seen == [[0] * 4] * 3


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_it_is_the_time_of_all_micro_batches(tmp_path, monkeypatch, micro_batches):
    cfg, parts = experiment(tmp_path, "data=synthetic", f"trainer.global_batch_seqs={4 * micro_batches}")
    clock = iter([0, 9, 10, 12, 20, 23])  # seconds: 9 to warm up, then 2 and 3
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert step_seconds(cfg, parts) == 2 * micro_batches
