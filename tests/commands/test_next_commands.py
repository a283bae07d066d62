"""Commands that are printed run as they stand, from the folder in which they are printed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from deepseek_exp import console
from deepseek_exp.commands import next_commands
from deepseek_exp.experiment import command_line
from deepseek_exp.tracking.rundir import Progress
from tests import forks, runs
from tests.config.test_config import composed

VALUES = (
    "out", "/tmp/a:b", "a b", "it's", "a,b", "a$b", "${x}", "\\${x}", "\\\\${x}", "1e3", "null", "true", "a=b",
    "\xe4 \u4f60", "~x", "#x", "a\\", "a\\b", "a\\'b", "a\\\\'b", "$(rm)", "(x)", "[a]", "{a}", 'a"b', "-x", "  a",
    "a\tb", "a;b|c&d", "*",
)  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_an_override_is_read_as_it_was(value):
    (word,) = shlex.split(next_commands.override("output_dir", value))
    parsed = OverridesParser.create().parse_override(word)
    assert not parsed.is_sweep_override() and str(parsed.key_or_group) == "output_dir"
    assert OmegaConf.create({"key": parsed.value()})["key"] == value


class TestCommand:
    def test_in_the_folder_of_the_project(self, monkeypatch):
        monkeypatch.chdir(runs.ROOT)
        assert shlex.split(console.command())[1] == "run.py"

    def test_elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        python, script = shlex.split(console.command())
        assert Path(script) == runs.ROOT / "run.py"
        assert Path(python).absolute() == Path(sys.executable).absolute()

    def test_the_name_of_the_python_that_a_shell_finds(self, monkeypatch):
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
        assert console.command().split()[0] == "python"
        monkeypatch.setenv("PATH", "/nowhere")
        assert console.command().split()[0] != "python"


class TestUi:
    def test_make_shows_the_store_of_the_project_alone(self, monkeypatch, tmp_path):
        monkeypatch.chdir(runs.ROOT)
        monkeypatch.setattr(console.shutil, "which", lambda name: f"/usr/bin/{name}")
        assert next_commands.ui_command("sqlite:///outputs/mlflow.db") == "make ui"
        assert next_commands.ui_command("sqlite:///other/mlflow.db").endswith(
            "--backend-store-uri sqlite:///other/mlflow.db"
        )
        monkeypatch.chdir(tmp_path)
        store = "sqlite:///out puts/mlflow.db"
        words = shlex.split(next_commands.ui_command(store))
        assert words[1:] == ["-m", "mlflow", "ui", "--workers", "1", "--backend-store-uri", store]

    def test_a_server_is_opened_without_its_password(self):
        assert next_commands.ui_command("http://alice:s3cr3t@host:5000") == "http://alice:***@host:5000"
        assert "s3cr3t" not in next_commands.ui_command("postgresql://alice:s3cr3t@host/db")

    def test_it_opens_the_experiment_at_its_training_runs(self, tmp_path):
        Progress(experiment_id="7").save(tmp_path)
        page = "/#/experiments/7/runs?workflowType=machine_learning"
        found = job("tracking.uri=http://u:pw@h:80", checkpoint=Path("step-1"))
        found.run_dir = tmp_path
        assert next(next_commands.next_commands(found, "f" * 32))[0] == f"http://u:***@h:80{page}"
        found.cfg.tracking.uri = "sqlite:///m.db"
        assert next(next_commands.next_commands(found, "f" * 32))[1].endswith(f": http://127.0.0.1:5000{page}")


def job(*overrides, checkpoint=None):
    cfg = composed(*(o for o in overrides if not o.startswith("hydra.")))
    history = overrides if checkpoint is None else None
    return SimpleNamespace(
        cfg=cfg, overrides=overrides, checkpoint=checkpoint, history=history, run_dir=Path("nowhere")
    )


def test_a_sweep_repeats_the_experiment(tmp_path):
    own = ("size=tiny", "optim.lr=1e-2", "sample.prompt='a, b'", "data=synthetic")
    last = [line for line, _ in next_commands.next_commands(job(*own), "f" * 32)][-1]
    assert shlex.split(last)[2:] == ["-m", "size=tiny", "sample.prompt='a, b'", "data=synthetic", "optim.lr=1e-3,3e-4"]


def test_no_sweep_is_offered_after_a_resume():
    """The overrides of a resume are not those of the experiment."""
    every = [line for line, _ in next_commands.next_commands(job("resume=last", checkpoint=Path("step-1")), "f" * 32)]
    assert len(every) == 3 and not any(" -m optim" in line or "3e-4" in line for line in every)


@pytest.mark.long
def test_printed_commands_run_where_they_are_printed(tmp_path):
    """In another folder than the project's, with blanks and quotes in names."""
    folder = tmp_path / "my work"
    folder.mkdir()
    words = (*shlex.split(next_commands.override("output_dir", "it's here mine")), "trainer.max_steps=2")
    done = forks.run(folder, *runs.TRACKED, *words, "optim.warmup_steps=0")
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition("  # ")[0].strip() for line in done.stdout.split("\nnext:\n")[1].splitlines()]
    ui, sample, resume, sweep = (shlex.split(line) for line in lines)
    assert ui[-1] == "sqlite:///it's here mine/mlflow.db"
    for command in (sample, resume, sweep):
        assert Path(command[0]).absolute() == Path(sys.executable).absolute() and command[1] == forks.RUN
    sampled = forks.run(folder, *sample[2:], "sample.max_new_tokens=2")
    assert sampled.returncode == 0, sampled.stderr
    resumed = forks.run(folder, *resume[2:])
    assert resumed.returncode == 0 and "step 4/4" in resumed.stderr, resumed.stderr
    command_line.check_command_line(sweep[2:])
