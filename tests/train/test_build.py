"""What is refused before anything is built, and what is compiled."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO
from deepseek_exp.commands import dispatch
from deepseek_exp.config.topology import Degrees
from deepseek_exp.data import Tokenizer
from deepseek_exp.errors import CheckpointError, DeviceError
from deepseek_exp.experiment.job import Job
from deepseek_exp.kernels import grouped
from deepseek_exp.launch import local, worker
from deepseek_exp.parallel import groups, runtime
from deepseek_exp.train import build
from tests.config.test_config import composed

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
    Tokenizer.train(["some text to train on"] * 3, 300).save(tmp_path / "tokenizer.json")  # its prompt is checked first
    cfg = composed("size=tiny", "do=sample", "device=cpu")
    cfg = replace(cfg, data=replace(cfg.data, tokenizer=str(tmp_path / "tokenizer.json")))
    with pytest.raises(DeviceError, match=r"needs 0.0 GB for its 125,256 parameters and cpu has 0.0 GB free"):
        dispatch.run(Job(cfg, "", "", (), None, "tiny", tmp_path, None, None, None, in_sweep=False))


def test_what_training_goes_through_is_compiled_where_asked_for():
    for compiled in (False, True):
        cfg = composed("model=v3_moe", "size=tiny", f"trainer.compile={str(compiled).lower()}")
        model = build.build_model(cfg, CPU, None)
        assert ("losses" in vars(model)) == compiled


def test_a_job_of_a_sweep_has_its_own_number_of_threads():
    before = torch.get_num_threads()
    try:
        for asked, got in ((2, 2), (0, runtime.N_THREADS), (3, 3), (1, 1)):
            runtime.set_up_torch(composed("size=tiny", f"trainer.n_threads={asked}"))
            assert torch.get_num_threads() == got
    finally:
        torch.set_num_threads(before)


def test_a_pytorch_that_leaves_rubbish_for_an_expert_without_tokens_is_refused(monkeypatch):
    """As pytorch/pytorch#172439 says of GPUs of compute capability 10."""
    assert grouped.empty_groups_are_zero(CPU)
    right = grouped.F.grouped_mm

    def wrong(x, y, offs):
        products = right(x, y, offs=offs)
        products[2, 0, 0] = float("nan")
        return products

    monkeypatch.setattr(grouped.F, "grouped_mm", wrong)
    monkeypatch.setattr(build, "empty_groups_are_zero", lambda device: grouped.empty_groups_are_zero(CPU))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    gpu = torch.device("cuda", 0)
    with pytest.raises(DeviceError, match=r"model\.moe\.n_routed_experts=\d+ may leave experts without a token, whose"):
        build.check_grouped_products(composed("model=v3_moe", "size=tiny"), gpu)
    build.check_grouped_products(composed("model=v1_dense", "size=tiny"), gpu)
    build.check_grouped_products(composed("model=v3_moe", "size=tiny"), CPU)


@pytest.mark.parametrize("dp", [1, 2])
def test_grouped_products_are_checked_before_a_model_is_built(monkeypatch, dp):
    class Checked(Exception):
        pass

    def check(cfg, device):
        raise Checked

    for name in ("connect", "check_memory"):
        monkeypatch.setattr(build, name, lambda *_: None)
    monkeypatch.setattr(build, "degrees", lambda _: Degrees(dp=dp, tp=1, pp=1, ep=1))
    monkeypatch.setattr(build, "check_grouped_products", check)
    with pytest.raises(Checked):
        build.build_parts(composed("model=v3_moe", "size=tiny", "device=cpu"))


def test_memory_that_an_earlier_job_left_counts_as_free(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 if "empty_cache" in called else 3, 9))
    assert build.free_memory(torch.device("cuda", 0)) == 7


def test_weights_that_are_not_finite_are_refused(tmp_path):
    cfg = composed("size=tiny", "do=sample", "device=cpu")
    weights = build.build_model(cfg, CPU, None).state_dict()
    save = FolderCheckpointIO({}, "0123456789").save_checkpoint
    for step, value in ((1, 1.0), (2, float("nan"))):
        weights["blocks.1.attention.wo.weight"][0, 0] = value
        tree = {"state_dict": {f"model.{name}": w for name, w in weights.items()}, "global_step": step}
        save(tree, tmp_path / "checkpoints" / f"step-0000000{step}")
    build.build_model(cfg, CPU, tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(
        CheckpointError, match=r"step-00000002' holds infinite or NaN numbers in blocks\.1\.attention\.wo"
    ):
        build.build_model(cfg, CPU, tmp_path / "checkpoints" / "step-00000002")


def test_only_the_wait_for_the_data_is_long(monkeypatch):
    made = []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "new_group", lambda *args, **kwargs: made.append(kwargs["timeout"]) or len(made))
    waited = []
    monkeypatch.setattr(dist, "barrier", lambda group: waited.append(made[group - 1]))
    of = groups.Groups(Degrees(dp=2, tp=2, pp=2, ep=1), CPU, 4)
    of.barrier()
    of.wait_for_data()
    assert waited == [groups.TIMEOUT, groups.DATA_TIMEOUT]
    assert made.count(groups.DATA_TIMEOUT) == 1 and set(made) == {groups.TIMEOUT, groups.DATA_TIMEOUT}


def test_the_wait_for_the_run_id_is_long_too(monkeypatch):
    class Store(dist.TCPStore):
        def get(self, key):
            waits.append(self.timeout)
            return super().get(key)

    waits, meeting = [], local._local_store()
    monkeypatch.setattr(dist, "TCPStore", Store)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(meeting.port))
    assert worker.share("name", "value") == worker.share("name", None) == "value"
    assert waits == [groups.DATA_TIMEOUT] * 2
