"""Callbacks around a training step: metrics, progress, checkpoints and signals."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.lightning_io import remove_unfinished
from deepseek_exp.config import ExperimentConfig, OnNonfinite
from deepseek_exp.data import Batch
from deepseek_exp.errors import CheckpointError, Problem, Stopped, UserError
from deepseek_exp.launch import worker
from deepseek_exp.models.block import Block
from deepseek_exp.models.moe import FeedForward, routing_metrics
from deepseek_exp.train.finite import FiniteSteps, check_finite, to_host
from deepseek_exp.train.lit import LanguageModel
from deepseek_exp.train.patience import Patience

NAMES = ("loss", "nats", "bytes", "grad_norm")


class Metrics(Callback):
    """Logs training metrics without making the host wait for the device.

    A step's scalars are copied to the host asynchronously, after the step's work, and logged when the copy is complete,
    about a step later; on a CPU at once. Non-finite values of a step that FiniteSteps rejects or that was skipped are
    not logged.
    """

    def __init__(self, cfg: ExperimentConfig) -> None:
        self.cfg = cfg
        self.pending: deque[tuple[int, list[str], Tensor, Any, dict[str, float]]] = deque()
        self.last: dict[str, float] = {}
        self._since = (0.0, 0)
        self._position = 0  # in the data at that time

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since, self._position = (time.perf_counter(), trainer.global_step), trainer.datamodule.position

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Queue this step's scalars if they are due or the step was skipped, and log those that have arrived."""
        step = trainer.global_step
        due = step % self.cfg.trainer.log_every_steps == 0 or step == 1 or step >= self.cfg.last_step
        if due or not outputs["applied"]:
            now, (then, before) = time.perf_counter(), self._since
            seconds = (now - then) / max(1, step - before)
            n_seqs = (trainer.datamodule.position - self._position) / max(1, step - before)  # of a step, on average
            self._since, self._position = (now, step), trainer.datamodule.position
            rate = n_seqs * (batch.tokens.shape[1] - 1) / seconds
            host = {"optim/lr": outputs["lr"], **self._host_metrics(trainer, pl_module, seconds, rate)}
            if self.cfg.trainer.on_nonfinite is OnNonfinite.skip:
                host["optim/skipped_steps"] = float(pl_module.skipped_steps)
            scalars = {n: outputs[n] for n in NAMES} | outputs["extra_metrics"]
            if outputs["expert_counts"]:
                counts = torch.stack(outputs["expert_counts"])
                routing = routing_metrics(self.cfg.model.moe, counts, labelled=bool(self.cfg.data.mixture))
                scalars |= {f"moe/{name}": value for name, value in routing.items()}
            copy, event = to_host(torch.stack([v.double() for v in scalars.values()]))
            self.pending.append((step, list(scalars), copy, event, host))
        self._log(trainer, wait=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what is queued, and exclude the validation from the step time."""
        self._log(trainer, wait=True)
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resume the clock, and log the metrics of the model's parts."""
        then, before = self._since
        self._since = (then + time.perf_counter() - self._paused, before)
        if trainer.state.fn == "fit":
            values = _of_parts(pl_module, self.cfg) | pl_module.ranks.layout_metrics()
            trainer.logger.log_metrics(values, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what is queued."""
        self._log(trainer, wait=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Log what is queued before the run ends."""
        self._log(trainer, wait=True)

    def _host_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, seconds: float, rate: float
    ) -> dict[str, float]:
        data = trainer.datamodule
        metrics = {
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": rate,
            "data/position": float(data.position),
            "data/tokens": float(data.position * self.cfg.data.seq_len),
            "data/epoch": data.position / data.n_train_sequences,
        }
        if pl_module.device.type == "cuda":
            metrics["perf/peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(pl_module.device))
        return metrics

    def _log(self, trainer: pl.Trainer, *, wait: bool) -> None:
        while self.pending and (wait or _arrived(self.pending[0][3])):
            step, names, values, event, host = self.pending.popleft()
            if event is not None:
                event.synchronize()
            scalars = dict(zip(names, values.tolist(), strict=True))
            loss, nats, n_bytes, grad_norm = (scalars.pop(n) for n in NAMES)
            row = {
                "train/loss": loss,
                "train/bits_per_byte": nats / math.log(2) / n_bytes,
                "optim/grad_norm": grad_norm,
                **scalars,
                **host,
            }
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                row = {name: value for name, value in row.items() if math.isfinite(value)}
            self.last |= row
            trainer.logger.log_metrics(row, step)


def _of_parts(lit: LanguageModel, cfg: ExperimentConfig) -> dict[str, float]:
    """Return how much the attention weighs its window against global keys, and how sparse the hidden units were.

    attn/gate is averaged over heads and in 0..1; 0.5 treats local and global keys alike.
    """
    values: dict[str, float | None] = {}
    blocks = [m for m in lit.model.blocks if isinstance(m, Block)]
    values["attn/gate"] = lit.ranks.mean(
        [b.attention.gate.float().sigmoid() for b in blocks if b.attention.gate is not None]
    )
    sparse = [m for m in lit.model.modules() if isinstance(m, FeedForward) and m.d_ff_active]
    fractions = [m.active_fraction for m in sparse if m.active_fraction is not None]
    values["ffn/active_fraction"] = lit.ranks.mean(fractions)
    return {name: value for name, value in values.items() if value is not None}


def _arrived(event: Any) -> bool:
    return event is None or event.query()


class Progress(Callback):
    """A progress bar with loss, tokens per second and time left; plain lines without a terminal."""

    LINE_SECONDS = 20.0

    def __init__(self, cfg: ExperimentConfig, metrics: Metrics) -> None:
        self.last_step, self.metrics = cfg.last_step, metrics
        self.bar: tqdm | None = None
        self.speed: float | None = None  # tokens per second of the whole training, set at its end
        self._seq_len = cfg.data.seq_len
        self._began, self._validating = (0.0, 0), 0.0  # time and position in the data

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, at the step that a resumed run continues from."""
        tty = sys.stderr.isatty()
        line = None if tty else "{desc}step {n}/{total}, {elapsed} elapsed, {remaining} remaining{postfix}\n"
        self.bar = tqdm(
            total=self.last_step,
            initial=trainer.global_step,
            unit="step",
            dynamic_ncols=True,
            bar_format=line,
            mininterval=0.5 if tty else self.LINE_SECONDS,
            maxinterval=1.0 if tty else self.LINE_SECONDS,
        )
        self._began = (time.perf_counter(), trainer.datamodule.position)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record when a validation begins: its time is excluded from the speed."""
        self._validating = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exclude the validation's time."""
        then, position = self._began
        self._began = (then + time.perf_counter() - self._validating, position)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Advance the bar; the numbers next to it are the last logged ones."""
        if self.bar is None:
            return
        if self.metrics.last:
            loss, speed = self.metrics.last.get("train/loss", math.nan), self.metrics.last["perf/tokens_per_second"]
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar, and compute the speed."""
        self._close()
        then, position = self._began
        if trainer.datamodule.position > position:
            n_seqs = trainer.datamodule.position - position
            self.speed = n_seqs * self._seq_len / (time.perf_counter() - then)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that an error starts on its own line."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _cannot_save(folder: Path, step: int, n_bytes: int, error: Exception) -> UserError:
    """Return the error for a checkpoint that could not be written: a disk that is full, read-only or forbidden."""
    why = getattr(error, "strerror", None) or error
    rule = f"cannot take the checkpoint of step {step} ({why})"
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        rule += f": a process writes about {n_bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
    fix = "make room there or make it writable, and continue with resume=last; the checkpoints before it are whole"
    return CheckpointError(Problem("output_dir", str(folder), rule, fix))


class Checkpoints(Callback):
    """Saves when due, at the end, and when SIGTERM, SIGINT or SIGHUP asks the run to stop.

    A step that is validated is saved after its validation, so that the checkpoint contains its loss; with
    trainer.patience, so is every new best. A signal lets that
    validation finish, so that a stopped and resumed run validates at the same steps as an uninterrupted one.

    Nothing is saved, and so no older checkpoint is removed, unless the losses and gradient norms of all steps so far,
    the validation loss, the weights and the optimizer's state are finite.
    """

    def __init__(
        self, cfg: ExperimentConfig, run_dir: Path, steps: FiniteSteps, patience: Patience | None = None
    ) -> None:
        self.cfg, self.run_dir, self.steps, self.patience = cfg, run_dir, steps, patience
        self.signum: int | None = None
        self.saved: Path | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers; a second signal ends the process at once.

        Lightning has saved the previous handlers and restores them at the end of the training in any case. One of
        several ranks is asked to stop in another way (launch/worker.py), so that a SIGTERM can end it at once.
        """
        for signum in worker.stop_signals():
            signal.signal(signum, self._remember if trainer.world_size == 1 else signal.SIG_DFL)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save a step that is due and not validated; mark the last step as the last."""
        step, t = trainer.global_step, self.cfg.trainer
        if step >= self.cfg.last_step:
            trainer.should_stop = True  # makes Lightning validate after this step, whatever the interval
        elif step % t.eval_every_steps:
            self._save_if(trainer, pl_module, step % t.checkpoint_every_steps == 0)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a validated step that is due, or the last one, even if another callback ends the training."""
        if trainer.state.fn == "fit":
            self.steps.check_all()  # report the first cause, not what follows from it
            check_finite("val/loss", pl_module.val_loss, trainer.global_step, self.cfg)
            due = trainer.global_step % self.cfg.trainer.checkpoint_every_steps == 0
            is_best = self.patience is not None and self.patience.improved
            self._save_if(trainer, pl_module, due or is_best or trainer.should_stop)

    def _save_if(self, trainer: pl.Trainer, pl_module: pl.LightningModule, due: bool) -> None:
        asked = worker.STOP if worker.stop_asked() else self.signum
        step, signum = trainer.global_step, pl_module.ranks.max(asked or 0)
        if due or signum:
            self._save(trainer, pl_module, step)
        if signum and step < self.cfg.last_step:
            raise Stopped(signum, step)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and worker.is_repeat(signum):
            return
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum = signum

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self.steps.check_all()
        if not self.cfg.trainer.keep_checkpoints:
            return
        target = self.run_dir / manifest.FOLDER / manifest.checkpoint_name(step)
        try:
            trainer.save_checkpoint(target)
            if trainer.is_global_zero:
                manifest.prune(self.run_dir, self.cfg.trainer.keep_checkpoints)
        except (OSError, SafetensorError) as error:
            remove_unfinished(target)
            raise _cannot_save(target.parent, step, pl_module.state_bytes(), error) from error
        self.saved = target
