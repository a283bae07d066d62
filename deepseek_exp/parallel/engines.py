"""What does an optimizer step on one rank: DeepSpeed's pipeline, DeepSpeed's ZeRO 2 and 3, or plain data parallelism.

Each has `train` and `evaluate`, and `optimizer`, whose state is saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from deepseek_exp.config import ExperimentConfig, OnNonfinite
from deepseek_exp.config.topology import Axis
from deepseek_exp.data import Batch
from deepseek_exp.parallel.deepspeed_patches import accumulate_in_one_pass, replace_tied_gradient_sum
from deepseek_exp.parallel.groups import Groups
from deepseek_exp.parallel.partition import ModelShard, Stage, gradient_sums
from deepseek_exp.parallel.runtime import quiet_deepspeed

BUCKET = 1 << 27  # elements that are exchanged at once


class StepResult(NamedTuple):
    """What an optimizer step came to, the same on all ranks.

    Attributes:
        grad_norm: the gradient norm before clipping, a scalar.
        applied: weights, masters and optimizer state have changed; if not, none of them has.
    """

    grad_norm: Tensor
    applied: bool


def may_apply(grad_norm: Tensor, exp: ExperimentConfig) -> bool:
    """Return whether to apply a step's gradients: always, or with trainer.on_nonfinite=skip if their norm is finite.

    The latter makes the host wait for the gradients. What stops the run instead is looked at later, see finite.py.
    """
    return exp.trainer.on_nonfinite is OnNonfinite.stop or math.isfinite(grad_norm.item())


class Engine(Protocol):
    """What the strategy needs of an engine."""

    optimizer: Any

    def train(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Do an optimizer step."""
        ...

    def evaluate(self, batch: Batch) -> None:
        """Send one micro batch forward; the last stage's loss sees it."""
        ...


class PipelineEngine:
    """DeepSpeed's, in 1F1B order; ZeRO 1 over the data axis.

    DeepSpeed knows three axes: pipe, data and model. Expert parallelism is folded into the model axis (topology.py), so
    DeepSpeed averages gradients over dp / ep ranks only. What it does not do is done in the instruction that it has for
    tied weights, before that average: sums over ep, over tp for parameters that are not cut, and over the first and
    last stage for a table that both have. The loss is divided by ep, so that these sums are means.
    """

    def __init__(
        self,
        exp: ExperimentConfig,
        groups: Groups,
        shard: ModelShard,
        stage: Stage,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Set DeepSpeed up; without an optimizer it can evaluate only."""
        self.stage, self.device = stage, groups.device
        d = groups.degrees
        with quiet_deepspeed() as deepspeed:
            from deepspeed.pipe import PipelineModule
            from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

            topology = PipeModelDataParallelTopology(num_pp=d.pp, num_mp=d.ep * d.tp, num_dp=d.n_data)
            layers = [stage if i == groups.at.pp else nn.Identity for i in range(d.pp)]
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

    def train(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Do an optimizer step."""
        self.stage.batches = iter(micro_batches)
        self.engine.train_batch(self._feed(micro_batches))
        return _result_of(self.engine, self.device)

    def evaluate(self, batch: Batch) -> None:
        """Send one micro batch forward; the last stage's loss sees it."""
        self.stage.batches = iter([batch])
        self.engine.eval_batch(self._feed([batch]), num_micro_batches=1, reduce_output=None, bcast_loss=False)

    def _feed(self, micro_batches: Sequence[Batch]) -> Iterator[Any]:
        """Give the first stage its input; the labels that DeepSpeed wants for the last one are not used."""
        return iter([(b.tokens[:, :-1], b.part) for b in micro_batches])


class ZeroEngine:
    """DeepSpeed's ZeRO 2 or 3: every rank has all layers, and its share of the gradients, or of the weights too."""

    def __init__(
        self, exp: ExperimentConfig, groups: Groups, shard: ModelShard, stage: Stage, optimizer: torch.optim.Optimizer
    ) -> None:
        """Set DeepSpeed up."""
        self.stage, self.device = stage, groups.device
        with quiet_deepspeed() as deepspeed:
            config = deepspeed_config(exp, groups, exp.parallel.zero_stage)
            self.engine, *_ = deepspeed.initialize(model=stage, optimizer=optimizer, config=config)
        self.optimizer = self.engine.optimizer

    def train(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Do an optimizer step."""
        self.stage.batches = iter(micro_batches)
        self.engine.train()
        for batch in micro_batches:
            self.engine.backward(self.engine(batch.tokens[:, :-1]))
            self.engine.step()
        return _result_of(self.engine, self.device)

    def evaluate(self, batch: Batch) -> None:
        """Send one micro batch forward."""
        self.stage.batches = iter([batch])
        self.engine.eval()
        self.engine(batch.tokens[:, :-1])


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
        """Remember the parts; without an optimizer it can evaluate only."""
        self.groups, self.stage, self.optimizer, self.clip_norm = groups, stage, optimizer, exp.optim.clip_norm
        self.exp = exp
        self.sums = gradient_sums(shard, groups)
        mark_counted(shard)
        self.parameters = list(shard.model.parameters())
        masters = getattr(optimizer, "masters", None)
        self.holders = dict(zip(optimizer.params, masters, strict=True)) if masters else {}

    def train(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Do an optimizer step."""
        self.stage.batches = iter(micro_batches)
        self.stage.train()
        for batch in micro_batches:
            (self.stage(batch.tokens[:, :-1]) / len(micro_batches)).backward()
        with torch.no_grad():
            for group, members in self.sums:
                _exchange([self._gradient(p) for p in members], group)
            gradients = [self._gradient(p) for p in self.parameters]
            if self.groups.degrees.n_data > 1:
                _exchange(gradients, self.groups.axis[Axis.data])
                torch._foreach_div_(gradients, self.groups.degrees.n_data)
            norm = self._norm()
            if self.clip_norm:
                torch._foreach_mul_(gradients, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0).float())
        result = StepResult(norm, may_apply(norm, self.exp))
        if result.applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    def evaluate(self, batch: Batch) -> None:
        """Send one micro batch forward."""
        self.stage.batches = iter([batch])
        self.stage.eval()
        self.stage(batch.tokens[:, :-1])

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


def _result_of(engine: Any, device: torch.device) -> StepResult:
    """Return what DeepSpeed made of a step; it skips one whose gradients are not finite, which it calls overflow."""
    norm = torch.as_tensor(engine.get_global_grad_norm(), device=device).detach()
    return StepResult(norm, applied=not getattr(engine.optimizer, "overflow", False))  # torch's, without ZeRO, has none


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
    """Word an experiment for DeepSpeed."""
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
