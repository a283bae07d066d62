"""What is recorded about the source, the packages and the machine."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from deepseek_exp.tracking.facts import environment_files, git_facts


@pytest.fixture(autouse=True)
def no_other_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nobody has configured git; in a hook of git, GIT_DIR names a repository for every command."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state(tmp_path: Path) -> None:
    assert git_facts(tmp_path) == ({"git.state": "not a repository"}, "")
    _git(tmp_path, "init", "-b", "trunk")
    assert git_facts(tmp_path)[0] == {"git.state": "no commit yet"}
    (tmp_path / "a.py").write_text("a = 1\n")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first")
    tags, diff = git_facts(tmp_path)
    assert tags == {
        "git.state": "clean",
        "mlflow.source.git.commit": _git(tmp_path, "rev-parse", "HEAD"),
        "mlflow.source.git.branch": "trunk",
    }
    assert diff == ""
    (tmp_path / "a.py").write_text("a = 2\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    tags, diff = git_facts(tmp_path)
    assert tags["git.state"] == "dirty"
    assert "-a = 1\n+a = 2\n" in diff
    assert diff.endswith("# untracked: b.py\n")


def test_git_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_facts(tmp_path) == ({"git.state": "git is not installed"}, "")


def test_packages_and_hardware() -> None:
    files = environment_files()
    assert f"mlflow=={version('mlflow')}" in files["packages.txt"].splitlines()
    hardware = json.loads(files["hardware.json"])
    assert hardware["cpu_model"] and hardware["threads"] >= 1 and hardware["memory_bytes"] > 1e8
    assert hardware["python"].startswith("3.") and isinstance(hardware["gpus"], list)
