"""Records runs in MLflow at no cost to the training process.

The training process appends events to a journal on disk (`TrackedRun`); a second process, the sender, sends them to
MLflow. Neither MLflow nor Lightning is imported here; the Lightning adapter is `deepseek_exp.tracking.logger`.
"""

from deepseek_exp.tracking.chain import ChainRun
from deepseek_exp.tracking.run import RunLog, TrackedRun, copy_history
from deepseek_exp.tracking.sweep import (
    SweepRow,
    best_row,
    finish_sweep,
    local_sweep_table,
    render_table,
    start_sweep,
    sweep_table,
)

__all__ = [
    "ChainRun",
    "RunLog",
    "SweepRow",
    "TrackedRun",
    "best_row",
    "copy_history",
    "finish_sweep",
    "local_sweep_table",
    "render_table",
    "start_sweep",
    "sweep_table",
]
