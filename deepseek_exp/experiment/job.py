"""A job: one experiment with its final configuration, name and folder, passed from the command line to the ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deepseek_exp import planner
from deepseek_exp.checkpoint import manifest, saved_config
from deepseek_exp.config import Do, ExperimentConfig, compose
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.topology import Degrees, degrees
from deepseek_exp.console import say
from deepseek_exp.disk import expand
from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.experiment import command_line, init_from, resume
from deepseek_exp.experiment.branches import located_branches
from deepseek_exp.experiment.reference import with_reference
from deepseek_exp.huggingface.files import TOKENIZER
from deepseek_exp.launch import worker
from deepseek_exp.redact import redact, redact_tree
from deepseek_exp.tracking.rundir import SWEEP_FILE, Spec
from deepseek_exp.tracking.uri import sqlite_path

JOB_FILE = "job.json"
# Sections whose overrides appear in the run's name.
NAMED = ("model", "data", "optim", "lora")
# Further keys whose overrides appear in the run's name.
NAMED_KEYS = (
    *("seed", "optim", "lora", "recipes", "parallel", "kernels", "trainer"),
    *("trainer.max_steps", "trainer.global_batch_seqs", "trainer.precision"),
)
# A file in each checkpoint: the overrides and size that its configuration was composed from.
COMMAND_FILE = "command.json"
# Parameters that a resume may change within one MLflow run: locations, and what is done after training.
NOT_TRAINING = (
    *("do", "resume", "init_from", "branches", "use_ema", "output_dir", "lora.path", "chain"),
    *("tracking", "launch", "cluster", "sample", "evaluate", "export", "verify"),
    *(f"data.{name}" for name in resume.PLACES),
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint whose weights a new run starts from.

    Attributes:
        run_id: MLflow run that saved it.
        run_dir: folder of that run.
        step: number of optimizer steps completed.
    """

    run_id: str
    run_dir: Path
    step: int


@dataclasses.dataclass(frozen=True)
class Job:
    """One experiment, ready to start.

    Attributes:
        cfg: the checked configuration.
        yaml: the same, resolved, as text. It may contain the store's password.
        name: name of the run.
        overrides: overrides of the command line.
        machine: where the job is to run.
        history: overrides of all command lines of this training, this one last. None if the checkpoint lacks them.
        size: the option of the group `size`.
        run_dir: the run's folder.
        checkpoint: folder of the complete checkpoint to resume from or use.
        continues: the run that this new run continues with changed parameters. None if it continues none, or itself.
        started_from: the run whose weights this one starts from; all other state starts from scratch.
        in_sweep: whether the job is part of a sweep.
        stage_key: identity of the stage of a chain that the job is; None outside of a chain.
    """

    cfg: ExperimentConfig
    yaml: str
    name: str
    overrides: tuple[str, ...]
    history: tuple[str, ...] | None
    size: str
    run_dir: Path
    checkpoint: Path | None
    continues: Origin | None
    started_from: Origin | None
    in_sweep: bool
    stage_key: str | None = None

    @functools.cached_property
    def degrees(self) -> Degrees:
        """The degrees of parallelism, with those that are auto resolved."""
        return degrees(self.cfg)

    @property
    def n_ranks(self) -> int:
        """Number of processes that train or evaluate it."""
        return self.degrees.world_size

    @property
    def shown_yaml(self) -> str:
        """The configuration without secrets, for files that others may read."""
        return saved_config.dump_values(redact_tree(saved_config.parse(self.yaml)))

    @property
    def command_json(self) -> str:
        """The command lines as stored in a checkpoint, without secrets."""
        overrides = None if self.history is None else [redact(o) for o in self.history]
        return json.dumps({"overrides": overrides, "size": self.size})

    def save(self, run_id: str | None) -> Path:
        """Write the job file for the ranks and return its path. If run_id is None, rank 0 starts the MLflow run."""
        file = self.run_dir / worker.FOLDER / JOB_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(0o600)
        file.chmod(0o600)  # the store's URL may contain a password, and earlier versions made this file world-readable
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "cfg"}
        for name in ("continues", "started_from"):
            fields[name] = dataclasses.asdict(fields[name]) if fields[name] is not None else None
        file.write_text(json.dumps({**fields, "run_id": run_id}, default=str), encoding="utf-8")
        return file

    @classmethod
    def load(cls, file: Path) -> tuple[Job, str | None]:
        """Read what `save` wrote."""
        fields = json.loads(file.read_text(encoding="utf-8"))
        run_id, checkpoint = fields.pop("run_id"), fields["checkpoint"]
        tree = OmegaConf.merge(
            OmegaConf.structured(ExperimentConfig), saved_config.literal(saved_config.parse(fields["yaml"]))
        )
        fields["overrides"] = tuple(fields["overrides"])
        fields["history"] = None if fields["history"] is None else tuple(fields["history"])
        fields["run_dir"] = Path(fields["run_dir"])
        fields["checkpoint"] = None if checkpoint is None else Path(checkpoint)
        for name in ("continues", "started_from"):
            origin = fields[name]
            fields[name] = origin and Origin(origin["run_id"], Path(origin["run_dir"]), origin["step"])
        return cls(cfg=OmegaConf.to_object(tree), **fields), run_id


def make_job(
    composed: DictConfig,
    overrides: Sequence[str],
    size: str,
    sweep_dir: Path | None,
    machine: Machine | None = None,
    exp: ExperimentConfig | None = None,
) -> Job:
    """Return the job of a composed tree: what is run, and where. Imports neither torch nor MLflow.

    Args:
        composed: the tree as Hydra composed it.
        overrides: the command line's overrides.
        size: the option of the group `size`.
        sweep_dir: the job's folder within a sweep.
        machine: where it is to run; None: this machine.
        exp: the tree as dataclasses if it is validated already, and depends on no checkpoint of a run.

    Raises:
        ConfigError: a rule is broken, or the checkpoint belongs to another experiment.
        CheckpointError: the checkpoint is missing or damaged.
    """
    machine = machine or Machine.here()
    checkpoint, started_from, before = None, None, None
    history: tuple[str, ...] | None = tuple(overrides)
    if exp is None and composed.init_from is not None:
        composed, started_from = _with_weights_of(composed, overrides)
    elif exp is None and command_line.takes_checkpoint(composed):
        checkpoint = _located(composed.resume or "last", composed)
        composed, exp, before, saved_command = _on_top_of(checkpoint, composed, overrides, machine)
        if composed.do.is_training:
            history, size = _history(saved_command, overrides), saved_command["size"] if saved_command else size
    if composed.do is Do.dpo and composed.dpo.reference is not None:
        composed, exp = with_reference(composed), None
    sweep = json.loads((sweep_dir.parent / SWEEP_FILE).read_text(encoding="utf-8")) if sweep_dir is not None else None
    if sweep is not None:
        composed.tracking.parent_run_id, composed.tracking.run_name, exp = sweep["run_id"], None, None
    cfg = _laid_out(composed, exp, machine)
    continues = None
    if cfg.do.is_training and checkpoint is not None and before is not None:
        _check_steps_left(cfg, checkpoint)
        fixed = resume.resume_problems(before, cfg)  # parallel=auto has chosen the micro batch only now
        if fixed:
            raise ConfigError(*fixed)
        if cfg.tracking.new_run or resume.differing(before, cfg, NOT_TRAINING):
            continues = origin(checkpoint)
        else:
            _check_where_recorded(checkpoint, before, cfg, overrides)
    named_by = overrides if history is None else history
    name = redact(cfg.tracking.run_name or _name(cfg, named_by, size, checkpoint, sweep["keys"] if sweep else None))
    if cfg.do.is_training and checkpoint is not None and continues is None:
        run_dir = manifest.run_dir_of(checkpoint, "set tracking.new_run=true to record it as a new run")
    else:
        run_dir = sweep_dir or Path(cfg.output_dir) / "runs" / _folder_name(name)
    return Job(
        cfg=cfg,
        yaml=saved_config.dump(composed),
        name=name,
        overrides=tuple(overrides),
        history=history,
        size=size,
        run_dir=run_dir,
        checkpoint=checkpoint,
        continues=continues,
        started_from=started_from,
        in_sweep=sweep_dir is not None,
    )


def resumed(job: Job, checkpoint: Path) -> Job:
    """Return a training job that continues from a checkpoint of the same configuration, such as one that was killed.

    It continues the run of the checkpoint, or a new one if a parameter of the training differs, such as its layout.
    """
    before = resume.saved_experiment(saved_config.read(checkpoint))
    if resume.differing(before, job.cfg, NOT_TRAINING):
        return dataclasses.replace(job, checkpoint=checkpoint, continues=origin(checkpoint))
    return dataclasses.replace(job, checkpoint=checkpoint, run_dir=manifest.run_dir_of(checkpoint))


def _located(run: str, composed: DictConfig, key: str = "resume") -> Path:
    checkpoint, passed_over = manifest.locate(run, Path(composed.output_dir), key)
    for sentence in passed_over:
        say(sentence)
    return checkpoint


def _with_weights_of(composed: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, Origin | None]:
    """Return the tree with the model of `init_from`, and its origin if it names one of our runs."""
    checkpoint, named = None, str(composed.init_from)
    if init_from.names_a_run(named):
        checkpoint = _located(named, composed, "init_from")
    composed, problems = init_from.start_from(composed, overrides, checkpoint)
    if problems:
        raise ConfigError(*problems)
    if composed.branches and checkpoint is not None:
        found, passed_over = located_branches(composed.branches, checkpoint, Path(composed.output_dir))
        for sentence in passed_over:
            say(sentence)
        composed.branches = {domain: saved_config.literal(str(folder)) for domain, folder in found.items()}
    return composed, None if checkpoint is None else origin(checkpoint)


def origin(checkpoint: Path) -> Origin:
    """Return which run a checkpoint belongs to."""
    saved = manifest.read_manifest(checkpoint)
    return Origin(saved.run_id, checkpoint.resolve().parent.parent, saved.step)


def _laid_out(composed: DictConfig, exp: ExperimentConfig | None, machine: Machine) -> ExperimentConfig:
    """Write the degrees chosen by parallel=auto into the tree, and raise an error if the layout cannot fit."""
    cfg = exp or compose.to_experiment(composed, machine)
    if cfg.parallel.auto:
        chosen, sentence = planner.choose(cfg)
        for key, value in chosen.items():
            OmegaConf.update(composed, key, value)
        say(sentence)
        cfg = compose.to_experiment(composed, machine)
    problem = planner.misfit(cfg) if cfg.do.trains or cfg.do is Do.eval else None
    if problem is not None:
        raise ConfigError(problem)
    return cfg


def _is_own(checkpoint: Path, output_dir: str) -> bool:
    """Return whether a checkpoint is in the command's output_dir."""
    return checkpoint.resolve().is_relative_to(Path(output_dir).resolve())


def _on_top_of(
    checkpoint: Path, composed: DictConfig, overrides: Sequence[str], machine: Machine
) -> tuple[DictConfig, ExperimentConfig, ExperimentConfig, dict[str, Any] | None]:
    """Merge the command line onto a checkpoint's configuration.

    Args:
        checkpoint: folder of the checkpoint.
        composed: the tree composed from the command line alone.
        overrides: overrides of the command line.
        machine: where the job is to run.

    Returns:
        The merged tree, the same validated as dataclasses, the checkpoint's configuration, and its command line.
    """
    saved = saved_config.read(checkpoint)
    is_own = _is_own(checkpoint, composed.output_dir)
    if is_own:
        saved = _moved_along(saved, composed.output_dir, checkpoint.resolve().parent.parent)
    merged = resume.merge_saved(saved, overrides, is_own=is_own)
    trained_by = str(saved.get("do", Do.train.value))
    if merged.do.is_training and merged.do != trained_by and trained_by in [do for do in Do if do.is_training]:
        rule = f"cannot continue a run of do={trained_by}, which has another loss"
        fix = f"set do={trained_by}, or start from its weights, with init_from=<run> in place of resume=<run>"
        raise ConfigError(Problem("do", merged.do.value, rule, fix))
    if "lora.path" in map(_key, overrides) and merged.lora.path is not None:
        rule = f"cannot be combined with {checkpoint}, which has its own weights and adapters"
        raise ConfigError(Problem("lora.path", merged.lora.path, rule, "start from weights with init_from instead"))
    merged.lora.path, merged.branches = None, {}  # the checkpoint holds what has become of them
    if _needs_saved_tokenizer(merged, overrides):
        merged.data.tokenizer = saved_config.literal(str(checkpoint / TOKENIZER))
    if not merged.do.is_training:  # recorded as a run separate from the training
        named = [_key(o) for o in overrides]
        for key in ("parent_run_id", "run_name"):
            if f"tracking.{key}" not in named:
                merged.tracking[key] = None
    before, now = resume.saved_experiment(saved), compose.to_experiment(merged, machine)
    fixed = resume.resume_problems(before, now)
    if fixed:
        raise ConfigError(*fixed)
    return merged, now, before, _read_command(checkpoint, is_own=is_own)


def _needs_saved_tokenizer(merged: DictConfig, overrides: Sequence[str]) -> bool:
    """Return whether to use the checkpoint's tokenizer instead of training one or reading one whose file is missing."""
    if not (merged.do.is_training or merged.do is Do.eval):
        return False
    named = [_key(o) for o in overrides]
    if "data.tokenizer" in named:
        return False
    if merged.do is Do.eval and any(key == "data" or key.startswith("data.") for key in named):
        return True
    given = merged.data.tokenizer
    return given is not None and not expand(given).is_file()


def _moved_along(saved: dict[str, Any], output_dir: str, run_dir: Path) -> dict[str, Any]:
    """Return the saved values of a run in this output_dir, with paths into its former output_dir updated.

    The store's address is taken from the run's folder if the checkpoint has it without its password, or as a path
    relative to another working directory.
    """
    before, tracking, data = saved.get("output_dir"), saved.get("tracking"), saved.get("data")
    if not (isinstance(before, str) and isinstance(tracking, dict) and isinstance(data, dict)):
        return saved
    uri, cache_dir = str(tracking.get("uri")), str(data.get("cache_dir"))
    if uri.startswith(f"sqlite:///{before}/"):
        uri = f"sqlite:///{output_dir}/" + uri.removeprefix(f"sqlite:///{before}/")
    if cache_dir.startswith(f"{before}/"):
        cache_dir = f"{output_dir}/" + cache_dir.removeprefix(f"{before}/")
    tracking = {**tracking, "uri": uri}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        recorded = Spec.load(run_dir).tracking
        if "***" in str(tracking):
            tracking |= {"uri": recorded.uri, "tags": dict(recorded.tags)}
        elif sqlite_path(uri) is not None and not _has_database(uri) and _has_database(recorded.uri):
            tracking["uri"] = recorded.uri
    return {**saved, "output_dir": output_dir, "tracking": tracking, "data": {**data, "cache_dir": cache_dir}}


def _has_database(uri: str) -> bool:
    """Return whether an address names an existing database file."""
    path = sqlite_path(uri)
    return path is not None and path.is_file()


def _check_where_recorded(
    checkpoint: Path, before: ExperimentConfig, now: ExperimentConfig, overrides: Sequence[str]
) -> None:
    """Raise if a run would be continued in another kind of record, or from elsewhere in a store that was not named."""
    began, backend, output_dir = before.tracking.backend, now.tracking.backend, now.output_dir
    if began is not backend:
        rule = f"cannot record the rest of a run that began with tracking.backend={began.value}"
        fix = f"set tracking.backend={began.value}, or tracking.new_run=true to record it as a new run"
        raise ConfigError(Problem("tracking.backend", backend.value, rule, fix))
    if _is_own(checkpoint, output_dir):
        return
    if any(o.lstrip("+").startswith(("tracking.uri=", "tracking=")) for o in overrides):
        return
    run_dir = checkpoint.resolve().parent.parent
    theirs = run_dir.parent.parent.parent if run_dir.parent.parent.name == "multiruns" else run_dir.parent.parent
    rule = f"lies outside of output_dir={output_dir}, so where it is recorded is not taken from it"
    fix = f"set output_dir={theirs} if that is yours, or tracking.uri to the store that has its run"
    fix += ", or tracking.new_run=true to record it as a new run"
    raise ConfigError(Problem("resume", str(checkpoint), rule, fix))


def _read_command(checkpoint: Path, *, is_own: bool) -> dict[str, Any] | None:
    """Return the content written by `Job.command_json`, or None if an older version saved the checkpoint.

    For a checkpoint from elsewhere, overrides that are not taken from it are dropped, because the overrides become part
    of a printed command that users paste.
    """
    try:
        found = json.loads((checkpoint / COMMAND_FILE).read_text(encoding="utf-8"))
        overrides = [str(o) for o in found["overrides"]]
        if not is_own:
            overrides = [o for o in overrides if not resume.is_of_the_machine(_key(o))]
        return {"overrides": overrides, "size": str(found["size"])}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _history(saved_command: dict[str, Any] | None, overrides: Sequence[str]) -> tuple[str, ...] | None:
    """Return the overrides of a resumed training. If two set the same key, the later one wins."""
    if saved_command is None:
        return None
    latest = {_key(o): o for o in (*saved_command["overrides"], *overrides)}
    return tuple(o for key, o in latest.items() if key not in ("do", "resume", "tracking.new_run"))


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _check_steps_left(cfg: ExperimentConfig, checkpoint: Path) -> None:
    step, steps = manifest.read_manifest(checkpoint).step, cfg.trainer.max_steps
    if cfg.trainer.max_epochs is None and step >= steps:  # epochs become steps once the data is read
        rule, fix = f"is reached: {checkpoint} is at step {step}", f"set trainer.max_steps={2 * step} to continue"
        raise ConfigError(Problem("trainer.max_steps", steps, rule, fix))


def _name(
    cfg: ExperimentConfig, overrides: Sequence[str], size: str, checkpoint: Path | None, swept: list[str] | None
) -> str:
    """Return a run name made of version, size, data and the overrides of the command line (in a sweep, the swept ones).

    A path is shortened to its last component, because lists of runs show only the beginning of a name.
    """
    if checkpoint is not None and not cfg.do.is_training:
        folder = checkpoint.resolve()
        return " ".join(filter(None, [cfg.do.value, cfg.model.version, folder.parent.parent.name, folder.name]))
    own = []
    for override in overrides:
        key, _, value = redact(override).lstrip("+").partition("=")
        of_interest = key in NAMED_KEYS or ("." in key and key.split(".")[0] in NAMED)
        of_interest = of_interest and not key.startswith("data.mixture.")  # paths, several of them
        if key not in ("model", "size") and (key in swept if swept is not None else of_interest):
            own.append(f"{key.rsplit('.', 1)[-1]}={value.rstrip('/').rsplit('/', 1)[-1]}")
    if cfg.init_from is not None:
        size = Path(cfg.init_from).resolve().name
    verb = [cfg.do.value] if cfg.do.trains and cfg.do is not Do.train else []
    return " ".join([*verb, cfg.model.version, size, cfg.data.source.value, *own])


def _folder_name(name: str) -> str:
    """Return a unique folder name made of the time, the run's name and the process id.

    Other characters of the run's name than letters, digits and `_ . = + -` are replaced: a slash would create a
    subfolder.
    """
    words = re.sub(r"[^\w.=+-]+", "-", "_".join(name.split()[:2]), flags=re.ASCII).strip(".-")[:80]
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{words or 'run'}_{os.getpid()}"
