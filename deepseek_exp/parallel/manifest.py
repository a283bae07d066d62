"""The folder of one checkpoint: whether it is whole, which are there, and which one `resume` means.

A checkpoint is a folder `step-00000100` whose `manifest.json` names every file with its size and SHA-256. The folder is
written under another name and renamed when all is on disk, so that a folder of that name is whole unless it was damaged
later. This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepseek_exp.disk import fsync_path
from deepseek_exp.errors import CheckpointError, Problem

FORMAT = 2  # 1 knew no shards
MANIFEST = "manifest.json"
FOLDER = "checkpoints"
REPLACED = ".replaced"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps done.
        run_id: MLflow run that it belongs to.
        saved_at: seconds since the epoch.
        val_loss: validation loss at this step, nats per token, where it was measured.
        files: name -> {"bytes": size, "sha256": digest}.
        format: version of this layout.
    """

    step: int
    run_id: str
    saved_at: float
    val_loss: float | None
    files: dict[str, dict[str, Any]]
    format: int = FORMAT


def checkpoint_name(step: int) -> str:
    """Name the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def seal(
    folder: Path,
    target: Path,
    *,
    step: int,
    run_id: str,
    val_loss: float | None,
    digests: Mapping[str, dict[str, Any]],
) -> None:
    """Digest the files of `folder`, make them durable and move the folder to `target` in one step.

    Args:
        folder: the written files; on the same file system as target.
        target: where the checkpoint will stand; what stood there is replaced.
        step: optimizer steps done.
        run_id: MLflow run that it belongs to.
        val_loss: validation loss at this step, or None.
        digests: name -> {"bytes": size, "sha256": digest} of files that whoever wrote them has digested already.
    """
    files = {path.name: digests.get(path.name) or _digest(path) for path in sorted(folder.iterdir())}
    before = max((_saved_at(path) for path in list_checkpoints(target.parent.parent)), default=0.0)
    saved_at = max(time.time(), before + 1e-3)  # the order of saving, also where a clock was set back
    manifest = Manifest(step=step, run_id=run_id, saved_at=saved_at, val_loss=val_loss, files=files)
    (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=1), encoding="utf-8")
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
        CheckpointError: it is missing, damaged or of a newer format.
    """
    fix = "name another checkpoint, or resume=last for the newest whole one"
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        rule = f"has no readable {MANIFEST} ({type(error).__name__})"
        raise CheckpointError(Problem("resume", str(folder), rule, fix)) from error
    if manifest.format > FORMAT:
        rule = f"has format {manifest.format}, and this version reads {FORMAT}"
        raise CheckpointError(Problem("resume", str(folder), rule, "use the version that wrote it"))
    return manifest


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    manifest = read_manifest(folder)
    for name, want in manifest.files.items():
        path = folder / name
        if not path.is_file():
            damage = "is missing"
        elif path.stat().st_size != want["bytes"]:
            damage = f"is truncated: {path.stat().st_size} of {want['bytes']} bytes"
        elif _sha256(path) != want["sha256"]:
            damage = "is corrupted: its SHA-256 is not the one recorded"
        else:
            continue
        fix = "name another checkpoint, or resume=last for the newest whole one"
        raise CheckpointError(Problem("resume", str(folder), f"is damaged ({name} {damage})", fix))
    return manifest


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run in the order they were saved.

    That is not the order of their steps where a run went on from an earlier one. One that was moved away for its
    successor is listed as long as that does not stand.
    """
    folder = run_dir / FOLDER
    moved = [p for p in folder.glob(f".step-*{REPLACED}") if not (folder / p.name[1 : -len(REPLACED)]).exists()]
    return sorted([*folder.glob("step-*"), *moved], key=lambda path: (_saved_at(path), path.name))


def prune(run_dir: Path, keep: int) -> None:
    """Remove unfinished checkpoints and all but the newest `keep` and the one with the lowest validation loss."""
    readable = []
    for path in list_checkpoints(run_dir):
        try:
            readable.append((path, read_manifest(path)))
        except CheckpointError:
            continue  # damaged: left for the user to look at
    measured = [(m.val_loss, path) for path, m in readable if m.val_loss is not None and math.isfinite(m.val_loss)]
    stay = {path for path, _ in readable[-keep:]} | ({min(measured)[1]} if measured else set())
    unfinished = set((run_dir / FOLDER).glob(".step-*")) - stay
    for path in unfinished | ({path for path, _ in readable} - stay):
        _remove(path)


def locate(resume: str, output_dir: Path) -> tuple[Path, list[str]]:
    """Find the checkpoint that `resume` means, whole.

    Args:
        resume: `last` (the run that saved last), an MLflow run id or its beginning, the folder of a run, or the folder
            of one checkpoint.
        output_dir: where runs lie.

    Returns:
        The checkpoint's folder, verified, and a sentence for every damaged one that was passed over.

    Raises:
        CheckpointError: nothing matches, or nothing that matches is whole.
    """
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
    matches = {run for run in runs.values() if len(resume) >= 4 and _run_id(run).startswith(resume)}
    if len(matches) != 1:
        known = ", ".join(_run_id(run)[:12] for _, run in sorted(runs.items(), reverse=True)[:5])
        raise CheckpointError(_nothing(resume, output_dir, f"use last, a path, or one of {known}"))
    return _newest_whole(resume, matches.pop())


def run_dir_of(checkpoint: Path) -> Path:
    """Give the run folder that a checkpoint lies in.

    Raises:
        CheckpointError: it was moved out of its run's folder.
    """
    folder = checkpoint.resolve()
    if folder.parent.name != FOLDER:
        rule, fix = f"does not lie in the folder '{FOLDER}' of a run", "put it back there to go on with the run"
        raise CheckpointError(Problem("resume", str(checkpoint), rule, fix))
    return folder.parent.parent


def _newest_whole(resume: str, run_dir: Path) -> tuple[Path, list[str]]:
    passed_over = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify(path)
            return path, passed_over
        except (CheckpointError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) or not path.exists():  # its run goes on, and has a newer one
                return _newest_whole(resume, run_dir)
            problem = error.problems[0]
            passed_over.append(f"{problem.value} {problem.rule}; taking the one before")
    fix = "start anew with resume=null, or name another run"
    raise CheckpointError(Problem("resume", resume, f"has no whole checkpoint in {run_dir / FOLDER}", fix))


def _remove(folder: Path) -> None:
    """Remove a folder if it is there, under another name first: for whoever reads it a checkpoint is there or not."""
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
        with suppress(FileNotFoundError):  # removed meanwhile, as its run goes on
            return folder.stat().st_mtime
        return 0.0


def _run_id(run_dir: Path) -> str:
    for path in reversed(list_checkpoints(run_dir)):
        try:
            return read_manifest(path).run_id
        except CheckpointError:
            continue
    return ""


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
