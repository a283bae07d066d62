"""The follow-up commands that a run prints. They can be pasted into a shell in the folder where the run was started."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepseek_exp.config import ROOT, Do, Tracker
from deepseek_exp.console import command, python
from deepseek_exp.redact import redact
from deepseek_exp.tracking.rundir import Progress
from deepseek_exp.tracking.uri import absolute_uri, runs_page

if TYPE_CHECKING:
    from deepseek_exp.experiment.job import Job

OUTPUTS = "outputs"
# Address of `mlflow ui` and `make ui`.
UI_SERVER = "http://127.0.0.1:5000"
# The store that `make ui` shows.
DEFAULT_STORE = f"sqlite:///{ROOT / OUTPUTS / 'mlflow.db'}"


def next_commands(job: Job, run_id: str) -> Iterator[tuple[str, str]]:
    """Yield follow-up commands after training, as (command, purpose)."""
    if job.cfg.tracking.backend is Tracker.mlflow:
        experiment_id = Progress.load(job.run_dir).experiment_id
        yield ui_command(job.cfg.tracking.uri, experiment_id), _where_runs_are(job.cfg.tracking.uri, experiment_id)
    if not job.cfg.trainer.keep_checkpoints:
        return
    start, resume = command(), resume_words(job, run_id)
    yield f"{start} do=sample {resume}", "generate more text"
    t, longer = job.cfg.trainer, f"trainer.max_steps={2 * job.cfg.trainer.max_steps}"
    if t.max_epochs is not None:
        longer = f"trainer.max_epochs={2 * t.max_epochs:g}"
    yield f"{start} {training_words(job, run_id)} {longer}", "continue training"
    # init_from determines the model, and old checkpoints do not store their overrides.
    if job.history is not None and job.cfg.init_from is None:
        own = [o for o in job.history if not o.lstrip("+").startswith(("resume=", "optim.lr="))]
        yield f"{start} -m {words([*searchpath(), *own, 'optim.lr=1e-3,3e-4'])}", "a sweep"


def ui_command(uri: str, experiment_id: str | None = None) -> str:
    """Return the command that shows a store's runs in a browser, or the address of its server."""
    if uri.startswith(("http://", "https://")):
        return redact(uri if experiment_id is None else runs_page(uri, experiment_id))
    if absolute_uri(uri) == DEFAULT_STORE and Path.cwd() == ROOT and shutil.which("make") is not None:
        return "make ui"
    return f"{python()} -m mlflow ui --workers 1 --backend-store-uri {shlex.quote(redact(uri))}"


def _where_runs_are(uri: str, experiment_id: str | None) -> str:
    """Return the purpose of `ui_command`, and the address at which a server that it starts shows the runs."""
    what = "view and compare runs in the MLflow UI"
    if experiment_id is None or uri.startswith(("http://", "https://")):
        return what
    return f"{what}: {runs_page(UI_SERVER, experiment_id)}"


def resume_words(job: Job, run_id: str) -> str:
    """Return the overrides that select this run again."""
    where = job.cfg.output_dir
    return " ".join([f"resume={run_id[:12]}", *([override("output_dir", where)] if where != OUTPUTS else [])])


def training_words(job: Job, run_id: str) -> str:
    """Return the overrides that continue this training."""
    verb = [] if job.cfg.do is Do.train else [f"do={job.cfg.do.value}"]
    return " ".join([*verb, resume_words(job, run_id)])


def override(key: str, value: str) -> str:
    """Return the shell word that sets a key to exactly this text."""
    # A backslash is literal unless it precedes a quote, an interpolation or the end.
    escaped = re.sub(r"\\+(?='|\$\{|$)", lambda found: 2 * found[0], value)
    escaped = escaped.replace("'", "\\'").replace("${", "\\${")
    text = value if _reads_as(f"{key}={value}", value) else f"'{escaped}'"
    return shlex.quote(f"{key}={text}")


def words(overrides: Sequence[str]) -> str:
    """Return overrides quoted for a shell, without passwords."""
    return " ".join(shlex.quote(redact(word)) for word in overrides)


def searchpath() -> list[str]:
    """Return the overrides that add search paths for group options. A printed command needs the job's."""
    given = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else []
    return [word for word in given if word.lstrip("+").startswith("hydra.searchpath=")]


def _reads_as(word: str, value: str) -> bool:
    """Return whether Hydra parses the word as this value."""
    try:
        parsed = OverridesParser.create().parse_override(word)
        if parsed.is_sweep_override():
            return False
        return bool(OmegaConf.create({"key": parsed.value()})["key"] == value)
    except (HydraException, OmegaConfBaseException):
        return False
