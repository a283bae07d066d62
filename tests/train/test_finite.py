"""What is not finite: found in every step and in all that would be saved, before anything good is lost for it."""

from __future__ import annotations

import resource
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from deepseek_exp.checkpoint import manifest
from deepseek_exp.config import Kernel
from deepseek_exp.errors import CheckpointError, UserError
from deepseek_exp.train import finite
from deepseek_exp.train.finite import LAG, FiniteSteps, first_nonfinite
from deepseek_exp.train.optim import build_optimizer, clip_gradients
from tests.config.test_config import composed
from tests.train.test_callbacks import fit  # noqa: F401 - a fixture

EVERY = ("trainer.checkpoint_every_steps=1", "trainer.keep_checkpoints=9", "trainer.log_every_steps=100")


class BadGradients(Callback):
    """Makes a gradient NaN in some steps."""

    def __init__(self, *steps):
        self.steps = steps

    def on_fit_start(self, trainer, pl_module):
        weight = pl_module.model.blocks[0].attention.wo.weight

        def spoil(grad):
            return grad * float("nan") if trainer.global_step + 1 in self.steps else grad

        weight.register_hook(spoil)


class BadValidation(Callback):
    """Makes the validation loss of a step NaN."""

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.global_step == 4:
            pl_module.val_sums[0] = float("nan")


class SmallDisk(Callback):
    """Lets no file grow beyond 100 kB once three steps are done."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def saved(folder):
    return [path.name for path in manifest.list_checkpoints(folder)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_tensor_that_is_not_finite_is_named(value, dtype):
    good, bad = torch.randn(7, 5).to(dtype), torch.randn(7, 5).to(dtype)
    bad[3, 2] = value
    others = [("none", torch.empty(0)), ("whole", torch.arange(3)), ("scalar", torch.tensor(2.0)), ("good", good)]
    assert first_nonfinite(others) is None
    assert first_nonfinite([*others, ("bad", bad), ("worse", bad)]) == "bad"
    assert first_nonfinite([]) is None


def test_a_loss_that_is_not_finite_ends_the_run_whatever_is_skipped():
    for way in ("stop", "skip"):
        steps = FiniteSteps(composed(f"trainer.on_nonfinite={way}"))
        outputs = {"loss": torch.tensor(float("inf")), "grad_norm": torch.tensor(1.0), "applied": True}
        with pytest.raises(UserError, match=r"train/loss=inf is not finite at step 3"):
            steps.on_train_batch_end(
                SimpleNamespace(global_step=3), SimpleNamespace(device=torch.device("cpu")), outputs, None, 0
            )


def test_on_a_gpu_a_step_is_looked_at_two_steps_later_or_before_saving(monkeypatch):
    waited = []

    def to_host(pair):
        return pair, SimpleNamespace(synchronize=lambda: waited.append(pair[0].item()))

    monkeypatch.setattr(finite, "to_host", to_host)
    steps, module = FiniteSteps(composed()), SimpleNamespace(device=torch.device("cuda"))
    for step in range(1, 6):
        outputs = {"loss": torch.tensor(float(step)), "grad_norm": torch.tensor(1.0), "applied": True}
        steps.on_train_batch_end(SimpleNamespace(global_step=step), module, outputs, None, 0)
        assert waited == [float(n) for n in range(1, step + 1 - LAG)]
    steps.check_all()
    assert waited == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("optimizer", "kernel", "dtype"),
    [
        ({"_target_": "torch.optim.AdamW"}, Kernel.torch, torch.float32),
        ({"_target_": "torch.optim.AdamW"}, Kernel.torch, torch.bfloat16),
        ({"_target_": "torch.optim.AdamW"}, Kernel.triton, torch.float32),
        ({"_target_": "torch.optim.Adafactor"}, Kernel.torch, torch.float32),
        ({"_target_": "torch.optim.SGD", "momentum": 0.9}, Kernel.torch, torch.float32),
        ({"_target_": "torch.optim.RMSprop", "momentum": 0.9}, Kernel.torch, torch.float32),
    ],
    ids=["adamw", "adamw-bf16", "adamw-fused", "adafactor", "sgd", "rmsprop"],
)
def test_a_skipped_step_changes_nothing_of_any_optimizer(optimizer, kernel, dtype):
    cfg = composed("trainer.on_nonfinite=skip")
    cfg = replace(cfg, optim=replace(cfg.optim, optimizer=optimizer))
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(dtype)
    optim = build_optimizer(cfg.optim, model, kernel)

    def backward(factor):
        (model(torch.ones(2, 5, dtype=dtype)).sum() * factor).backward()
        return clip_gradients(optim, cfg.optim.clip_norm)

    def content():
        kept = [(f"p{i}", p.detach().clone()) for i, p in enumerate(model.parameters())]
        for i, state in enumerate(optim.state.values()):
            kept += [(f"{i}.{kind}", v.clone()) for kind, v in state.items() if isinstance(v, torch.Tensor)]
        return dict(kept)

    backward(1.0)
    optim.step()
    optim.zero_grad()
    before = content()
    assert not backward(float("nan")).isfinite()
    optim.zero_grad()
    optim.step()
    after = content()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    backward(1.0)
    optim.step()
    assert not torch.equal(content()["p0"], before["p0"])


def test_weights_that_a_finite_gradient_spoilt_are_not_saved(fit, tmp_path):  # noqa: F811
    overrides = (*EVERY, "optim.lr=1e39", "optim.warmup_steps=0")
    with pytest.raises(
        UserError, match=r"optim\.lr=1e\+39 made \S*weight infinite or NaN by step 1, which is not saved"
    ):
        fit(overrides=overrides)
    assert saved(tmp_path) == []


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_removes_nothing(fit, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"val/loss=nan is not finite at step 4 .*\. Fix"):
        fit(BadValidation(), overrides=("trainer.checkpoint_every_steps=1", "trainer.keep_checkpoints=1"))
    assert saved(tmp_path) == ["step-00000002", "step-00000003"]  # the best and the newest


def test_skipped_steps_are_counted_across_a_resume_and_bounded(fit, tmp_path):  # noqa: F811
    overrides = (*EVERY, "trainer.on_nonfinite=skip", "trainer.max_skipped_steps=1")
    rule = r"trainer\.max_skipped_steps=1 is exceeded: with step 4, 2 steps of the run had an infinite or NaN gradient"
    with pytest.raises(UserError, match=rule):
        fit(BadGradients(2, 4), overrides=overrides)
    assert saved(tmp_path) == [f"step-0000000{n}" for n in (1, 2, 3)]
    with pytest.raises(UserError, match=rule):
        fit(BadGradients(4), overrides=overrides, checkpoint=tmp_path / "checkpoints" / "step-00000003")


def test_a_full_disk_is_told_in_one_error_and_the_older_checkpoint_stays(fit, tmp_path):  # noqa: F811
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError) as caught:
            fit(SmallDisk(), overrides=("trainer.checkpoint_every_steps=3", "trainer.eval_every_steps=100"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (problem,) = caught.value.problems
    assert problem.key == "output_dir" and problem.value == str(tmp_path / "checkpoints")
    assert "cannot take the checkpoint of step 6 (" in problem.rule and "File too large" in problem.rule
    assert "MB are free" in problem.rule and "resume=last" in problem.fix
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    manifest.verify(tmp_path / "checkpoints" / "step-00000003")
