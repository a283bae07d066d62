"""What Lightning logs arrives in the journal."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch

from deepseek_exp.config import TrackingConfig
from deepseek_exp.tracking.journal import read_events
from deepseek_exp.tracking.logger import JournalLogger
from tests.tracking.tracking_parts import start_run


class Line(pl.LightningModule):
    """One weight, fitted to nothing in particular."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"secret": 1})
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight * batch).sum()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_lightning_and_its_callbacks_log_to_the_run(store: TrackingConfig, tmp_path: Path) -> None:
    run = start_run(store, tmp_path / "run")
    logger = JournalLogger(run)
    trainer = pl.Trainer(
        logger=logger,
        accelerator="cpu",
        max_steps=3,
        log_every_n_steps=1,
        callbacks=[pl.callbacks.LearningRateMonitor()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(3, 1)))
    assert logger.experiment is run
    assert trainer.checkpoint_callback.best_model_path.startswith(str(run.run_dir / "checkpoints"))
    assert run.finish("FINISHED", None).arrived
    events = [event for event in read_events(run.run_dir / "journal.jsonl", 0)[0] if event["kind"] != "start"]
    values = [(event["step"], name) for event in events if event["kind"] == "metrics" for name in event["values"]]
    assert [step for step, name in values if name == "train/loss"] == [0, 1, 2]
    assert (0, "lr-SGD") in values
    assert {event["kind"] for event in events} == {"metrics", "end"}
