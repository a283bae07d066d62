"""No secret is printed, written for others to read, or sent: whole runs against a server that keeps everything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from deepseek_exp.tracking.facts import git_facts
from deepseek_exp.tracking.rundir import Spec
from deepseek_exp.tracking.sender import _save_facts
from tests import forks, runs
from tests.tracking.recorder import Recorder, recording
from tests.tracking.tracking_parts import make_config

SECRETS = ("S3cretURI", "S3cretTAG", "S3cretOVR", "S3cretENV")
# What holds the section `tracking` for another process or a later command; its owner alone can read it.
PRIVATE = {"tracking.json", "job.json"}


def _words(recorder: Recorder) -> tuple[str, ...]:
    return (
        *runs.TRACKED,
        "trainer.max_steps=2",
        "optim.warmup_steps=1",
        f"tracking.uri='http://alice:S3cretURI%2F@127.0.0.1:{recorder.port}'",
        "+tracking.tags.db_password='S3cretTAG with a blank'",
        "+tracking.tags.store='postgresql://me:S3cretOVR/@h/db'",
    )


def _leaks(folder: Path) -> list[tuple[str, str]]:
    """List the files that have a secret, also in their name, though others can read them or they need none."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes().decode(errors="replace") if path.is_file() else ""
        private = path.name in PRIVATE and path.stat().st_mode & 0o077 == 0
        for secret in SECRETS:
            if secret in path.name or (secret in content and not (private and secret != "S3cretENV")):
                found.append((str(path.relative_to(folder)), secret))
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, str]:
    """A run and a sweep of one job, with a secret in each place that takes one."""
    folder = tmp_path_factory.mktemp("secrets")
    with pytest.MonkeyPatch.context() as patch, recording(folder / "artifacts") as recorder:
        patch.setenv("NCCL_STORE", "http://me:S3cretENV@h")
        done = forks.run(folder, *_words(recorder))
        assert done.returncode == 0, done.stderr
        swept = forks.run(folder, "-m", *_words(recorder), "optim.lr=1e-3")
        assert swept.returncode == 0, swept.stderr
    return folder, recorder, done.stdout + done.stderr + swept.stdout + swept.stderr


Recorded = tuple[Path, Recorder, str]


@pytest.mark.parametrize("flags", [("--cfg", "job"), ("-c=all", "--resolve"), ("--info", "config")])
def test_a_configuration_is_printed_without_secrets(tmp_path: Path, flags: tuple[str, ...]) -> None:
    store, tag = "tracking.uri='http://alice:S3cretURI@h'", "+tracking.tags.db_password=S3cretTAG"
    done = forks.run(tmp_path, *flags, store, tag)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert "uri: http://alice:***@h" in shown and not any(secret in shown for secret in SECRETS)


def test_nothing_that_is_printed_has_a_secret(recorded: Recorded) -> None:
    assert "in http://alice:***@127.0.0.1:" in recorded[2]
    assert not [secret for secret in SECRETS if secret in recorded[2]]


def test_nothing_that_is_sent_has_a_secret(recorded: Recorded) -> None:
    sent = "\n".join(recorded[1].requests)
    assert len(recorded[1].runs) == 3
    for expected in ("+tracking.tags.db_password='***'", "postgresql://me:***@h/db", "http://me:***@h"):
        assert expected in sent
    assert not [secret for secret in SECRETS if secret in sent]


def test_nothing_that_is_written_for_others_has_a_secret(recorded: Recorded) -> None:
    folder = recorded[0]
    written = {path.name for path in folder.rglob("*")}
    assert {"journal.jsonl", "facts.json", "sender.log", "sweep.json", "multirun.yaml", "config.yaml"} <= written
    assert _leaks(folder) == []


def test_logs_and_what_must_hold_a_secret_are_private(recorded: Recorded) -> None:
    for name in ("tracking.json", "sender.log", "multirun.yaml"):
        for path in recorded[0].rglob(name):
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_diff_is_stored_without_its_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of the store often stands in conf/tracking/mlflow.yaml, which is not committed then."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    source = tmp_path / "source"
    source.mkdir()
    (source / "mlflow.yaml").write_text("uri: null\nn_tokens: 1\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "m"]):
        subprocess.run(["git", "-C", str(source), *words], check=True)
    (source / "mlflow.yaml").write_text("uri: http://me:S3cretURI@h\nn_tokens: 2\npassword: S3cretTAG\n")
    _, diff = git_facts(source)
    assert "S3cretURI" in diff
    spec = Spec(make_config("sqlite:///m.db"), "n", {}, "uri: http://me:S3cretURI@h", {}, "", "", "", None, 0)
    _save_facts(tmp_path, spec, diff)
    written = (tmp_path / "facts.json").read_text()
    assert "+uri: http://me:***@h\\n+n_tokens: 2\\n+password: ***\\n" in written and "S3cret" not in written
