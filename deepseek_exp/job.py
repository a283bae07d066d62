"""One experiment, settled: its configuration, name and folder, on the way from the command line to the ranks."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from deepseek_exp import compose, planner, validate
from deepseek_exp.config import Do, ExperimentConfig
from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.layout import degrees
from deepseek_exp.parallel import manifest, member
from deepseek_exp.sweep import SWEEP_FILE
from deepseek_exp.telling import say

JOB_FILE = "job.json"
# the sections whose overrides are worth a place in the run's name
NAMED = ("model", "data", "optim")


@dataclasses.dataclass(frozen=True)
class Job:
    """One experiment, ready to start.

    Attributes:
        cfg: the checked configuration.
        yaml: the same, resolved, as text.
        name: what the run is called.
        overrides: what the command line changed.
        run_dir: the run's folder.
        checkpoint: folder to go on from or to use, whole.
        in_sweep: it is one of several.
    """

    cfg: ExperimentConfig
    yaml: str
    name: str
    overrides: tuple[str, ...]
    run_dir: Path
    checkpoint: Path | None
    in_sweep: bool

    @property
    def n_ranks(self) -> int:
        """Processes that train or evaluate it."""
        return degrees(self.cfg).world_size

    def save(self, run_id: str | None) -> Path:
        """Write it for its ranks, with the MLflow run that records it (None: rank 0 starts one); gives the file."""
        file = self.run_dir / member.FOLDER / JOB_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(0o600)  # the store's URL may hold a password
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cfg"}
        file.write_text(json.dumps({**fields, "run_id": run_id}, default=str), encoding="utf-8")
        return file

    @classmethod
    def load(cls, file: Path) -> tuple[Job, str | None]:
        """Read what `save` wrote."""
        fields = json.loads(file.read_text(encoding="utf-8"))
        run_id, checkpoint = fields.pop("run_id"), fields["checkpoint"]
        tree = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), OmegaConf.create(fields["yaml"]))
        fields["overrides"], fields["run_dir"] = tuple(fields["overrides"]), Path(fields["run_dir"])
        fields["checkpoint"] = None if checkpoint is None else Path(checkpoint)
        return cls(cfg=OmegaConf.to_object(tree), **fields), run_id


def make_job(composed: DictConfig, overrides: Sequence[str], size: str, sweep_dir: Path | None) -> Job:
    """Settle what is run and where; imports neither torch nor MLflow.

    Args:
        composed: the tree as Hydra composed it.
        overrides: the command line's overrides.
        size: the option of the group `size`.
        sweep_dir: the job's folder within a sweep.

    Raises:
        ConfigError: a rule is broken, or the checkpoint is of another experiment.
        CheckpointError: the checkpoint is missing or damaged.
    """
    checkpoint = None
    if composed.init_from is not None:
        composed, problems = compose.start_from(composed, overrides)
        if problems:
            raise ConfigError(*problems)
    elif compose.takes_checkpoint(composed):
        checkpoint, passed_over = manifest.locate(composed.resume or "last", Path(composed.output_dir))
        for sentence in passed_over:
            say(sentence)
        composed = _on_top_of(checkpoint, overrides)
    sweep = json.loads((sweep_dir.parent / SWEEP_FILE).read_text(encoding="utf-8")) if sweep_dir is not None else None
    if sweep is not None:
        composed.tracking.parent_run_id, composed.tracking.run_name = sweep["run_id"], None
    cfg = _laid_out(composed)
    if cfg.do is Do.train and checkpoint is not None:
        _check_steps_left(cfg, checkpoint)
    name = cfg.tracking.run_name or _name(cfg, overrides, size, checkpoint, sweep["keys"] if sweep else None)
    if cfg.do is Do.train and checkpoint is not None:
        run_dir = manifest.run_dir_of(checkpoint)
    else:
        run_dir = sweep_dir or Path(cfg.output_dir) / "runs" / _folder_name(name)
    yaml = OmegaConf.to_yaml(composed, resolve=True)
    return Job(cfg, yaml, name, tuple(overrides), run_dir, checkpoint, sweep_dir is not None)


def _laid_out(composed: DictConfig) -> ExperimentConfig:
    """Settle the layout: parallel=auto becomes numbers in the tree, and what cannot fit is refused."""
    cfg = compose.to_experiment(composed)
    if cfg.parallel.auto:
        chosen, sentence = planner.choose(cfg)
        for key, value in chosen.items():
            OmegaConf.update(composed, key, value)
        say(sentence)
        cfg = compose.to_experiment(composed)
    problem = planner.misfit(cfg) if cfg.do in (Do.train, Do.eval, Do.verify) else None
    if problem is not None:
        raise ConfigError(problem)
    return cfg


def _on_top_of(checkpoint: Path, overrides: Sequence[str]) -> DictConfig:
    """Lay the command line over a checkpoint's configuration."""
    saved = OmegaConf.to_container(OmegaConf.load(checkpoint / "config.yaml"))
    merged = compose.merge_saved(saved, overrides)
    before, now = (compose.to_experiment(c) for c in (compose.merge_saved(saved, []), merged))
    fixed = validate.resume_problems(before, now)
    if fixed:
        raise ConfigError(*fixed)
    if now.do is not Do.train:  # a run of its own, not the one that trained
        merged.tracking.parent_run_id = merged.tracking.run_name = None
    return merged


def _check_steps_left(cfg: ExperimentConfig, checkpoint: Path) -> None:
    step, steps = manifest.read_manifest(checkpoint).step, cfg.trainer.max_steps
    if step >= steps:
        rule, fix = f"is reached: {checkpoint} is at step {step}", f"set trainer.max_steps={2 * step} to go on"
        raise ConfigError(Problem("trainer.max_steps", steps, rule, fix))


def _name(
    cfg: ExperimentConfig, overrides: Sequence[str], size: str, checkpoint: Path | None, swept: list[str] | None
) -> str:
    """Name a run by its version, size and data, then by what its command line set; in a sweep, by what is swept."""
    if checkpoint is not None:
        return f"{cfg.do.value} {cfg.model.version} {checkpoint.resolve().parents[1].name} {checkpoint.name}"
    own = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        of_interest = key in ("seed", "optim", "recipes") or ("." in key and key.split(".")[0] in NAMED)
        of_interest = of_interest and not key.startswith("data.mixture.")  # paths, several of them
        if key in swept if swept is not None else of_interest:
            own.append(f"{key.rsplit('.', 1)[-1]}={value}")
    if cfg.init_from is not None:
        size = Path(cfg.init_from).resolve().name
    verb = ["verify"] if cfg.do is Do.verify else []
    return " ".join([*verb, cfg.model.version, size, cfg.data.source.value, *own])


def _folder_name(name: str) -> str:
    """Name a run's folder by the time, the run and the process, so that no two share one."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{'_'.join(name.split()[:2])}_{os.getpid()}"
