"""The seam between Lightning and DeepSpeed: a strategy that trains one stage of a pipeline on each rank.

Lightning keeps its loop, callbacks, validation and checkpoints; a training step of the module hands all micro batches
of the optimizer step to `train`, which DeepSpeed's PipelineEngine works off in its 1F1B order (Narayanan et al. 2021,
"Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2). Only public hooks of Lightning are used.

DeepSpeed knows three axes: pipe, data and model. Expert parallelism is folded into the model axis (topology.py), so
DeepSpeed averages gradients over dp / ep ranks only. What it does not do is done in the instruction that it has for
tied weights, before that average: sums over ep, over tp for parameters that are not cut, and over the first and last
stage for a table that both have. The loss is divided by ep, so that these sums are means.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from deepseek_exp.config import ExperimentConfig, Precision
from deepseek_exp.data import Batch
from deepseek_exp.parallel.checkpoint import FolderCheckpointIO, begin, part_folder
from deepseek_exp.parallel.groups import Groups
from deepseek_exp.parallel.rank_state import buffers, load_optimizer, load_part, pieces, whole
from deepseek_exp.parallel.shards import open_state, save_shard
from deepseek_exp.parallel.stage import Part, gradient_sums

# the loss of a stage's output, given tokens and parts
LossOf = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


class Stage(nn.Module):
    """The layers of one rank as one layer of DeepSpeed's pipeline.

    Attributes:
        domains: (batch,) of each micro batch that is still to come forward; None where there are no domains.
    """

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.model, self.blocks = part.model, part.blocks
        self.domains: Iterator[Tensor | None] = iter(())
        self.is_first = 0 in part.blocks

    def forward(self, x: Tensor) -> Tensor:
        """Take tokens (batch, seq) or what the stage before gives, (batch, seq, d_model), to (batch, seq, d_model)."""
        domain = next(self.domains)
        x = self.model.embedding(x) if self.is_first else x
        for i in self.blocks:
            x = self.model.blocks[i](x, None, None, domain)
        return x


class DeepSpeed3DStrategy(DDPStrategy):
    """Pipeline x tensor x data (x expert) parallelism.

    Attributes:
        groups: this rank's.
        part: what it holds of the model.
    """

    strategy_name = "deepspeed_3d"

    def __init__(
        self, exp: ExperimentConfig, groups: Groups, part: Part, loss_of: LossOf, folder_io: FolderCheckpointIO
    ) -> None:
        """Prepare; the engine is made when training or validation begins.

        Args:
            exp: the experiment.
            groups: this rank's.
            part: what it holds of the model.
            loss_of: used on the last stage.
            folder_io: completes a checkpoint's folder.
        """
        super().__init__(process_group_backend=dist.get_backend())
        self.exp, self.groups, self.part, self.loss_of = exp, groups, part, loss_of
        self.folder_io = folder_io
        self.stage = Stage(part)
        self.engine: Any = None

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self.groups.device

    def setup(self, trainer: Any) -> None:
        """Make the optimizer and DeepSpeed's engine."""
        self.accelerator.setup(trainer)
        self.lightning_module.to(self.root_device)
        fitting = trainer.state.fn == "fit"
        if fitting:
            self.setup_optimizers(trainer)
        self.engine = self._engine(self.optimizers[0] if fitting else None)
        self.model = self.lightning_module
        self.barrier()

    def train(self, micro_batches: Sequence[Batch], optimizer: Any) -> Tensor:
        """Do one optimizer step.

        Args:
            micro_batches: of this rank's place on dp.
            optimizer: Lightning's, which counts the steps.

        Returns:
            The gradient norm before clipping, a scalar tensor.
        """
        self._announce(micro_batches)
        optimizer.step(closure=lambda: self.engine.train_batch(self._feed(micro_batches)))
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.root_device).detach()

    def evaluate(self, batch: Batch) -> None:
        """Send one micro batch forward; the last stage's `loss_of` sees it."""
        self._announce([batch])
        with torch.inference_mode(False), torch.no_grad():
            self.engine.eval_batch(self._feed([batch]), num_micro_batches=1, reduce_output=None, bcast_loss=False)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Let the engine, which is the closure, do the step."""
        return closure()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights go into the engine's own buffers, so it has to be there."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Give nothing: each rank saves its own part."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Give nothing: each rank saves its own part."""
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
        mine = save_shard(folder, groups.rank, pieces(self.part, groups, optimizer), buffers(self.part, groups))
        shards = {name: record for each in groups.gather(mine) for name, record in each.items()}
        if groups.rank == 0:
            said = whole(self.part, optimizer, is_tied=self.exp.model.tie_embeddings)
            self.folder_io.finish(folder, target, checkpoint, said, shards)
        groups.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load this rank's part of a checkpoint of any layout."""
        state = open_state(Path(checkpoint_path))
        load_part(self.part, state)
        load_optimizer(self.part, self.engine.optimizer, state)
        return {**state.rest, "state_dict": {}}

    def _announce(self, micro_batches: Sequence[Batch]) -> None:
        domains = self.lightning_module.domain_of_part
        self.stage.domains = iter([None if domains is None else domains[b.part] for b in micro_batches])

    def _feed(self, micro_batches: Sequence[Batch]) -> Iterator[Any]:
        """Give the first stage its input and the last one what its loss needs."""
        return iter([(b.tokens[:, :-1], (b.tokens, b.part)) for b in micro_batches])

    def _engine(self, optimizer: Any) -> Any:
        with _quiet():
            import deepspeed
            from deepspeed.pipe import PipelineModule
            from deepspeed.runtime.pipe import schedule
            from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

            # a shared-memory operator that it would compile for over a minute; its links are not what a step waits for
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            d = self.groups.degrees
            topology = PipeModelDataParallelTopology(num_pp=d.pp, num_mp=d.ep * d.tp, num_dp=d.n_data)
            layers = [self.stage if i == self.groups.at.pp else nn.Identity for i in range(d.pp)]
            module = PipelineModule(layers, topology=topology, loss_fn=self.loss_of, partition_method="uniform")
            self._mark()
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=self._config(optimizer), dist_init_required=False
            )
        sums = gradient_sums(self.part, self.groups)
        engine._INSTRUCTION_MAP = {
            **engine._INSTRUCTION_MAP,
            schedule.ReduceTiedGrads: lambda engine: _sum_gradients(sums, masters=engine.using_bf16_optimizer),
        }
        return engine

    def _mark(self) -> None:
        """Tell DeepSpeed which parameters this rank counts in the gradient norm."""
        parameters = dict(self.part.model.named_parameters())
        for placed in self.part.placements:
            p = parameters[placed.name]
            p.model_parallel, p.ds_pipe_replicated = placed.counted, placed.is_copy

    def _config(self, optimizer: Any) -> dict[str, Any]:
        exp, d = self.exp, self.groups.degrees
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": exp.trainer.micro_batch_seqs,
            "gradient_accumulation_steps": exp.trainer.global_batch_seqs // (exp.trainer.micro_batch_seqs * d.dp),
            "steps_per_print": None,
            "gradient_clipping": exp.optim.clip_norm,
            "zero_optimization": {"stage": exp.parallel.zero_stage if optimizer is not None else 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
        }
        if exp.trainer.precision is Precision.bf16:
            config["bf16"] = {"enabled": True}
            # the defaults add gradients up in bf16, over micro batches and over ranks
            config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
        return config


def _sum_gradients(sums: Sequence[tuple[Any, list[nn.Parameter]]], *, masters: bool) -> None:
    """Sum gradients over their groups, one exchange for all of a group."""
    for group, parameters in sums:
        gradients = [p._hp_grad if masters else p.grad for p in parameters]
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat, group=group)
        for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(summed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed from printing what it does while it is loaded and set up."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_initialized() else "cpu")
    with contextlib.redirect_stdout(sys.stderr if os.environ.get("DEEPSPEED_VERBOSE") else open(os.devnull, "w")):  # noqa
        yield
