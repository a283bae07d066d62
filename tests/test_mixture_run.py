"""run.py on a mixture: what is recorded, a resume in its middle, a text that changed."""

from __future__ import annotations

import shutil

import pytest
import torch

from deepseek_exp.tracking.journal import read_all
from deepseek_exp.tracking.rundir import JOURNAL, Spec
from tests import forks, runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the texts of two parts and one finished run on them."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, line in (("sums", "{0} + {0} = {1}"), ("words", "the {0}th word")):
        (folder / f"{name}.txt").write_text("".join(line.format(i, 2 * i) + "\n" for i in range(3000)))
    parts = ["+data.mixture.sums.path=sums.txt", "+data.mixture.sums.weight=3", "+data.mixture.words.path=words.txt"]
    own = [o for o in runs.QUICK if o != "data=synthetic"]
    done = forks.run(folder, *own, "data=mixture", *parts)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_says_and_records_each_part(finished):
    folder, done = finished
    (run_dir,) = runs.run_dirs(folder)
    assert "run       v1_dense tiny mixture max_steps=12 global_batch_seqs=8 warmup_steps=3, run " in done.stdout
    assert "data      mixture of sums 75.0%, words 25.0%, " in done.stdout
    traces = {name: runs.trace(run_dir, f"val/loss{name}") for name in ("", "/sums", "/words")}
    assert all(list(trace) == [6, 12] for trace in traces.values())
    whole, *losses = (trace[12] for trace in traces.values())
    assert f"\n            loss by part: sums {losses[0]:.3f}, words {losses[1]:.3f}\n" in done.stdout
    assert whole == pytest.approx(sum(losses) / 2, rel=1e-6)  # one batch each
    assert Spec.load(run_dir).params["data.mixture.sums.weight"] == "3"
    inputs = [event for event in read_all(run_dir / JOURNAL) if event["kind"] == "dataset"]
    assert {(i["name"], i["context"]) for i in inputs} == {
        (n, c) for n in ("sums", "words") for c in ("train", "valid")
    }
    assert len({i["digest"] for i in inputs}) == 4


def test_a_resume_in_the_middle_changes_nothing(finished, copy_of_finished):
    (whole,) = runs.run_dirs(finished[0])
    (run_dir,) = runs.run_dirs(copy_of_finished)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    done = forks.run(copy_of_finished, "resume=last")
    assert done.returncode == 0 and "step-00000008\n" in done.stdout, done.stderr
    before, after = runs.weights(whole, 12), runs.weights(run_dir, 12)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    for name in ("train/loss", "val/loss", "val/loss/sums", "val/loss/words"):
        assert runs.trace(run_dir, name) == runs.trace(whole, name)


def test_eval_gives_the_loss_of_each_part(copy_of_finished):
    done = forks.run(copy_of_finished, "do=eval", "resume=last")
    assert done.returncode == 0, done.stderr
    trained, measured = runs.run_dirs(copy_of_finished)
    for name in ("val/loss", "val/loss/sums", "val/loss/words"):
        assert list(runs.trace(measured, name).values()) == [runs.trace(trained, name)[12]]


def test_going_on_with_the_changed_text_of_one_part_is_refused(copy_of_finished):
    words = copy_of_finished / "words.txt"
    words.write_text("new\n" + words.read_text())
    done = forks.run(copy_of_finished, "resume=last", "trainer.max_steps=20")
    assert done.returncode == 1
    assert "(changed: train of words)" in done.stderr
    assert "sums" not in done.stderr.split("Fix:")[0].splitlines()[-1]
