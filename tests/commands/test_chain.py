"""Chains that run: what each stage starts from, what is reused, what is run again, and what survives a kill."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from deepseek_exp import config
from deepseek_exp.checkpoint import manifest
from deepseek_exp.commands.chain import run_chain
from deepseek_exp.errors import ChainError
from deepseek_exp.experiment import command_line
from deepseek_exp.experiment.chain_file import ChainFile
from deepseek_exp.tracking.rundir import lock
from tests import forks, runs

STAGES = (
    *runs.QUICK,
    *("+chain.stages.pre.do=train", "+chain.stages.tune.do=train", "+chain.stages.tune.set.optim.lr=1e-3"),
    *("+chain.stages.test.do=eval", "chain.yardstick.tokens=2000"),
)
NAME = "pre-tune-test"


def run(folder: Path, *words: str, recipe: str | None = None, stages: Sequence[str] = STAGES) -> str:
    """Run a chain in this process, in a folder; return what it prints."""
    config.register()
    before, out = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        composed = command_line.check_command_line([*stages, *words])
        with contextlib.redirect_stdout(out):
            run_chain(composed.stages, composed.exp, recipe, words)
    finally:
        os.chdir(before)
    return out.getvalue()


def file_of(folder: Path, name: str = NAME) -> ChainFile:
    return ChainFile.load(folder / "outputs" / "chains" / name)


def checkpoint(folder: Path, stage: str, name: str = NAME) -> Path:
    return folder / "outputs" / file_of(folder, name).stages[stage].checkpoint


def digests(folder: Path, name: str = NAME) -> dict[str, str]:
    """Return a digest of the weights, the optimizer and the random numbers that each stage has left."""
    found = {}
    for stage, record in file_of(folder, name).stages.items():
        if record.checkpoint is not None:
            files = (checkpoint(folder, stage, name) / file for file in ("model.safetensors", "state.safetensors"))
            found[stage] = " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the chain once, in this process."""
    folder = tmp_path_factory.mktemp("chain")
    return folder, run(folder)


def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished[0] / "outputs", tmp_path / "outputs")
    return tmp_path


class TestAChain:
    def test_each_stage_starts_from_the_one_before(self, finished):
        folder, _ = finished
        file = file_of(folder)
        assert [(name, r.state) for name, r in file.stages.items()] == [
            ("pre", "done"),
            ("tune", "done"),
            ("test", "done"),
        ]
        first, second = (manifest.verify(checkpoint(folder, stage)) for stage in ("pre", "tune"))
        assert first.lineage.inputs == {}
        assert second.lineage.inputs == {"start": manifest.digest(checkpoint(folder, "pre"))}
        assert second.lineage.contract == first.lineage.contract
        assert second.lineage.contract.max_seq_len == 64 and len(second.lineage.contract.tokenizer) == 64
        assert [m.lineage.stage_key for m in (first, second)] == [file.stages[s].key for s in ("pre", "tune")]
        assert file.stages["test"].checkpoint is None
        assert file.stages["test"].loss == pytest.approx(file.stages["tune"].loss, abs=1e-6)

    def test_what_a_stage_changes_is_shown(self, finished):
        _, out = finished
        assert "stage 1/3  pre  do=train  from scratch" in out
        assert "stage 2/3  tune  do=train  from pre (sha256:" in out
        assert "optim.lr  0.003  0.001" in out

    def test_the_table(self, finished):
        folder, out = finished
        head, _, *lines = (folder / "outputs" / "chains" / NAME / "chain.md").read_text().splitlines()
        columns = [cell.strip() for cell in head.strip("|").split("|")]
        pre, tune, test = (
            dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines[:3]
        )
        assert (pre["parameters"], pre["bytes"], pre["to its start"]) == ("125,256", "501,024", "-")
        assert float(tune["loss"]) < float(pre["loss"]) and tune["to its start"].startswith("-")
        change = 100 * (float(tune["loss"]) / float(pre["loss"]) - 1)
        assert float(tune["to the first"].split("%")[0]) == pytest.approx(change, abs=0.02)
        assert "±" in tune["to the first"] and tune["agreement"].endswith("%")
        assert float(test["val/loss"]) == float(tune["val/loss"]) and test["loss"] == "-"
        assert float(pre["loss"]) == pytest.approx(float(pre["val/loss"]), rel=0.02)  # on other tokens of the same text
        assert "3 stages run, 0 reused" in out

    def test_a_second_start_reuses_all_of_it(self, finished):
        folder, _ = finished
        before = runs.run_dirs(folder)
        out = run(folder)
        assert runs.run_dirs(folder) == before
        assert out.count("is reused: run") == 3 and "0 stages run, 3 reused" in out and "though" not in out


class TestReuse:
    def test_a_change_runs_again_what_depends_on_it(self, finished, tmp_path):
        folder = copied(finished, tmp_path)
        before = file_of(folder)
        out = run(folder, "chain.stages.tune.set.optim.lr=2e-3")
        now = file_of(folder)
        assert now.stages["pre"] == before.stages["pre"] and "2 stages run, 1 reused" in out
        assert all(now.stages[s].key != before.stages[s].key for s in ("tune", "test"))
        assert "0 stages run, 3 reused" in run(folder)  # what was done before the change is still there
        assert file_of(folder).stages == before.stages

    @pytest.mark.long
    def test_how_it_is_computed_is_said_and_counts_if_strict(self, finished, tmp_path):
        folder = copied(finished, tmp_path)
        out = run(folder, "trainer.micro_batch_seqs=8", "chain.only=[pre]")
        assert "pre is reused" in out and ", though trainer.micro_batch_seqs 4 -> 8" in out
        out = run(folder, "trainer.micro_batch_seqs=8", "chain.only=[pre]", "chain.reuse=strict")
        assert "pre is run again, since chain.reuse=strict: trainer.micro_batch_seqs 4 -> 8" in out
        assert "1 stages run, 0 reused" in out
        assert "1 stages run, 0 reused" in run(folder, "chain.only=[pre]", "chain.reuse=never")

    @pytest.mark.long
    def test_a_damaged_checkpoint_is_made_again(self, finished, tmp_path):
        folder = copied(finished, tmp_path)
        before, damaged = digests(folder), checkpoint(folder, "tune") / "model.safetensors"
        with damaged.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\xff")
        out = run(folder)
        assert "tune is run again: " in out and "model.safetensors is corrupted" in out
        assert "continuing tune from" in out and digests(folder) == before

    def test_only_some_stages(self, finished, tmp_path):
        folder = copied(finished, tmp_path)
        out = run(folder, "chain.only=[tune]", "chain.stages.tune.set.optim.lr=3e-3")
        assert "pre is reused" in out and "1 stages run, 1 reused" in out
        with pytest.raises(ChainError, match=r"^chain\.only='tune' leaves out pre, which is not done with this"):
            run(folder, "chain.only=[tune]", "seed=7")

    def test_two_processes_do_not_run_one_chain(self, finished):
        folder, _ = finished
        held = lock(folder / "outputs" / "chains" / NAME / "lock", wait=False)
        with held, pytest.raises(ChainError, match=r"is being run by another process"):
            run(folder)


def test_a_loss_that_rises_too_much_stops_the_chain(finished, tmp_path):
    folder = copied(finished, tmp_path)
    words = ("chain.stages.tune.set.optim.lr=1.0", "chain.stop_if.loss_rise_percent=1")
    with pytest.raises(ChainError, match=r"^chain\.stop_if\.loss_rise_percent=1\.0 is exceeded by tune, whose loss"):
        run(folder, *words)
    table = (folder / "outputs" / "chains" / NAME / "chain.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["stage", "pre", "tune"]


def test_the_plan_has_every_stage_and_runs_none(tmp_path):
    out = run(tmp_path, "do=plan")
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
        ["pre", "train"],
        ["tune", "train"],
        ["test", "eval"],
    ]
    assert "all stages: " in out and not (tmp_path / "outputs").exists()


@pytest.mark.long
def test_a_stage_of_several_ranks(tmp_path):
    """Stages of one process and of two ranks in one chain; the yardstick reads the checkpoints of both."""
    words = ("+chain.stages.tune.set.parallel.dp=2", "chain.only=[pre,tune]", "+chain.stages.tune.set.device=cpu")
    done = forks.run(tmp_path, *STAGES, *words)
    assert done.returncode == 0, done.stderr
    assert any(checkpoint(tmp_path, "tune").glob("shard-*")) and not any(checkpoint(tmp_path, "pre").glob("shard-*"))
    assert "2 stages run, 0 reused" in done.stdout


def wait_for(folder: Path, stage: str, step: int) -> None:
    """Wait until a stage of a chain that runs in a folder has logged a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
            record = file_of(folder).stages[stage]
            if record.state == "running" and runs.last_step(folder / "outputs" / record.run_dir) >= step:
                return
        time.sleep(0.002)
    raise AssertionError(f"step {step} of {stage} was not reached")


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "step", "signum"), [("pre", 5, signal.SIGKILL), ("tune", 6, signal.SIGKILL), ("tune", 3, signal.SIGTERM)]
)
def test_what_was_stopped_continues_bit_for_bit(finished, tmp_path, stage, step, signum):
    process = forks.start(tmp_path, *STAGES)
    wait_for(tmp_path, stage, step)
    process.send_signal(signum)
    out, err = process.communicate(60)
    if signum == signal.SIGTERM:
        assert process.wait() == 128 + signum, err
        assert file_of(tmp_path).stages[stage].state == "stopped"
        assert "Continue the chain with: " in out
    assert "test" not in file_of(tmp_path).stages
    again = forks.run(tmp_path, *STAGES)
    assert again.returncode == 0, again.stderr
    assert f"continuing {stage} from" in again.stdout
    assert digests(tmp_path) == digests(finished[0])
    assert len(runs.run_dirs(tmp_path)) == 3


@pytest.mark.long
def test_mlflow_has_the_chain_as_parent_of_its_stages(tmp_path):
    from mlflow import MlflowClient

    words = [w for w in STAGES if w != "tracking=none"] + ["tracking.system_metrics=false", "tracking.run_name=mine"]
    for _ in range(2):
        done = runs.run(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("deepseek_exp").experiment_id])
    (parent,) = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    assert (parent.info.run_name, parent.info.status, parent.data.tags["do"]) == ("mine", "FINISHED", "chain")
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} == {"chain.md", "chain.csv", "chain.json"}
    history = client.get_metric_history(parent.info.run_id, "yardstick/loss")
    assert {m.step for m in history} == {0, 1}
    children = {r.info.run_id: r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    reused = [r for r in children.values() if "reused_from" in r.data.tags]
    assert len(children) == 6 and len(reused) == 3
    for r in reused:
        original = children[r.data.tags["reused_from"]]
        assert original.data.tags["chain.key"] == r.data.tags["chain.key"]
    (tune,) = [r for r in children.values() if r.data.tags["chain.stage"] == "tune" and r not in reused]
    start = checkpoint(tmp_path, "pre", "mine")
    pre = manifest.read_manifest(start).run_id
    assert tune.data.tags["chain.start"] == f"{pre} sha256:{manifest.digest(start)}"
    model = client.get_registered_model("chain-mine")
    assert set(model.aliases) == {"pre", "tune"}
    version = client.get_model_version("chain-mine", model.aliases["tune"])
    assert version.run_id == tune.info.run_id and version.source.endswith("step-00000012")
