"""Optimizer states of another shape than their parameter's, such as Adafactor's factors, survive every legal layout."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.shards import open_state
from deepseek_exp.errors import UserError
from deepseek_exp.parallel.rank_state import scalar_state
from tests.config.test_config import composed
from tests.parallel.layouts import SHORT, layout

ADAFACTOR = (
    "model=v1_dense",
    "optim=adafactor",
    "optim.lr=1e-3",
    "optim.min_lr_ratio=1",
    "trainer.max_steps=4",
    "trainer.eval_every_steps=2",
    "trainer.checkpoint_every_steps=2",
    "trainer.keep_checkpoints=2",
)
DP2 = (2, layout(dp=2, zero_stage=0))
ONE = (1, ())


def states(folder, index):
    """Read every optimizer state of a run's checkpoint: (parameter, kind) -> tensor."""
    state = open_state(manifest.list_checkpoints(folder)[index])
    return {(name, kind): state.read(name, kind) for name in state.names for kind in state.kinds(name)}


@pytest.fixture(scope="module")
def unbroken(layouts):
    return {n: layouts.run(n, *ADAFACTOR, *words) for n, words in (ONE, DP2)}


@pytest.fixture(scope="module")
def halfway(unbroken, tmp_path_factory):
    """Copy the runs without their last checkpoint."""
    copies = {}
    for n, ran in unbroken.items():
        folder = tmp_path_factory.mktemp(f"halfway-{n}")
        shutil.copytree(ran.folder, folder, dirs_exist_ok=True)
        shutil.rmtree(manifest.list_checkpoints(folder)[-1])
        copies[n] = dataclasses.replace(ran, folder=folder)
    return copies


def test_ranks_save_what_one_process_saves(halfway):
    one, two = states(halfway[1].folder, -1), states(halfway[2].folder, -1)
    assert {kind for _, kind in one} == {"weight", "row_var", "col_var", "variance"}
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in two.items()}
    assert all((one[key] - two[key]).abs().max() <= 1e-6 for key in one)


@pytest.mark.parametrize(("before", "after"), [(DP2, DP2), (DP2, ONE), (ONE, DP2)], ids=["dp2-dp2", "dp2-1", "1-dp2"])
def test_adafactor_resumes_where_it_was(layouts, unbroken, halfway, before, after):
    resumed = layouts.run(after[0], *ADAFACTOR, *after[1], resume=halfway[before[0]])
    want = unbroken[after[0]]
    losses, expected = resumed.trace("train/loss"), want.trace("train/loss")[2:]
    found, reference = states(resumed.folder, -1), states(want.folder, -1)
    if before == after:
        assert losses == expected and all(torch.equal(found[key], reference[key]) for key in reference)
    assert all(abs(x - y) <= 2e-6 for x, y in zip(losses, expected, strict=True))
    assert all((found[key] - reference[key]).abs().max() <= 1e-5 for key in reference)


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"dp": 2}, {"dp": 2, "zero_stage": 3}, {"pp": 2}], ids=str)
def test_layouts_that_cut_a_parameter_are_refused(degrees):
    with pytest.raises(UserError, match=r"optim\.optimizer\._target_='torch\.optim\.Adafactor' cannot be used with"):
        composed(*SHORT, *ADAFACTOR, *layout(**degrees))


def test_expert_parallelism_is_refused_without_zero():
    words = [w for w in ADAFACTOR if w != "model=v1_dense"]
    with pytest.raises(UserError, match=r"cannot be used with parallel\.ep=2 on 2 ranks \(a rank has a part"):
        composed(*SHORT, "model=v3_moe", *words, *layout(dp=2, ep=2, zero_stage=0))


@pytest.mark.parametrize(
    ("arguments", "device"), [({}, "cpu"), ({"capturable": True}, "meta"), ({"fused": True}, "meta")]
)
def test_a_count_lies_where_the_optimizer_reads_it(arguments, device):
    weight = torch.nn.Parameter(torch.ones(2, device="meta"))  # stands for a GPU
    optimizer = torch.optim.AdamW([weight])
    optimizer.param_groups[0].update(arguments)
    count = scalar_state(optimizer, weight, 3.0)
    assert (count.device.type, count.dtype, count.shape) == (device, torch.float32, ())
    by_pytorch = optimizer.state_dict()
    by_pytorch["state"] = {0: {"step": torch.tensor(3.0)}}
    optimizer.load_state_dict(by_pytorch)
    assert optimizer.state[weight]["step"].device == count.device
