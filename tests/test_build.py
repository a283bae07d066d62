"""What is refused before anything is built, and what is compiled."""

from __future__ import annotations

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


def test_before_a_model_is_sampled_from(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "free_memory", lambda device: 0)
    cfg = composed("size=tiny", "do=sample", "device=cpu")
    with pytest.raises(DeviceError, match=r"needs 0.0 GB for its 125,256 parameters and cpu has 0.0 GB free"):
        do.run(Job(cfg, yaml="", name="", overrides=(), run_dir=tmp_path, checkpoint=None, in_sweep=False))


@pytest.mark.parametrize(("n_mtp_layers", "compiled"), [(0, False), (1, True)])
def test_the_pass_that_looks_ahead_is_compiled_where_there_is_one(n_mtp_layers, compiled):
    cfg = composed("model=v3_moe", "size=tiny", "trainer.compile=true", f"model.n_mtp_layers={n_mtp_layers}")
    model = build.build_model(cfg, CPU, None)
    assert (model._compiled_call_impl is not None, "forward_ahead" in vars(model)) == (True, compiled)
