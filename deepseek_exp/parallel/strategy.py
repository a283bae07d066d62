"""The seam between Lightning and DeepSpeed: a strategy that trains one part of a model on each rank.

Lightning keeps its loop, callbacks, validation and checkpoints. The strategy sets up the engine (engines.py) that the
module then calls for each step, in a pipeline in 1F1B order (Narayanan et al. 2021, "Efficient Large-Scale Language
Model Training on GPU Clusters", section 2.2), and saves and loads the checkpoints of all ranks. It uses only public
hooks of Lightning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy

from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO, begin, part_folder
from deepseek_exp.checkpoint.shards import open_state, save_shard
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.parallel.engines import DataParallelEngine, Engine, PipelineEngine, ZeroEngine
from deepseek_exp.parallel.groups import Groups
from deepseek_exp.parallel.partition import ModelShard, Stage
from deepseek_exp.parallel.rank_state import buffers, load_optimizer, load_shard, pieces, whole


class DeepSpeed3DStrategy(DDPStrategy):
    """Pipeline x tensor x data (x expert) parallelism.

    Attributes:
        groups: this rank's.
        shard: what it holds of the model.
    """

    strategy_name = "deepspeed_3d"

    def __init__(
        self, exp: ExperimentConfig, groups: Groups, shard: ModelShard, stage: Stage, folder_io: FolderCheckpointIO
    ) -> None:
        """Prepare; the engine is made when training or validation begins.

        Args:
            exp: the experiment.
            groups: this rank's.
            shard: what it holds of the model.
            stage: that part, ready to run.
            folder_io: completes a checkpoint's folder.
        """
        super().__init__(process_group_backend=dist.get_backend())
        self.exp, self.groups, self.shard, self.stage, self.folder_io = exp, groups, shard, stage, folder_io
        self.engine: Any = None

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self.groups.device

    def setup(self, trainer: Any) -> None:
        """Make the optimizer and the engine that fits the layout."""
        self.accelerator.setup(trainer)
        self.lightning_module.to(self.root_device)
        optimizer = None
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
            optimizer = self.optimizers[0]
        self.engine = self.lightning_module.engine = self._make_engine(optimizer)
        self.model = self.lightning_module
        self.barrier()

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Do nothing: the engine has done the step, and Lightning counts it."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether to restore after set-up. True, since weights are loaded into the engine's buffers."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: each rank saves its own shard."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: each rank saves its own shard."""
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Do nothing: `load_checkpoint` did."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Do nothing: `load_checkpoint` did."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """No: `load_checkpoint` does."""
        return False

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save the parts of all ranks in one folder, which is whole or not there."""
        target, groups, optimizer = Path(filepath), self.groups, self.engine.optimizer
        folder = begin(target) if groups.rank == 0 else part_folder(target)
        groups.barrier()
        mine = save_shard(folder, groups.rank, pieces(self.shard, groups, optimizer), buffers(self.shard, groups))
        shards = {name: record for each in groups.gather(mine) for name, record in each.items()}
        if groups.rank == 0:
            said = whole(self.shard, optimizer, self.exp)
            self.folder_io.finish(folder, target, checkpoint, said, shards)
        groups.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load this rank's part of a checkpoint of any layout."""
        state = open_state(Path(checkpoint_path))
        load_shard(self.shard, state)
        load_optimizer(self.shard, self.engine.optimizer, state)
        return {**state.rest, "state_dict": {}}

    def _make_engine(self, optimizer: torch.optim.Optimizer | None) -> Engine:
        parts = (self.exp, self.groups, self.shard, self.stage)
        zero_stage = self.exp.parallel.zero_stage
        if zero_stage == 1:
            return PipelineEngine(*parts, optimizer)
        if zero_stage == 0 or optimizer is None:
            return DataParallelEngine(*parts, optimizer)
        return ZeroEngine(*parts, optimizer)
