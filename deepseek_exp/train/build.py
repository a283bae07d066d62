"""Build the parts of an experiment and assemble them; the only file that knows every room."""

from __future__ import annotations

import dataclasses
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from lightning_fabric.plugins.environments import LightningEnvironment
from torch import Tensor

from deepseek_exp import adapt
from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO
from deepseek_exp.checkpoint.shards import State, averaged, open_state
from deepseek_exp.checkpoint.tensors import readable
from deepseek_exp.config import Device, Do, ExperimentConfig, Linears, PreferenceLoss
from deepseek_exp.config.batch_sizes import batch_sizes
from deepseek_exp.config.matrices import adapted, adapter_size
from deepseek_exp.config.topology import Axis, Degrees, degrees
from deepseek_exp.data import PreparedData, PreparedRows, TokenDataModule, prepare
from deepseek_exp.data.sequences import sequences_of
from deepseek_exp.disk import expand
from deepseek_exp.errors import CheckpointError, ConfigError, DeviceError, Problem
from deepseek_exp.finetune.dpo import PreferenceObjective
from deepseek_exp.finetune.grpo import PolicyObjective
from deepseek_exp.finetune.rollouts import Rollouts, load_rewards
from deepseek_exp.inference import load_release
from deepseek_exp.inference.adapters import read_adapter
from deepseek_exp.kernels import TORCH, Ops, resolve
from deepseek_exp.kernels.grouped import empty_groups_are_zero
from deepseek_exp.kernels.low_rank_linears import low_rank_linears
from deepseek_exp.models import NextTokenObjective, Objective, Transformer, init_weights
from deepseek_exp.models.transformer import initial_weight
from deepseek_exp.parallel.adapters import attach_adapters
from deepseek_exp.parallel.groups import Groups, connect, local_rank
from deepseek_exp.parallel.partition import ModelShard, Stage, copy_weights, set_weights, shard_model
from deepseek_exp.parallel.rank_state import load_shard
from deepseek_exp.parallel.ranks import ManyRanks, OneRank
from deepseek_exp.parallel.runtime import set_up_torch, silence_expected
from deepseek_exp.parallel.strategy import DeepSpeed3DStrategy
from deepseek_exp.parallel.tensor import parallel_ops
from deepseek_exp.planner import optimizer_bytes, parameters
from deepseek_exp.tracking import RunLog
from deepseek_exp.tracking.logger import JournalLogger
from deepseek_exp.train.callbacks import Checkpoints, Metrics, Progress
from deepseek_exp.train.finite import FiniteSteps, first_nonfinite
from deepseek_exp.train.lit import LanguageModel
from deepseek_exp.train.local_engine import LocalEngine
from deepseek_exp.train.patience import Patience
from deepseek_exp.train.policy_rounds import PolicyRounds
from deepseek_exp.train.reference import with_reference


@dataclass(frozen=True)
class Parts:
    """The built parts of an experiment.

    Attributes:
        device: of this process.
        data: tokens and tokenizer.
        datamodule: serves the batches.
        lit: the Lightning module.
        groups: this rank's groups; None in a single process.
        shard: what this rank holds of the model; None in a single process.
    """

    device: torch.device
    data: PreparedData
    datamodule: TokenDataModule
    lit: LanguageModel
    groups: Groups | None = None
    shard: ModelShard | None = None


def with_steps(cfg: ExperimentConfig) -> ExperimentConfig:
    """Return an experiment with trainer.max_epochs as trainer.max_steps: passes over its sequences, rounded up."""
    n_sequences = sequences_of(prepare(cfg.data), cfg.data, "train").n_sequences
    steps = batch_sizes(cfg.trainer).steps_for(n_sequences * (cfg.trainer.max_epochs or 0))
    return dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, max_steps=steps))


def pick_device(device: Device) -> torch.device:
    """Return the device to run on.

    Raises:
        DeviceError: a GPU is requested and this PyTorch cannot use it.
    """
    visible = torch.cuda.is_available()
    if device is Device.cuda and not visible:
        rule = "needs a CUDA device and none is visible to this PyTorch"
        raise DeviceError(
            Problem("device", device.value, f"{rule} ({torch.__version__})", "use device=cpu or device=auto")
        )
    return torch.device("cuda", local_rank()) if visible and device is not Device.cpu else torch.device("cpu")


def check_memory(cfg: ExperimentConfig, device: torch.device) -> None:
    """Raise if the weights, in training with gradients and optimizer, do not fit the device's free memory.

    Per parameter: its weight, and if it is trained its gradient in fp32 and the optimizer's state: with AdamW 16 bytes
    in total in fp32, 18 in bf16. Activations are not included.

    Raises:
        DeviceError: states the required and the available memory.
    """
    counted = parameters(cfg.model)
    n_params = counted.total + counted.mtp
    n_adapters = adapter_size(adapted(cfg.model, cfg.lora), cfg.lora.rank) if cfg.do.trains else 0
    n_trained = (n_adapters or n_params) if cfg.do.trains else 0
    needed = (n_params + n_adapters) * cfg.trainer.precision.weight_bytes + n_trained * (4 + optimizer_bytes(cfg))
    free = free_memory(device)
    if needed > free:
        rule = f"needs {needed / 1e9:,.1f} GB for its {n_params:,} parameters"
        rule += f" and {device.type} has {free / 1e9:,.1f} GB free"
        raise DeviceError(Problem("model.version", cfg.model.version, rule, "take a smaller size, such as size=small"))


def free_memory(device: torch.device) -> int:
    """Return the free bytes on a device; on a CPU, what the system can allocate without swapping."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # memory that PyTorch caches from an earlier job of a sweep is free
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_grouped_products(cfg: ExperimentConfig, device: torch.device) -> None:
    """Raise if PyTorch's grouped product leaves garbage as the weight gradient of an expert without tokens.

    Raises:
        DeviceError: it does, on this GPU.
    """
    n_experts = cfg.model.moe.n_routed_experts
    if n_experts and cfg.do.trains and device.type == "cuda" and not empty_groups_are_zero(device):
        rule = f"may leave experts without a token, whose gradients PyTorch {torch.__version__} does not set to 0"
        rule += f" on {torch.cuda.get_device_name(device)}"
        fix = "use another version of PyTorch, or a model without routed experts"
        raise DeviceError(Problem("model.moe.n_routed_experts", n_experts, rule, fix))


def build_parts(cfg: ExperimentConfig, weights: Path | None = None) -> Parts:
    """Prepare the data and build the model.

    Args:
        cfg: the experiment.
        weights: checkpoint folder to load the model's parameters from; None means from `init_from` or the seed.
    """
    device = pick_device(cfg.device)
    layout = degrees(cfg)
    if layout.world_size > 1:
        return _build_rank(cfg, layout, device, weights)
    check_memory(cfg, device)
    check_grouped_products(cfg, device)
    set_up_torch(cfg)
    data = _prepared(cfg, device)
    model = build_model(cfg, device, weights)
    if cfg.do in (Do.dpo, Do.grpo):
        model.mtp.requires_grad_(False)  # their losses look one token ahead only
    objective = build_objective(cfg, data)
    engine, tables = LocalEngine(cfg, model, objective), (data.token_bytes, data.unigram_bits)
    rounds = build_rounds(cfg, data, device)
    lit = LanguageModel(cfg, model, engine, objective, OneRank(), *tables, rounds).to(device)
    return Parts(device, data, _build_datamodule(cfg, data, device, None), lit)


def _build_rank(cfg: ExperimentConfig, layout: Degrees, device: torch.device, weights: Path | None) -> Parts:
    """Do `build_parts` on one of several ranks; the strategy loads a checkpoint's weights once it is set up."""
    connect(device)
    check_grouped_products(cfg, device)
    set_up_torch(cfg)
    groups = Groups(layout, device, cfg.model.n_kv_heads or cfg.model.n_heads)
    if local_rank() == 0:
        _prepared(cfg, device)  # the others on this host find it in the cache
    groups.wait_for_data()
    data = _prepared(cfg, device)
    tp = groups.axis[Axis.tp], groups.at.tp
    ops = parallel_ops(_ops(cfg), cfg.kernels, *tp) if groups.degrees.tp > 1 else _ops(cfg)
    with torch.device("meta"):
        whole = Transformer(cfg.model, ops, cfg.trainer.activation_checkpointing)
    shard = shard_model(cfg, whole, groups)
    if weights is None and cfg.init_from is not None:
        _load_shard_from(shard, cfg)
    elif weights is None:
        set_weights(shard, lambda name, shape: initial_weight(name, shape, cfg.model, cfg.seed))
    if cfg.lora.rank:
        shard = attach_adapters(cfg, shard, groups, first_adapters(cfg))
    if weights is not None:
        load_shard(shard, _stored(weights, cfg))
        _check_weights(first_nonfinite(shard.model.state_dict().items()), weights)
    for p in shard.model.parameters():
        p.data = p.data.to(getattr(torch, cfg.trainer.precision.dtype_name))
    objective, ranks = build_objective(cfg, data), ManyRanks(cfg, groups, shard)
    tables, rounds = (data.token_bytes, data.unigram_bits), build_rounds(cfg, data, device)
    lit = LanguageModel(cfg, shard.model, None, objective, ranks, *tables, rounds)
    return Parts(device, data, _build_datamodule(cfg, data, device, groups), lit, groups, shard)


def _stored(folder: Path, cfg: ExperimentConfig) -> State:
    """Open a checkpoint, with the moving average for its weights if use_ema asks for it."""
    return averaged(open_state(folder)) if cfg.use_ema else open_state(folder)


def _load_shard_from(shard: ModelShard, cfg: ExperimentConfig) -> None:
    """Set a rank's weights from `init_from`: a checkpoint of a run, or the folder of a Hugging Face checkpoint."""
    source = Path(str(cfg.init_from))
    if manifest.is_checkpoint(source) and not cfg.branches and not adapt.saved_scale(source):
        load_shard(shard, _stored(source, cfg))
        return
    whole = Transformer(cfg.model, TORCH)
    if manifest.is_checkpoint(source):
        with readable(source):
            whole.load_state_dict(_start_weights(cfg))
    else:
        load_release(whole, cfg.model, source)
    copy_weights(shard, whole)


def _start_weights(cfg: ExperimentConfig) -> dict[str, Tensor]:
    """Read the weights of the run that `init_from` names, or of its branches, merged."""
    if cfg.branches:
        folders = {domain: Path(folder) for domain, folder in cfg.branches.items()}
        return adapt.merge_branches(folders, cfg.model.moe.domains, use_ema=cfg.use_ema)
    return adapt.load_merged(Path(str(cfg.init_from)), use_ema=cfg.use_ema)


def build_objective(cfg: ExperimentConfig, data: PreparedData) -> Objective:
    """Return what the model is trained on, as chosen by `do`.

    Args:
        cfg: the experiment.
        data: its prepared data.
    """
    if cfg.do is Do.dpo:
        return PreferenceObjective(cfg.dpo)
    if cfg.do is Do.grpo:
        return PolicyObjective(cfg.grpo)
    return NextTokenObjective(cfg.model.mtp_loss_weight)


def build_rounds(cfg: ExperimentConfig, data: PreparedData, device: torch.device) -> PolicyRounds | None:
    """Return what samples the completions of reinforcement learning; None for any other verb."""
    if cfg.do is not Do.grpo:
        return None
    assert isinstance(data, PreparedRows)
    reference = _frozen(cfg, device) if cfg.grpo.kl_beta else None
    return PolicyRounds(cfg, Rollouts(cfg, data, load_rewards(cfg.grpo)), reference)


def _frozen(cfg: ExperimentConfig, device: torch.device) -> Transformer:
    """Return the model with the weights that training starts from, of a whole model and without gradients."""
    return build_model(cfg, device, None).eval().requires_grad_(False)


def _prepared(cfg: ExperimentConfig, device: torch.device) -> PreparedData:
    """Return the data, for preference training with the log-probabilities of the reference."""
    data = prepare(cfg.data)
    if cfg.do is not Do.dpo or cfg.dpo.loss is PreferenceLoss.orpo:
        return data
    assert isinstance(data, PreparedRows)
    start = cfg if cfg.dpo.reference is None else dataclasses.replace(cfg, init_from=cfg.dpo.reference)
    return with_reference(start, data, device, lambda: _frozen(start, device))


def _build_datamodule(
    cfg: ExperimentConfig, data: PreparedData, device: torch.device, groups: Groups | None
) -> TokenDataModule:
    return TokenDataModule(
        data,
        cfg.data,
        seed=cfg.seed,
        global_batch_seqs=cfg.trainer.global_batch_seqs,
        micro_batch_seqs=cfg.trainer.micro_batch_seqs,
        eval_seqs=cfg.trainer.eval_seqs,
        dp=groups.degrees.dp if groups is not None else 1,
        dp_rank=groups.at.dp if groups is not None else 0,
        fill_up=groups is not None,
        pin_memory=device.type == "cuda",
        group_size=cfg.grpo.group_size if cfg.do is Do.grpo else 1,
        iterations=cfg.grpo.iterations if cfg.do is Do.grpo else 1,
        sizes=batch_sizes(cfg.trainer),
    )


def _ops(cfg: ExperimentConfig) -> Ops:
    ops = resolve(cfg.kernels, fp8=cfg.do.trains and cfg.trainer.precision.computes_in_fp8)
    # ZeRO 3 gathers a weight for the module that it is in, and narrow products read it outside of that
    if cfg.lora.rank and not (cfg.parallel.zero_stage == 3 and degrees(cfg).world_size > 1):
        in_one = cfg.kernels.linears is Linears.accumulated and not cfg.trainer.precision.computes_in_fp8
        return dataclasses.replace(ops, linears=adapt.with_adapters(ops.linears, low_rank_linears if in_one else None))
    return ops


def build_model(cfg: ExperimentConfig, device: torch.device, weights: Path | None) -> Transformer:
    """Build the model on a device, with weights from a checkpoint, else from `init_from`, else from the seed."""
    model = Transformer(cfg.model, _ops(cfg), cfg.trainer.activation_checkpointing)
    gets_adapters = weights is None and cfg.lora.rank > 0  # those of a checkpoint are in its weights
    start = None if weights is not None or cfg.init_from is None else Path(cfg.init_from)
    folder = start if start is not None and manifest.is_checkpoint(start) else weights
    if folder is not None:
        with readable(folder):
            stored = _start_weights(cfg) if weights is None else adapt.load_merged(weights, use_ema=cfg.use_ema)
            model.load_state_dict(stored)
        _check_weights(first_nonfinite(model.state_dict().items()), folder)
    elif cfg.init_from is not None:
        load_release(model, cfg.model, Path(cfg.init_from))
    else:
        init_weights(model, cfg.model, cfg.seed)
    dtype = getattr(torch, cfg.trainer.precision.dtype_name)
    for p in model.parameters():
        p.data = p.data.to(device, dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)  # balance biases and counts keep their type
    if gets_adapters:
        _attach_adapters(model, cfg)
    if cfg.trainer.compile and cfg.do is Do.dpo:
        model.hidden = torch.compile(model.hidden)  # type: ignore[method-assign]
    elif cfg.trainer.compile:
        model.losses = torch.compile(model.losses)  # type: ignore[method-assign]
    return model


def _attach_adapters(model: Transformer, cfg: ExperimentConfig) -> None:
    """Freeze a whole model, and add the adapters that are trained instead; without training they are merged."""
    like = model.embedding.weight
    adapters = {name: adapt.Adapter(a.to(like), b.to(like)) for name, (a, b) in first_adapters(cfg).items()}
    adapt.attach(model, adapters, cfg.lora.alpha / cfg.lora.rank)
    if not cfg.do.trains:
        adapt.merge(model)


def first_adapters(cfg: ExperimentConfig) -> dict[str, adapt.Adapter]:
    """Return the adapters that a training starts with, whole, on the CPU: from `lora.path` or drawn.

    Raises:
        UserError: the files of lora.path cannot be read, or have other matrices than lora.targets selects.
    """
    shapes, lora = adapted(cfg.model, cfg.lora), cfg.lora
    if lora.path is None:
        return adapt.initial_adapters(shapes, lora, cfg.seed)
    base = None if cfg.init_from is None else Path(cfg.init_from)
    found, _, _ = read_adapter(cfg.model, expand(lora.path), "lora.path", base)
    odd = sorted(found.keys() ^ shapes.keys())
    if odd:
        rule = f"has adapters of {len(found)} matrices and lora.targets selects {len(shapes)}; {odd[0]} is in one only"
        fix = "set lora.targets and lora.exclude to the matrices that it has"
        raise ConfigError(Problem("lora.path", lora.path, rule, fix))
    for name, (a, b) in found.items():
        there = (*b.shape[:-1], a.shape[-1])
        if there != shapes[name] or {a.shape[-2], b.shape[-1]} != {lora.rank}:
            rule = f"has an adapter of {name} for shape {list(there)}, and this model's is {list(shapes[name])}"
            raise ConfigError(Problem("lora.path", lora.path, rule, "name an adapter of this model"))
    return {name: found[name] for name in shapes}


def _check_weights(wrong: str | None, folder: Path) -> None:
    """Raise if a weight of a checkpoint is infinite or NaN.

    Raises:
        CheckpointError: one is.
    """
    if wrong is not None:
        rule = f"holds infinite or NaN numbers in {wrong}: its training had diverged"
        raise CheckpointError(Problem("resume", str(folder), rule, "name an older checkpoint"))


def build_trainer(
    cfg: ExperimentConfig,
    parts: Parts,
    run: RunLog,
    run_id: str,
    texts: dict[str, str],
    lineage: manifest.Lineage | None = None,
) -> tuple[pl.Trainer, Checkpoints, Progress]:
    """Build the Lightning trainer.

    Args:
        cfg: the experiment.
        parts: from `build_parts`.
        run: where metrics go; checkpoints go to its folder.
        run_id: its MLflow run.
        texts: file name -> content that goes into every checkpoint.
        lineage: where its checkpoints come from.

    Returns:
        The trainer, and those of its callbacks that report how the run went.
    """
    silence_expected()
    t = cfg.trainer
    steps, metrics = FiniteSteps(cfg), Metrics(cfg)
    patience = Patience(cfg) if t.patience else None
    checkpoints = Checkpoints(cfg, run.run_dir, steps, patience)
    progress = Progress(cfg, metrics)
    folder_io, groups, strategy = FolderCheckpointIO(texts, run_id, lineage), parts.groups, "auto"
    if groups is not None:
        stage = Stage(parts.shard, groups, parts.lit.objective)
        strategy = DeepSpeed3DStrategy(cfg, groups, parts.shard, stage, folder_io)
    third_party = [instantiate(node, _recursive_=False, _convert_="all") for node in t.callbacks.values()]
    trainer = pl.Trainer(
        accelerator="gpu" if parts.device.type == "cuda" else "cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]) if groups is not None else 1,
        num_nodes=groups.degrees.world_size // int(os.environ["LOCAL_WORLD_SIZE"]) if groups is not None else 1,
        strategy=strategy,
        logger=JournalLogger(run),
        callbacks=[steps, metrics, *third_party, *([patience] if patience else []), progress, checkpoints],
        # With one process, the environment of a Slurm job does not apply.
        plugins=[folder_io, *([LightningEnvironment()] if groups is None else [])],
        max_epochs=-1,
        max_steps=cfg.last_step,
        val_check_interval=t.eval_every_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=t.log_every_steps,
        deterministic=t.deterministic,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer, checkpoints, progress
