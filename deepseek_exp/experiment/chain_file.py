"""What is known of a chain between its starts: the key of each stage, and chain.json with what was done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deepseek_exp.checkpoint import manifest
from deepseek_exp.config.compose import leaves
from deepseek_exp.config.enums import Do
from deepseek_exp.disk import fsync_path
from deepseek_exp.errors import CheckpointError, Problem
from deepseek_exp.experiment.resume import PLACES
from deepseek_exp.tracking.rundir import write_json

FILE, FORMAT = "chain.json", 1
FOLDER = "chains"
# What has no effect on the weights or the loss: places, what is recorded, and what happens after training. Data and
# weights are identified by digest.
NO_EFFECT = (
    *("do", "resume", "init_from", "branches", "output_dir", "tracking", "launch", "cluster", "sample", "export"),
    *("verify", "chain", "lora.path", "dpo.reference"),
    *(f"data.{name}" for name in PLACES),
    *(f"trainer.{name}" for name in ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints")),
)
# How the same result is computed. Rounding may differ.
HOW = (
    *("device", "parallel", "kernels"),
    *(f"trainer.{name}" for name in ("micro_batch_seqs", "activation_checkpointing", "compile", "deterministic")),
    "trainer.n_threads",
)


def stage_key(do: Do, tree: DictConfig, inputs: Mapping[str, str], data: Mapping[str, str]) -> str:
    """Return the identity of what a stage computes: a SHA-256 in hexadecimal.

    Args:
        do: its verb.
        tree: its composed tree. Keys in `NO_EFFECT` and `HOW` do not count.
        inputs: role -> digest of what it starts from.
        data: name -> digest of its data.
    """
    values = {path: value for path, value in _values(tree) if not _below(path, (*NO_EFFECT, *HOW))}
    mixture = values.get("data.mixture") or {}
    values["data.mixture"] = {name: part.get("weight", 1.0) for name, part in mixture.items()}
    content = {"format": FORMAT, "do": do.value, "values": values, "inputs": dict(inputs), "data": dict(data)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def how(tree: DictConfig, code: Mapping[str, str]) -> dict[str, str]:
    """Return how a stage is computed: keys in `HOW` and the versions of the code, as texts."""
    return {path: str(value) for path, value in _values(tree) if _below(path, HOW)} | dict(code)


def _values(tree: DictConfig) -> Iterator[tuple[str, Any]]:
    yield from leaves(OmegaConf.to_container(tree, resolve=True, enum_to_str=True))


def _below(path: str, sections: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in sections)


@dataclass(frozen=True)
class Record:
    """What was done for a stage.

    Attributes:
        state: running, stopped, failed or done.
        key: identity of what it computes; see `stage_key`.
        run_id: its run.
        run_dir: the run's folder, relative to output_dir.
        checkpoint: what it saved, relative to output_dir; None if nothing.
        digest: of that checkpoint's manifest.
        loss: validation loss at its end, nats per token.
        tokens_per_second: speed of its training.
        seconds: duration.
        how: see `how`.
    """

    state: str
    key: str
    run_id: str
    run_dir: str
    checkpoint: str | None = None
    digest: str | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds: float = 0.0
    how: dict[str, str] = field(default_factory=dict)


@dataclass
class ChainFile:
    """The file chain.json in a chain's folder, which is replaced atomically.

    Attributes:
        folder: the chain's folder.
        run_id: the MLflow run of the chain; None if there is none.
        stages: stage -> the last that was done for it.
        earlier: key -> what was done for other configurations of the stages.
    """

    folder: Path
    run_id: str | None = None
    stages: dict[str, Record] = field(default_factory=dict)
    earlier: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> ChainFile:
        """Read the file; an empty one if there is none.

        Raises:
            CheckpointError: the file is damaged, or of a newer version.
        """
        try:
            fields = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if fields["format"] != FORMAT:
                raise ValueError(f"it has format {fields['format']}, and this version reads {FORMAT}")
            records = ({k: Record(**r) for k, r in fields[name].items()} for name in ("stages", "earlier"))
            return cls(folder, fields["run_id"], *records)
        except FileNotFoundError:
            return cls(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            rule = f"cannot be read ({type(error).__name__}: {error})"
            fix = "remove it; the stages then run again, and their runs stay as they are"
            raise CheckpointError(Problem("chain", str(folder / FILE), rule, fix)) from error

    def save(self) -> None:
        """Write the file."""
        content = dataclasses.asdict(self)
        del content["folder"]
        write_json(self.folder / FILE, {"format": FORMAT, **content})
        fsync_path(self.folder)

    def put(self, stage: str, record: Record) -> None:
        """Write what was done for a stage, and keep what was done for another configuration of it."""
        before = self.stages.get(stage)
        if before is not None and before.key != record.key:
            self.earlier[before.key] = before
        self.earlier.pop(record.key, None)
        self.stages[stage] = record
        self.save()

    def find(self, key: str) -> Record | None:
        """Return what was done for a key, by any stage of the chain."""
        found = (record for record in self.stages.values() if record.key == key)
        return next(found, None) or self.earlier.get(key)


def checked(record: Record, output_dir: Path) -> str | None:
    """Return what is wrong with the files that a finished stage has left; None if they are whole and the same."""
    if record.checkpoint is None:
        return None
    folder = output_dir / record.checkpoint
    try:
        manifest.verify(folder)
        if manifest.digest(folder) == record.digest:
            return None
        return f"{folder} is another checkpoint now"
    except CheckpointError as error:
        return f"{folder} {error.problems[0].rule}"


def unfinished(record: Record, output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint that an interrupted stage has left, and a sentence for each damaged one."""
    run_dir = output_dir / record.run_dir
    with suppress(CheckpointError):
        if (run_dir / manifest.FOLDER).is_dir():
            return manifest.locate(str(run_dir), output_dir)
    return None, []
