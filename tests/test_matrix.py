"""A checkpoint goes anywhere: whatever trained it, a machine without GPU uses it after its text has moved."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deepseek_exp.inference import from_pretrained
from tests import forks, runs

pytestmark = pytest.mark.long

DENSE, MOE = "model=v4_distill", "model=v3_moe"  # both can be exported
QUICK = (
    *(
        "size=tiny",
        "data=text",
        "data.seq_len=16",
        "device=cpu",
        "optim.warmup_steps=0",
    ),
    *("trainer.max_steps=2", "trainer.eval_seqs=4", "trainer.n_threads=1", "trainer.log_every_steps=1"),
    *("trainer.global_batch_seqs=4", "trainer.micro_batch_seqs=1", "sample.max_new_tokens=2"),
)
TRAINED = {
    "cpu": (DENSE,),
    "fused kernels": (DENSE, "kernels=fused"),
    "pp2": (DENSE, "parallel.pp=2", "parallel.zero_stage=1"),
    "dp2 ep2": (MOE, "parallel.dp=2", "parallel.ep=2", "parallel.zero_stage=1"),
    "zero3": (DENSE, "parallel.dp=2", "parallel.zero_stage=3"),
    "other folder": (DENSE,),
    "other working directory": (DENSE,),
}
# what this machine runs in place of what trained it
HERE = ("kernels=torch", "parallel=single", "device=cpu")


@dataclass
class Trained:
    """A run that ended, its text moved.

    Attributes:
        cwd: folder that commands are typed in.
        words: what finds the run from there.
        run_dir: the run's folder.
        text: where its text is now.
    """

    cwd: Path
    words: tuple[str, ...]
    run_dir: Path
    text: Path

    @property
    def checkpoint(self) -> Path:
        return self.run_dir / "checkpoints" / "step-00000002"


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, tmp_path_factory) -> Trained:
    top = tmp_path_factory.mktemp("matrix")
    folder, elsewhere = top / "here", top / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    text = folder / "text.txt"
    text.write_text("".join(f"line {i} has {i * i} in it, é\n" for i in range(600)), encoding="utf-8")
    tracking = "tracking.system_metrics=false" if request.param.startswith("other") else "tracking=none"
    done = forks.run(folder, *QUICK, tracking, "data.path=text.txt", *TRAINED[request.param])
    assert done.returncode == 0, done.stderr
    text = text.rename(elsewhere / "moved.txt")
    (run_dir,) = runs.run_dirs(folder)
    if request.param == "other folder":
        folder = Path(shutil.move(folder, top / "moved"))
        run_dir = folder / run_dir.relative_to(top / "here")
    if request.param == "other working directory":
        return Trained(elsewhere, ("resume=last", f"output_dir={folder / 'outputs'}"), run_dir, text)
    return Trained(folder, ("resume=last",), run_dir, text)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """Leave this machine without anything that runs Triton's kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def run(trained: Trained, *words: str) -> str:
    done = forks.run(trained.cwd, *words, *trained.words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sample(trained):
    assert run(trained, "do=sample", "sample.prompt=line").startswith("line")


def test_eval_gives_the_loss_of_the_training(trained):
    losses = runs.trace(trained.run_dir, "val/loss")
    assert f"loss {losses[2]:.3f} nats per token" in run(trained, "do=eval", f"data.path={trained.text}", *HERE)


def test_export(trained, tmp_path):
    run(trained, "do=export", f"export.path={tmp_path / 'hf'}")
    lm, ours = from_pretrained(tmp_path / "hf"), from_pretrained(trained.checkpoint)
    tokens = torch.arange(12)[None]
    assert torch.equal(lm.model(tokens), ours.model(tokens))


def test_from_pretrained(trained):
    assert len(from_pretrained(trained.checkpoint).generate("line", max_new_tokens=2)) > 0


def test_training_continues(trained):
    """Last, since it adds a run: the same text, in one process, with PyTorch's kernels."""
    out = run(trained, f"data.path={trained.text}", "trainer.max_steps=4", *HERE)
    newest = max((trained.run_dir.parent).iterdir(), key=lambda path: path.stat().st_mtime)
    losses = runs.trace(newest, "train/loss")
    assert sorted(losses) == [1, 2, 3, 4] and losses[4] < losses[1], out


LATIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


@pytest.mark.parametrize("words", [("do=sample",), ("do=eval", *HERE), ("do=export", "export.path=hf_locale")], ids=str)
def test_another_locale(trained, words, monkeypatch):
    """Real processes, since a locale is chosen at the start of one; for one kind of training."""
    if trained.cwd.name != "here" or (trained.run_dir / "ranks").exists():
        pytest.skip("one kind of training is enough")
    for name, value in LATIN.items():
        monkeypatch.setenv(name, value)
    moved = (f"data.path={trained.text}",) if words[0] == "do=eval" else ()
    done = runs.run(trained.cwd, *words, *moved, *trained.words)
    assert done.returncode == 0, done.stderr
