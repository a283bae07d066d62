"""Lightning's logger interface over a tracked run."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from deepseek_exp.tracking.run import RunLog


class JournalLogger(Logger):
    """Forwards what `self.log` and third-party callbacks log to a `RunLog`.

    The caller of `TrackedRun.start` finishes the run, because only it knows how the run ended.
    """

    def __init__(self, run: RunLog) -> None:
        super().__init__()
        self._run = run

    @property
    def experiment(self) -> RunLog:
        """The run to log to."""
        return self._run

    @property
    def name(self) -> str:
        """Empty: the run's folder needs no level for the name."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the run's folder needs no level for the version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self._run.run_dir)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record metrics; names outside `METRICS` are allowed, since third-party callbacks choose their own."""
        self._run.log_foreign_metrics(metrics, step or 0)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `TrackedRun.start` has already received every leaf of the configuration.

        What Lightning passes here (the arguments of modules) would repeat those under other names.
        """
