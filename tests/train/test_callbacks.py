"""Signals at every moment of a training, in this process: what is saved, validated and left behind."""

from __future__ import annotations

import signal

import pytest
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping

from deepseek_exp.checkpoint import manifest
from deepseek_exp.errors import Stopped, UserError
from deepseek_exp.launch import worker
from deepseek_exp.train import build
from tests.config.test_config import composed

STEPS = 6


class Recorder:
    """Takes what would be tracked."""

    def __init__(self, run_dir):
        self.run_dir, self.logged = run_dir, []

    def log_metrics(self, values, step):
        self.logged += [(name, step) for name in values]

    log_foreign_metrics = log_metrics

    def steps(self, name):
        return [step for n, step in self.logged if n == name]


class Signal(Callback):
    """Sends a signal to this process at a hook of a step."""

    def __init__(self, hook, step, signum=signal.SIGTERM):
        self.step, self.signum = step, signum
        setattr(self, hook, self._send)

    def _send(self, trainer, *_):
        if trainer.global_step == self.step:
            self.step = None
            signal.raise_signal(self.signum)


@pytest.fixture
def fit(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def run(*extra, overrides=(), checkpoint=None):
        cfg = composed(
            "size=tiny",
            "data=synthetic",
            f"output_dir={tmp_path}",
            f"trainer.max_steps={STEPS}",
            "trainer.eval_every_steps=2",
            "trainer.eval_seqs=8",
            "trainer.checkpoint_every_steps=100",
            "trainer.log_every_steps=1",
            "trainer.n_threads=1",
            "optim.warmup_steps=2",
            *overrides,
        )
        recorder = Recorder(tmp_path)
        parts = build.build_parts(cfg)
        trainer, _, _ = build.build_trainer(cfg, parts, recorder, "run", {})
        trainer.callbacks = [*extra, *trainer.callbacks]
        try:
            trainer.fit(parts.lit, datamodule=parts.datamodule, ckpt_path=checkpoint)
            stopped = None
        except Stopped as error:
            stopped = error
        assert {s: signal.getsignal(s) for s in handlers} == handlers, "the signal handlers were not put back"
        saved = [int(p.name[5:]) for p in manifest.list_checkpoints(tmp_path)]
        return stopped, saved, recorder

    threads = torch.get_num_threads()
    yield run
    signal.signal(signal.SIGHUP, before)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("signum", "hook", "step", "stop", "validated"),
    [
        # a step that is not validated: saved and stopped right after it
        (signal.SIGTERM, "on_train_batch_start", 2, 3, [2]),
        (signal.SIGINT, "on_train_batch_start", 3, 4, [2, 4]),  # a step that is: its validation comes first
        (signal.SIGHUP, "on_validation_batch_start", 4, 4, [2, 4]),
    ],
)
def test_a_signal_saves_and_stops(fit, signum, hook, step, stop, validated):
    stopped, saved, recorder = fit(Signal(hook, step, signum))
    assert (stopped.signum, stopped.step) == (signum, stop)
    assert saved == [stop] and recorder.steps("val/loss") == validated
    assert recorder.steps("train/loss") == list(range(1, stop + 1))


def test_a_shell_that_ends_may_send_two_signals(fit):
    stopped, saved, _ = fit(
        Signal("on_train_batch_start", 3, signal.SIGHUP), Signal("on_validation_batch_start", 4, signal.SIGHUP)
    )
    assert (stopped.signum, saved) == (signal.SIGHUP, [4])


def test_nohup_is_obeyed(fit):
    """Python leaves a signal ignored that was ignored when it started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert worker.stop_signals() == [signal.SIGTERM, signal.SIGINT]
    signal.signal(signal.SIGHUP, before)
    assert worker.stop_signals() == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize(("hook", "step"), [("on_train_batch_start", STEPS - 1), ("on_validation_batch_start", STEPS)])
def test_a_signal_in_the_last_step_lets_the_run_finish(fit, hook, step):
    stopped, saved, recorder = fit(Signal(hook, step))
    assert stopped is None and saved == [STEPS] and recorder.steps("val/loss") == [2, 4, 6]


def test_a_stopped_run_goes_on_where_it_was(fit, tmp_path):
    fit(Signal("on_train_batch_start", 3))
    _, _, recorder = fit(checkpoint=tmp_path / "checkpoints" / "step-00000004")
    assert recorder.steps("train/loss") == [5, 6] and recorder.steps("val/loss")[-1] == 6


def test_one_process_within_a_job_of_slurm(fit, monkeypatch):
    """Lightning would take the allocation's 8 tasks for this training's."""
    for name, value in {"NTASKS": "8", "JOB_ID": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    stopped, saved, _ = fit()
    assert stopped is None and saved == [STEPS]


def test_early_stopping_saves_its_last_step(fit):
    stop = EarlyStopping(monitor="val/loss", patience=1, min_delta=100.0)
    stopped, saved, _ = fit(stop)
    assert stopped is None and saved == [4]


PATIENT = ("trainer.patience=2", "trainer.min_delta=100", "trainer.eval_every_steps=1", "trainer.keep_checkpoints=1")


def test_patience_ends_the_run_and_keeps_the_best(fit):
    """No validation is better than the first by 100 nats, and only validated steps that are best or last are saved."""
    stopped, saved, recorder = fit(overrides=PATIENT)
    assert stopped is None and recorder.steps("val/loss") == [1, 2, 3] and saved[-1] == 3
    _, saved, recorder = fit(
        overrides=("trainer.patience=2", "trainer.eval_every_steps=1", "trainer.keep_checkpoints=9")
    )
    assert saved == recorder.steps("val/loss") == [1, 2, 3, 4, 5, 6]  # each is better than the one before


def test_patience_goes_on_counting_after_a_resume(fit, tmp_path):
    fit(Signal("on_train_batch_start", 1), overrides=PATIENT)  # stops after step 2, which was the first in vain
    _, _, recorder = fit(overrides=PATIENT, checkpoint=tmp_path / "checkpoints" / "step-00000002")
    assert recorder.steps("val/loss") == [3]


def test_a_diverged_state_is_not_saved(fit, tmp_path):
    """Every step is checked, logged or not: here the gradients are NaN a step before the loss is."""
    overrides = (
        "optim.lr=1e30",
        "optim.clip_norm=0",
        "trainer.log_every_steps=100",
        "trainer.checkpoint_every_steps=5",
    )
    with pytest.raises(UserError, match=r"optim/grad_norm=nan is not finite at step 2 "):
        fit(overrides=overrides)
    assert manifest.list_checkpoints(tmp_path) == []


def test_a_learning_rate_named_at_resume_holds(fit, tmp_path):
    fit(Signal("on_train_batch_start", 2))
    rates = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            rates.append(outputs["lr"])

    fit(
        Watch(),
        overrides=("optim.lr=1e-5", "optim.min_lr_ratio=1"),
        checkpoint=tmp_path / "checkpoints" / "step-00000003",
    )
    assert rates == [1e-5] * 3
