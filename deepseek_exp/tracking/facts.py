"""What a run depended on in addition to its configuration: git state, installed packages, hardware."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import psutil

_TIMEOUT_SECONDS = 10


def git_facts(source_dir: Path) -> tuple[dict[str, str], str]:
    """Return the git state of a folder.

    Returns:
        The tags (`git.state`: clean, dirty, `not a repository` or `git is not installed`; commit and branch if any)
        and the diff against the commit, followed by the names of untracked files; empty if clean.
    """
    try:
        state = _git(source_dir, "status", "--porcelain")
    except FileNotFoundError:
        return {"git.state": "git is not installed"}, ""
    except (subprocess.SubprocessError, OSError):
        return {"git.state": "not a repository"}, ""
    try:
        tags = {
            "git.state": "dirty" if state else "clean",
            "mlflow.source.git.commit": _git(source_dir, "rev-parse", "HEAD").strip(),
            "mlflow.source.git.branch": _git(source_dir, "rev-parse", "--abbrev-ref", "HEAD").strip(),
        }
        untracked = [f"# untracked: {line[3:]}\n" for line in state.splitlines() if line.startswith("??")]
        return tags, _git(source_dir, "diff", "HEAD", "--binary") + "".join(untracked)
    except (subprocess.SubprocessError, OSError):
        return {"git.state": "no commit yet"}, ""


def environment_files() -> dict[str, str]:
    """Return packages.txt (`name==version` of each installed distribution) and hardware.json."""
    return {"packages.txt": _packages(), "hardware.json": json.dumps(_hardware(), indent=2)}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, check=True, timeout=_TIMEOUT_SECONDS)
    return result.stdout.decode(errors="replace")


def _packages() -> str:
    found = set()
    for distribution in importlib.metadata.distributions():
        read = distribution.read_text  # always UTF-8
        text = read("METADATA") or read("PKG-INFO") or ""
        # The first lines, which take a twentieth of the time that parsing the whole description does.
        fields = dict(line.split(": ", 1) for line in text.partition("\n\n")[0].splitlines() if ": " in line)
        if fields.keys() >= {"Name", "Version"}:
            found.add(f"{fields['Name']}=={fields['Version']}")
    return "\n".join(sorted(found, key=str.lower)) + "\n"


def _hardware() -> dict[str, object]:
    return {
        "host": platform.node(),
        "cpu_model": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Return name, memory and driver of each NVIDIA GPU; none without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, check=True, timeout=_TIMEOUT_SECONDS)
    except (subprocess.SubprocessError, OSError):
        return []
    return result.stdout.decode(errors="replace").strip().splitlines()
