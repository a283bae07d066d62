"""What is refused before anything is built, and what is compiled."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_exp import build, do
from deepseek_exp.errors import DeviceError
from deepseek_exp.job import Job
from tests.test_config import composed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("overrides", "bytes_per_parameter"),
    [([], 16), (["trainer.precision=bf16"], 18), (["do=sample"], 4), (["do=eval", "trainer.precision=bf16"], 2)],
)
def test_a_model_that_memory_cannot_hold_is_refused(monkeypatch, overrides, bytes_per_parameter):
    cfg = composed("size=tiny", *overrides)
    needed = 125_256 * bytes_per_parameter
    monkeypatch.setattr(build, "free_memory", lambda device: needed)
    build.check_memory(cfg, CPU)
    monkeypatch.setattr(build, "free_memory", lambda device: needed - 1)
    with pytest.raises(DeviceError, match=r"needs 0.0 GB for its 125,256 parameters and cpu has 0.0 GB free"):
        build.check_memory(cfg, CPU)


def test_before_anything_is_read_or_built(tmp_path):
    with pytest.raises(DeviceError, match="needs 28,392"):
        build.build_parts(composed("model=v3_moe", "size=published", "device=cpu", f"output_dir={tmp_path}"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "a_parameter"),
    [
        ((), 4 + 4 + 8),  # weight, gradient, two moments
        (("trainer.precision=bf16",), 2 + 4 + 4 + 8),  # and the master
        (("trainer.precision=bf16", "kernels.adamw=triton", "optim.state_bits=8"), 2 + 4 + 4 + 2 + 8 / 256),
    ],
)
def test_training_needs_what_its_optimizer_keeps(monkeypatch, overrides, a_parameter):
    cfg = composed("size=tiny", "device=cpu", *overrides)
    needed = 125_256 * a_parameter
    monkeypatch.setattr(build, "free_memory", lambda device: math.ceil(needed))
    build.check_memory(cfg, CPU)
    monkeypatch.setattr(build, "free_memory", lambda device: math.floor(needed) - 1)
    with pytest.raises(DeviceError, match="take a smaller size"):
        build.check_memory(cfg, CPU)


def test_before_a_model_is_sampled_from(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "free_memory", lambda device: 0)
    cfg = composed("size=tiny", "do=sample", "device=cpu")
    with pytest.raises(DeviceError, match=r"needs 0.0 GB for its 125,256 parameters and cpu has 0.0 GB free"):
        do.run(Job(cfg, yaml="", name="", overrides=(), run_dir=tmp_path, checkpoint=None, in_sweep=False))


def test_what_training_goes_through_is_compiled_where_asked_for():
    for compiled in (False, True):
        cfg = composed("model=v3_moe", "size=tiny", f"trainer.compile={str(compiled).lower()}")
        model = build.build_model(cfg, CPU, None)
        assert ("losses" in vars(model)) == compiled


def test_a_job_of_a_sweep_has_its_own_number_of_threads():
    before = torch.get_num_threads()
    try:
        for asked, got in ((2, 2), (0, build.N_THREADS), (3, 3), (1, 1)):
            build.set_up_torch(composed("size=tiny", f"trainer.n_threads={asked}"))
            assert torch.get_num_threads() == got
    finally:
        torch.set_num_threads(before)
