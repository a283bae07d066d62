"""What the key branches names: checkpoints of one model, which are checked before anything is read from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_exp.errors import CheckpointError, ConfigError
from tests.experiment.test_job import checkpoint, job

V5 = ("model=v5_domain_moe",)
TRAINED = ("data=synthetic", "optim.warmup_steps=0", "init_from=aaaa")


@pytest.fixture
def start(tmp_path) -> Path:
    return checkpoint(tmp_path, *V5, run="a")


def test_a_run_is_its_last_checkpoint(tmp_path, start):
    law, finance = (checkpoint(tmp_path, *V5, run=run, start=start) for run in "bc")
    words = ("+branches.law=bbbb", f"+branches.finance={finance}", "+branches.general=aaaa", f"output_dir={tmp_path}")
    found = job(*TRAINED, *words).cfg
    assert found.init_from == str(start)
    assert found.branches == {"law": str(law), "finance": str(finance), "general": str(start)}


def test_branches_of_another_model_are_refused(tmp_path, start):
    other = checkpoint(tmp_path, *V5, run="b", step=3)
    checkpoint(tmp_path, *V5, run="c", start=other)
    with pytest.raises(ConfigError) as error:
        job(*TRAINED, "+branches.law=bbbb", "+branches.finance=cccc", f"output_dir={tmp_path}")
    assert [p.key for p in error.value.problems] == ["branches.law", "branches.finance"]
    assert all(f"does not start from the weights of init_from={start}" in str(p) for p in error.value.problems)


def test_a_branch_without_the_bias_of_its_start_is_refused(tmp_path, start):
    checkpoint(tmp_path, *V5, "model.moe.balance=none", run="b", start=start)
    with pytest.raises(ConfigError, match=r"has model\.moe\.balance=none, and the model that it starts from bias"):
        job(*TRAINED, "+branches.law=bbbb", f"output_dir={tmp_path}")


def test_a_branch_that_is_missing_is_named(tmp_path, start):
    with pytest.raises(CheckpointError, match=r"branches\.law='eeee' matches no single run"):
        job(*TRAINED, "+branches.law=eeee", f"output_dir={tmp_path}")


@pytest.mark.parametrize("do", ["train", "export"])
def test_a_run_from_branches_no_longer_needs_them(tmp_path, start, do):
    checkpoint(tmp_path, *V5, "init_from=aaaa", "+branches.law=bbbb", run="d", step=3)
    assert job(f"do={do}", "resume=dddd", f"output_dir={tmp_path}").cfg.branches == {}
