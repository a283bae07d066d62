"""The engines: what does one optimizer step, or one forward pass, on the ranks of a layout.

An engine is all that lies between the Lightning module and the model. The one of a single process is
train/local_engine.py; here are DeepSpeed's pipeline, DeepSpeed's ZeRO 2 and 3, and plain data parallelism.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from deepseek_exp.config import ExperimentConfig, OnNonfinite
from deepseek_exp.config.topology import Axis
from deepseek_exp.models import Losses, MicroBatch
from deepseek_exp.parallel.deepspeed_patches import accumulate_in_one_pass, replace_tied_gradient_sum
from deepseek_exp.parallel.groups import Groups
from deepseek_exp.parallel.partition import ModelShard, Stage, gradient_sums
from deepseek_exp.parallel.runtime import quiet_deepspeed

BUCKET = 1 << 27  # elements that are exchanged at once


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step.

    Attributes:
        nats: sum of the nll of this rank's next tokens, a scalar. `Ranks.sum` makes it that of the whole step.
        mtp_loss: mean multi-token prediction loss of this rank's micro-batches times their fraction of the step's, a
            scalar. `Ranks.sum` makes it the mean of the whole step.
        grad_norm: the global gradient norm before clipping, a scalar, equal on all ranks.
        applied: whether weights, masters and optimizer state have changed, equal on all ranks. A step that was not
            applied has changed none of them.
        sums: sum of `Losses.sums` over this rank's micro-batches; None if the objective has none, or on a rank that
            computes no loss.
    """

    nats: Tensor
    mtp_loss: Tensor
    grad_norm: Tensor
    applied: bool
    sums: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of a forward pass.

    Attributes:
        nll: (batch, seq), nats of each next token; None on a rank that does not count the loss.
        memory: what the next segment of the same texts attends to, as in `Losses`.
        sums: as in `Losses`; None on a rank that does not count the loss.
    """

    nll: Tensor | None
    memory: Tensor | None = None
    sums: Tensor | None = None


class Engine(Protocol):
    """All that lies between the Lightning module and the model.

    Attributes:
        optimizer: the optimizer whose state is saved: torch's, or DeepSpeed's around it. None before training starts.
        memories: index of a micro-batch in the step -> what its next segment attends to. Empty if the model has no
            memory, as on several ranks.
    """

    optimizer: Any
    memories: dict[int, Tensor | None]

    def start(self, module: pl.LightningModule) -> None:
        """Take from Lightning what counts the steps, once before the first one."""
        ...

    def train(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Do one optimizer step on this rank's micro-batches."""
        ...

    def evaluate(self, batch: MicroBatch, memory: Tensor | None = None) -> Evaluation:
        """Send one micro-batch forward.

        Args:
            batch: the micro-batch.
            memory: from the segment before, as in `Losses`. None at the start of the texts, or if there is no memory.
        """
        ...


class LossSums:
    """Adds up the losses of a step's micro-batches.

    Attributes:
        nats: as in `StepResult`, as is the next.
        mtp_loss: of the micro-batches so far.
        sums: of the micro-batches so far.
    """

    def __init__(self, n_micro_batches: int, device: torch.device) -> None:
        """Start at 0.

        Args:
            n_micro_batches: of the whole step, over all ranks.
            device: where the losses are computed.
        """
        self.n_micro_batches = n_micro_batches
        self.nats, self.mtp_loss = (torch.zeros((), device=device) for _ in range(2))
        self.sums: Tensor | None = None

    def add(self, losses: Losses) -> None:
        """Add the losses of one micro-batch."""
        self.nats += losses.nll.sum()
        self.mtp_loss += losses.mtp_loss / self.n_micro_batches
        if losses.sums is not None:
            self.sums = losses.sums if self.sums is None else self.sums + losses.sums


def may_apply(grad_norm: Tensor, exp: ExperimentConfig) -> bool:
    """Return whether to apply a step's gradients: always, or with trainer.on_nonfinite=skip if their norm is finite.

    With skip the host waits for the gradients. The check that stops the run instead comes later; see finite.py.
    """
    return exp.trainer.on_nonfinite is OnNonfinite.stop or math.isfinite(grad_norm.item())


class DeepSpeedStage(nn.Module):
    """A stage as DeepSpeed calls it: with one tensor, for one tensor.

    DeepSpeed passes a stage only the output of the previous stage, and differentiates what the last one returns. So the
    micro-batches of a call wait here, and what the last stage computes in addition to the loss is kept here.
    DeepSpeed's schedules send every micro-batch forward once and in order, which `run` checks.
    """

    def __init__(self, stage: Stage, n_expert_ranks: int) -> None:
        """Wrap a stage.

        Args:
            stage: what the rank runs.
            n_expert_ranks: ep. The loss is divided by it; see `PipelineEngine`.
        """
        super().__init__()
        self.model, self.stage, self.n_expert_ranks = stage.model, stage, n_expert_ranks
        self._waiting: deque[MicroBatch] = deque()
        self._keep: Callable[[Losses], None] = lambda losses: None

    def run(self, call: Callable[[], Any], batches: Sequence[MicroBatch], keep: Callable[[Losses], None]) -> None:
        """Call DeepSpeed for some micro-batches.

        Args:
            call: has DeepSpeed send all of them forward.
            batches: the micro-batches, which all stages have.
            keep: is called on the last stage with the losses of each.
        """
        self._waiting, self._keep = deque(batches), keep
        call()
        assert not self._waiting, "DeepSpeed did not send every micro-batch forward"

    def forward(self, x: Tensor) -> Tensor:
        """Return the input of the next stage, (batch, seq, d_model), or on the last one the loss, a scalar.

        Args:
            x: as for `Stage`.
        """
        found = self.stage(x, self._waiting.popleft())
        if isinstance(found, Tensor):
            return found
        self._keep(found)
        return found.loss / self.n_expert_ranks


class PipelineEngine:
    """DeepSpeed's pipeline in 1F1B order, with ZeRO 1 over the data axis.

    DeepSpeed knows three axes: pipe, data and model. Expert parallelism is folded into the model axis (topology.py), so
    DeepSpeed averages gradients over dp / ep ranks only. The other sums replace its sum of tied gradients, which comes
    before that average: over ep, over tp for parameters that are not cut, and over the first and last stage for a table
    that both have. The loss is divided by ep, so that these sums are means.
    """

    def __init__(
        self,
        exp: ExperimentConfig,
        groups: Groups,
        shard: ModelShard,
        stage: Stage,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Set DeepSpeed up; without an optimizer it can only evaluate."""
        self.exp, self.groups, self.memories = exp, groups, {}
        d = groups.degrees
        self.stage = DeepSpeedStage(stage, d.ep)
        with quiet_deepspeed() as deepspeed:
            from deepspeed.pipe import PipelineModule
            from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

            topology = PipeModelDataParallelTopology(num_pp=d.pp, num_mp=d.ep * d.tp, num_dp=d.n_data)
            layers = [self.stage if i == groups.at.pp else nn.Identity for i in range(d.pp)]
            module = PipelineModule(layers, topology=topology, partition_method="uniform")
            mark_counted(shard)
            config = deepspeed_config(exp, groups, 1 if optimizer is not None else 0)
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if self.engine.using_bf16_optimizer:
            accumulate_in_one_pass(self.engine.optimizer)
        sums = gradient_sums(shard, groups)
        replace_tied_gradient_sum(
            self.engine, lambda engine: sum_gradients(sums, in_masters=engine.using_bf16_optimizer)
        )
        self.optimizer = self.engine.optimizer

    def start(self, module: pl.LightningModule) -> None:
        """Have each step counted by Lightning."""
        self._count = module.optimizers().step

    def train(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Do one optimizer step on this rank's micro-batches."""
        sums = _sums(micro_batches, self.groups)
        self.stage.run(lambda: self.engine.train_batch(_inputs(micro_batches)), micro_batches, sums.add)
        self._count()
        return _result_of(self.engine, sums, self.groups.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, memory: Tensor | None = None) -> Evaluation:
        """Send one micro-batch forward through all stages."""
        found: list[Losses] = []

        def call() -> None:
            self.engine.eval_batch(_inputs([batch]), num_micro_batches=1, reduce_output=None, bcast_loss=False)

        self.stage.run(call, [batch], found.append)
        return _evaluation_of(found, self.groups)


class ZeroEngine:
    """DeepSpeed's ZeRO 2 or 3: every rank has all layers, and a shard of the gradients, or of the weights too."""

    def __init__(
        self, exp: ExperimentConfig, groups: Groups, shard: ModelShard, stage: Stage, optimizer: torch.optim.Optimizer
    ) -> None:
        """Set DeepSpeed up."""
        self.exp, self.groups, self.memories = exp, groups, {}
        self.stage = DeepSpeedStage(stage, groups.degrees.ep)
        with quiet_deepspeed() as deepspeed:
            config = deepspeed_config(exp, groups, exp.parallel.zero_stage)
            self.engine, *_ = deepspeed.initialize(model=self.stage, optimizer=optimizer, config=config)
        self.optimizer = self.engine.optimizer

    def start(self, module: pl.LightningModule) -> None:
        """Have each step counted by Lightning."""
        self._count = module.optimizers().step

    def train(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Do one optimizer step on this rank's micro-batches."""
        sums = _sums(micro_batches, self.groups)
        self.engine.train()

        def call() -> None:
            for batch in micro_batches:
                self.engine.backward(self.engine(batch.tokens[:, :-1]))
                self.engine.step()

        self.stage.run(call, micro_batches, sums.add)
        self._count()
        return _result_of(self.engine, sums, self.groups.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, memory: Tensor | None = None) -> Evaluation:
        """Send one micro-batch forward."""
        found: list[Losses] = []
        self.engine.eval()
        self.stage.run(lambda: self.engine(batch.tokens[:, :-1]), [batch], found.append)
        return _evaluation_of(found, self.groups)


class DataParallelEngine:
    """Without ZeRO and with one stage: gradients are summed over their groups and averaged over the data axis."""

    def __init__(
        self,
        exp: ExperimentConfig,
        groups: Groups,
        shard: ModelShard,
        stage: Stage,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Remember the parts; without an optimizer it can only evaluate."""
        self.exp, self.groups, self.stage, self.optimizer, self.memories = exp, groups, stage, optimizer, {}
        self.sums = gradient_sums(shard, groups)
        mark_counted(shard)
        self.parameters = [p for p in shard.model.parameters() if p.requires_grad]
        masters = getattr(optimizer, "masters", None)
        self.holders = dict(zip(optimizer.params, masters, strict=True)) if masters else {}

    def start(self, module: pl.LightningModule) -> None:
        """Have each step counted by Lightning."""
        self._count = module.optimizers().step

    def train(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Do one optimizer step on this rank's micro-batches."""
        sums = _sums(micro_batches, self.groups)
        self.stage.model.train()
        for batch in micro_batches:
            losses = self.stage(batch.tokens[:, :-1], batch)
            sums.add(losses)
            (losses.loss / self.groups.degrees.ep / len(micro_batches)).backward()
        with torch.no_grad():
            for group, members in self.sums:
                _exchange([self._gradient(p) for p in members], group)
            gradients = [self._gradient(p) for p in self.parameters]
            if self.groups.degrees.n_data > 1:
                _exchange(gradients, self.groups.axis[Axis.data])
                torch._foreach_div_(gradients, self.groups.degrees.n_data)
            norm, clip_norm = self._norm(), self.exp.optim.clip_norm
            if clip_norm:
                torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0).float())
        applied = may_apply(norm, self.exp)
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._count()
        return StepResult(sums.nats, sums.mtp_loss, norm, applied, sums.sums)

    @torch.inference_mode(False)
    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, memory: Tensor | None = None) -> Evaluation:
        """Send one micro-batch forward."""
        self.stage.model.eval()
        return _evaluation_of([self.stage(batch.tokens[:, :-1], batch)], self.groups)

    def _gradient(self, p: Tensor) -> Tensor:
        gradient = self.holders.get(p, p).grad
        assert gradient is not None, "a parameter got no gradient"
        return gradient

    def _norm(self) -> Tensor:
        counted = [self._gradient(p) for p in self.parameters if p.model_parallel]
        zero = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        square = sum((torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in counted), zero)
        if self.groups.axis[Axis.model] is not None:
            dist.all_reduce(square, group=self.groups.axis[Axis.model])
        return square.sqrt()


def _sums(micro_batches: Sequence[MicroBatch], groups: Groups) -> LossSums:
    return LossSums(len(micro_batches) * groups.degrees.dp, groups.device)


def _evaluation_of(found: Sequence[Losses], groups: Groups) -> Evaluation:
    return Evaluation(found[0].nll, None, found[0].sums) if groups.counts_loss else Evaluation(None)


def _inputs(micro_batches: Sequence[MicroBatch]) -> Any:
    """Return the inputs of the first stage, with the labels that DeepSpeed requires; nothing uses them."""
    return iter([(b.tokens[:, :-1], b.tokens[:, 1:]) for b in micro_batches])


def _result_of(engine: Any, sums: LossSums, device: torch.device) -> StepResult:
    """Return the result of a step of DeepSpeed; it skips a step with a gradient that is not finite, an overflow."""
    norm = torch.as_tensor(engine.get_global_grad_norm(), device=device).detach()
    applied = not getattr(engine.optimizer, "overflow", False)  # torch's, without ZeRO, has no such attribute
    return StepResult(sums.nats, sums.mtp_loss, norm, applied, sums.sums)


def mark_counted(shard: ModelShard) -> None:
    """Note at each parameter whether this rank counts it in the gradient norm, under the names that DeepSpeed reads."""
    parameters = dict(shard.model.named_parameters())
    for param in shard.params:
        p = parameters[param.name]
        p.model_parallel, p.ds_pipe_replicated = param.counted, param.is_copy


def sum_gradients(sums: Sequence[tuple[Any, list[nn.Parameter]]], *, in_masters: bool) -> None:
    """Sum gradients over their groups, those of DeepSpeed's fp32 masters or the parameters' own."""
    for group, parameters in sums:
        _exchange([p._hp_grad if in_masters else p.grad for p in parameters], group)


def _exchange(gradients: list[Tensor], group: Any) -> None:
    """Sum tensors over a group, in place, many in one exchange."""
    bucket: list[Tensor] = []
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        if i == len(gradients) - 1 or sum(g.numel() for g in bucket) >= BUCKET:
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat, group=group)
            for mine, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                mine.copy_(summed)
            bucket = []


def deepspeed_config(exp: ExperimentConfig, groups: Groups, zero_stage: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of an experiment."""
    t = exp.trainer
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": t.micro_batch_seqs,
        "gradient_accumulation_steps": t.global_batch_seqs // (t.micro_batch_seqs * groups.degrees.dp),
        "steps_per_print": None,
        "gradient_clipping": exp.optim.clip_norm,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device before each micro batch
        "zero_force_ds_cpu_optimizer": False,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }
    if t.precision.keeps_masters:
        # each gradient is added to its fp32 sum as the backward pass makes it, and its bf16 form let go of
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        # the defaults add gradients up in bf16, over micro batches and over ranks
        config |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return config
