"""The folder of one checkpoint: whether it is complete, which exist, and which one `resume` selects.

A checkpoint is a folder `step-00000100` whose `manifest.json` lists every file with its size and SHA-256. The folder is
written under another name and renamed when everything is on disk, so a folder of that name is complete unless it was
damaged later. This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import math
import shutil
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from deepseek_exp.checkpoint import migrations
from deepseek_exp.disk import fsync_path
from deepseek_exp.errors import CheckpointError, Problem

MANIFEST = "manifest.json"
MODEL, STATE, TREE = "model.safetensors", "state.safetensors", "state.json"
SHARDS = "shard-*.safetensors"
# Files that a reader may open; if one exists, the manifest has to list it.
READ = (MODEL, STATE, TREE, SHARDS, "config.yaml", "tokenizer.json", "tokenizer_config.json", "data.json")
MOST_BYTES = 1 << 26  # of a manifest; one of 100,000 ranks has a fifth of it
OTHER = "name another checkpoint, or resume=last for the newest whole one"
FOLDER = "checkpoints"
REPLACED = ".replaced"
# What the weights of a checkpoint are.
KINDS = ("full",)


@dataclasses.dataclass(frozen=True)
class Contract:
    """What has to be the same for whoever uses the weights.

    Attributes:
        tokenizer: digest of the tokenizer.
        template: digest of the chat template; None if the model has none.
        max_seq_len: maximum sequence length, in tokens.
    """

    tokenizer: str
    template: str | None
    max_seq_len: int


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Where a checkpoint comes from, and what it can be combined with.

    Attributes:
        inputs: role -> digest of the manifest of the checkpoint that the training used, such as `start`.
        contract: what its users have to keep to; None if saved by a version that did not record it.
        kind: what the weights are: one of `KINDS`.
        coverage: share of the model's parameters that the training could change.
        stage_key: identity of the stage of a chain that saved it; None outside of a chain.
    """

    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    contract: Contract | None = None
    kind: str = "full"
    coverage: float = 1.0
    stage_key: str | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Metadata of a checkpoint.

    Attributes:
        step: optimizer steps done.
        run_id: MLflow run that it belongs to.
        saved_at: seconds since the epoch.
        val_loss: validation loss at this step, nats per token, if measured.
        files: name -> {"bytes": size, "sha256": digest}.
        finite: all steps so far, the weights and the optimizer's state were finite; None if saved by a version that did
            not check.
        lineage: where it comes from.
    """

    step: int
    run_id: str
    saved_at: float
    val_loss: float | None
    files: dict[str, dict[str, Any]]
    finite: bool | None = None
    lineage: Lineage = dataclasses.field(default_factory=Lineage)

    def text(self) -> str:
        """Return the content of manifest.json, which ends with its own digest."""
        fields = dataclasses.asdict(self)
        fields |= fields.pop("lineage")
        return migrations.with_digest({**fields, "format": migrations.FORMAT, "minor": migrations.MINOR})

    @classmethod
    def of_text(cls, text: str) -> Manifest:
        """Return what a manifest.json of any format says; raises as `migrations.read_fields` does."""
        fields = migrations.read_fields(text)
        of_lineage = {f.name: fields[f.name] for f in dataclasses.fields(Lineage)}
        if of_lineage["contract"] is not None:
            of_lineage["contract"] = Contract(**of_lineage["contract"])
        own = {f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name != "lineage"}
        return cls(**own, lineage=Lineage(**of_lineage))


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of a run, complete or not."""
    return (folder / MANIFEST).is_file()


def seal(
    folder: Path,
    target: Path,
    *,
    step: int,
    run_id: str,
    val_loss: float | None,
    digests: Mapping[str, dict[str, Any]],
    finite: bool | None = None,
    lineage: Lineage | None = None,
) -> None:
    """Digest the files of `folder`, make them durable and move the folder to `target` in one step.

    Args:
        folder: the written files; on the same file system as target.
        target: the final path of the checkpoint; an existing one is replaced.
        step: optimizer steps done.
        run_id: MLflow run that it belongs to.
        val_loss: validation loss at this step, or None.
        digests: name -> {"bytes": size, "sha256": digest} of files whose writer has already computed the digest.
        finite: everything in it was checked to be finite.
        lineage: where it comes from; None if nothing is known.
    """
    files = {path.name: digests.get(path.name) or _digest(path) for path in sorted(folder.iterdir())}
    before = max((_saved_at(path) for path in list_checkpoints(target.parent.parent)), default=0.0)
    saved_at = max(time.time(), before + 1e-3)  # keeps the order of saving even if the clock was set back
    manifest = Manifest(step, run_id, saved_at, val_loss, files, finite, lineage or Lineage())
    (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        fsync_path(path)
    replaced = target.with_name(f".{target.name}{REPLACED}")
    if target.exists():
        _remove(replaced)
        target.rename(replaced)
    folder.rename(target)
    fsync_path(target.parent)
    _remove(replaced)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, not of the form that this version writes, or of a newer format.
    """
    try:
        manifest = Manifest.of_text(_read_text(folder / MANIFEST))
    except migrations.NewerFormatError as error:
        rule = f"has format {error}, and this version reads {migrations.FORMAT}.{migrations.MINOR}"
        raise CheckpointError(Problem("resume", str(folder), rule, "use the version that wrote it")) from error
    except migrations.FormError as error:
        rule = f"is damaged ({MANIFEST} is corrupted: {error})"
        raise CheckpointError(Problem("resume", str(folder), rule, OTHER)) from error
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise CheckpointError(Problem("resume", str(folder), f"has no readable {MANIFEST} ({why})", OTHER)) from error
    if manifest.lineage.kind not in KINDS:
        rule = f"is of kind {manifest.lineage.kind!r}, and this version reads {', '.join(KINDS)}"
        raise CheckpointError(Problem("resume", str(folder), rule, "use the version that wrote it"))
    return manifest


def digest(folder: Path) -> str:
    """Return the digest by which others name a checkpoint: the SHA-256 of its manifest.json.

    Raises:
        CheckpointError: it has no readable manifest.
    """
    read_manifest(folder)
    return _sha256(folder / MANIFEST)


def _read_text(path: Path) -> str:
    """Read a regular file: opening a pipe would wait for its writer."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if found.st_size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or not listed in the manifest.
    """
    manifest = read_manifest(folder)
    damage = _missing_or_unnamed(folder, manifest.files)
    for name, want in manifest.files.items():
        damage = damage or _damage_of(folder / name, want)
    if damage is not None:
        raise CheckpointError(Problem("resume", str(folder), f"is damaged ({damage})", OTHER))
    return manifest


def _missing_or_unnamed(folder: Path, files: Mapping[str, Any]) -> str | None:
    """Return what is wrong if a required file is missing or not in the manifest; None if nothing is."""
    weights = MODEL in files or any(fnmatch(name, SHARDS) for name in files)
    for name in [*(n for n in (STATE, TREE) if n not in files), *([] if weights else [MODEL])]:
        return f"{name} is missing"
    for path in sorted(folder.iterdir()):
        if path.name not in files and any(fnmatch(path.name, pattern) for pattern in READ):
            return f"{path.name} is not named in {MANIFEST}"
    return None


def _damage_of(path: Path, want: Mapping[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != want["bytes"]:
            return f"{path.name} is truncated: {path.stat().st_size} of {want['bytes']} bytes"
        if _sha256(path) != want["sha256"]:
            return f"{path.name} is corrupted: its SHA-256 is not the one recorded"
    except FileNotFoundError:
        raise  # removed meanwhile, because its run continues
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run in the order they were saved.

    That is not the order of their steps if a run was resumed from an earlier one. A checkpoint that was moved away for
    its successor is listed until the successor exists.
    """
    folder = run_dir / FOLDER
    moved = [p for p in folder.glob(f".step-*{REPLACED}") if not (folder / p.name[1 : -len(REPLACED)]).exists()]
    return sorted([*folder.glob("step-*"), *moved], key=lambda path: (_saved_at(path), path.name))


def prune(run_dir: Path, keep: int) -> None:
    """Remove incomplete checkpoints and all that need not be kept.

    Kept are the newest `keep`, the one with the lowest validation loss, and the newest that was checked to be finite.
    """
    readable = []
    for path in list_checkpoints(run_dir):
        try:
            readable.append((path, read_manifest(path)))
        except CheckpointError:
            continue  # damaged: kept for the user to inspect
    measured = [(m.val_loss, path) for path, m in readable if m.val_loss is not None and math.isfinite(m.val_loss)]
    good = [path for path, m in readable if m.finite]
    stay = {path for path, _ in readable[-keep:]} | ({min(measured)[1]} if measured else set()) | set(good[-1:])
    unfinished = set((run_dir / FOLDER).glob(".step-*")) - stay
    for path in unfinished | ({path for path, _ in readable} - stay):
        _remove(path)


def locate(resume: str, output_dir: Path, key: str = "resume") -> tuple[Path, list[str]]:
    """Return the complete checkpoint that `resume` selects.

    Args:
        resume: `last` (the run that saved last), an MLflow run id or its prefix, the folder of a run, or the folder of
            one checkpoint.
        output_dir: the folder of the runs.
        key: configuration key that names it, for the error message.

    Returns:
        The checkpoint's folder, verified, and a sentence for every damaged one that was skipped.

    Raises:
        CheckpointError: nothing matches, or nothing that matches is complete.
    """
    try:
        return _locate(resume, output_dir)
    except CheckpointError as error:
        named = (dataclasses.replace(p, key=key) if p.key == "resume" else p for p in error.problems)
        raise CheckpointError(*named) from error
    except (OSError, ValueError) as error:  # an inaccessible folder, a name that is too long or contains NUL
        why = getattr(error, "strerror", None) or error
        where = "name another folder, or one that you may read"
        raise CheckpointError(Problem(key, resume, f"cannot be read ({why})", where)) from error


def _locate(resume: str, output_dir: Path) -> tuple[Path, list[str]]:
    path = Path(resume)
    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        verify(path)
        return path, []
    if (path / FOLDER).is_dir():
        return _newest_whole(resume, path)
    runs = {_newest(run): run for run in _run_dirs(output_dir) if list_checkpoints(run)}
    if not runs:
        raise CheckpointError(_nothing(resume, output_dir, "train first: python run.py"))
    if resume == "last":
        return _newest_whole(resume, runs[max(runs)])
    matches = {run for run in runs.values() if len(resume) >= 4 and any(i.startswith(resume) for i in _run_ids(run))}
    if len(matches) != 1:
        newest = (_run_ids(run) for _, run in sorted(runs.items(), reverse=True)[:5])
        known = ", ".join(dict.fromkeys(ids[0][:12] for ids in newest if ids))
        raise CheckpointError(_nothing(resume, output_dir, f"use last, a path, or one of {known}"))
    return _newest_whole(resume, matches.pop())


def run_dir_of(checkpoint: Path, otherwise: str | None = None) -> Path:
    """Return the run folder of a checkpoint.

    Args:
        checkpoint: its folder.
        otherwise: the alternative fix for the error message, instead of moving it back.

    Raises:
        CheckpointError: it was moved out of its run's folder.
    """
    folder = checkpoint.resolve()
    if folder.parent.name != FOLDER:
        rule = f"does not lie in the folder '{FOLDER}' of a run"
        fix = "put it back there" + (f", or {otherwise}" if otherwise else "")
        raise CheckpointError(Problem("resume", str(checkpoint), rule, fix))
    return folder.parent.parent


def _newest_whole(resume: str, run_dir: Path) -> tuple[Path, list[str]]:
    next((run_dir / FOLDER).iterdir(), None)  # raises for an unreadable folder, which would look empty
    passed_over = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify(path)
            return path, passed_over
        except (CheckpointError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) or not path.exists():  # its run continues, and has a newer one
                return _newest_whole(resume, run_dir)
            problem = error.problems[0]
            passed_over.append(f"{problem.value} {problem.rule}; taking the one before")
    fix = "start from scratch with resume=null, or name another run"
    raise CheckpointError(Problem("resume", resume, f"has no whole checkpoint in {run_dir / FOLDER}", fix))


def _remove(folder: Path) -> None:
    """Remove a folder if it exists, under another name first, so that a reader never sees a partial checkpoint."""
    gone = folder.with_name(f".{folder.name.removeprefix('.')}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _nothing(resume: str, output_dir: Path, fix: str) -> Problem:
    return Problem("resume", resume, f"matches no single run with a checkpoint in {output_dir}", fix)


def _run_dirs(output_dir: Path) -> Iterable[Path]:
    return [p.parent for pattern in ("runs/*/", "multiruns/*/*/") for p in output_dir.glob(pattern + FOLDER)]


def _newest(run_dir: Path) -> float:
    return max(_saved_at(p) for p in list_checkpoints(run_dir))


def _saved_at(folder: Path) -> float:
    try:
        return read_manifest(folder).saved_at
    except CheckpointError:
        with suppress(OSError):  # removed by its continuing run, or inaccessible
            return folder.stat().st_mtime
        return 0.0


def _run_ids(run_dir: Path) -> list[str]:
    """List the MLflow runs that the checkpoints of a folder belong to, the newest checkpoint's first."""
    found = []
    for path in reversed(list_checkpoints(run_dir)):
        with suppress(CheckpointError):
            found.append(read_manifest(path).run_id)
    return list(dict.fromkeys(found))


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
