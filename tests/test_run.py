"""run.py as a person uses it: real processes, a real MLflow store, real signals."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import mlflow
import pytest
import torch
import yaml

from deepseek_exp.config import compose
from deepseek_exp.tracking.rundir import Progress, Spec
from tests import forks, runs
from tests.bench import kill


def store(folder) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")


def all_runs(folder) -> list:
    client = store(folder)
    return client.search_runs([client.get_experiment_by_name("deepseek_exp").experiment_id])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with one finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    done = runs.run(folder, *runs.TRACKED)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder with a sweep, two of whose four jobs fail, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    done = forks.run(
        folder,
        "-m",
        *runs.TRACKED,
        "trainer.max_steps=6",
        "optim.clip_norm=0",
        "optim.lr=1e30,1e-3",
        "model.n_heads=2,4",
    )
    return folder, done


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    """The same, to be changed; the run is cut off from its MLflow store's absolute paths by copying all of it."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


class TestTrain:
    def test_says_what_it_will_do_and_what_came_out(self, finished):
        folder, done = finished
        run_id = all_runs(folder)[0].info.run_id
        for words in (
            "run       v1_dense tiny synthetic max_steps=12 global_batch_seqs=8 warmup_steps=3, MLflow run ",
            f", MLflow run {run_id[:12]} in sqlite:///outputs/mlflow.db",
            "model     v1_dense, 125,256 parameters: 2 layers, d_model 64, window 16 + 4 global tokens",
            "training  12 steps x 8 sequences x 64 tokens = 6,144 tokens",
            "device    cpu, 1 threads" if not torch.cuda.is_available() else "device    cuda",
            "expected  ",
            "bits per byte (unigram model: ",
            "tokens/s (mean over all steps, excluding validation)",
            f"do=sample resume={run_id[:12]}",
            f"resume={run_id[:12]} trainer.max_steps=24",
            "-m mlflow ui --workers 1 --backend-store-uri sqlite:///outputs/mlflow.db",
            "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning",
            " -m ",
        ):
            assert words in done.stdout
        assert re.search(r"checkpoint +outputs/runs/\S+/checkpoints/step-00000012\n", done.stdout)
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr

    def test_keeps_the_newest_checkpoints_and_the_best(self, finished):
        (run_dir,) = runs.run_dirs(finished[0])
        assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]

    def test_leaves_nothing_outside_of_its_outputs(self, finished):
        assert [p.name for p in finished[0].iterdir()] == ["outputs"]


class TestTracking:
    def test_every_leaf_is_a_parameter(self, finished):
        run = all_runs(finished[0])[0]
        assert set(compose.schema_keys()) <= {".".join(k.split(".")[:2]) for k in run.data.params} | set(
            run.data.params
        )
        assert (
            run.data.params["model.d_model"] == "64"
            and run.data.params["optim.optimizer._target_"] == "torch.optim.AdamW"
        )

    def test_metrics_and_their_steps(self, finished):
        run, client = all_runs(finished[0])[0], store(finished[0])
        steps = {name: [m.step for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
        every = list(range(1, 13))
        for name in ("train/loss", "train/bits_per_byte", "optim/lr", "optim/grad_norm", "perf/tokens_per_second"):
            assert steps[name] == every, name
        assert steps["val/loss"] == steps["val/bits_per_byte"] == steps["attn/gate"] == [6, 12]
        assert steps["val/unigram_bits_per_byte"] == [6, 12]
        assert run.data.metrics["val/bits_per_byte"] < run.data.metrics["val/unigram_bits_per_byte"] * 1.3

    def test_artifacts_tags_and_inputs(self, finished, tmp_path):
        folder, _ = finished
        run, client = all_runs(folder)[0], store(folder)
        names = {f.path for f in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "packages.txt", "hardware.json", "sample.txt"} <= names
        path = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
        assert yaml.safe_load(Path(path).read_text())["model"]["d_model"] == 64
        assert run.info.status == "FINISHED" and run.data.tags["overrides"].startswith("size=tiny")
        assert {i.tags[0].value for i in run.inputs.dataset_inputs} == {"train", "valid"}
        assert all(i.dataset.digest for i in run.inputs.dataset_inputs)

    def test_the_learning_rate_is_the_one_used(self, finished):
        (run_dir,) = runs.run_dirs(finished[0])
        lr = runs.trace(run_dir, "optim/lr")
        assert lr[1] == pytest.approx(1e-3) and lr[3] == lr[4] == pytest.approx(3e-3) and lr[12] < lr[5]

    def test_the_position_counts_sequences(self, finished):
        (run_dir,) = runs.run_dirs(finished[0])
        assert runs.trace(run_dir, "data/position")[12] == 12 * 8
        assert runs.trace(run_dir, "data/tokens")[12] == 12 * 8 * 64

    def test_the_size_of_the_model_and_the_cost_of_a_token_are_recorded(self, finished):
        (run,) = all_runs(finished[0])
        assert (run.data.params["n_params"], run.data.params["n_active_params"]) == ("125256", "125256")
        assert set(runs.trace(runs.run_dirs(finished[0])[0], "perf/flops_per_token")) == {0}


class TestUseOfACheckpoint:
    def test_sample(self, finished):
        folder, _ = finished
        args = ("do=sample", "resume=last", "sample.max_new_tokens=20", "'sample.prompt=7 + '".strip("'"))
        first, second = (forks.run(folder, *args) for _ in range(2))
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith("7 + ") and first.stdout == second.stdout
        other = forks.run(folder, *args, "seed=9")
        assert other.returncode == 0 and other.stdout != first.stdout

    def test_sample_longer_than_the_model(self, finished):
        done = forks.run(finished[0], "do=sample", "sample.max_new_tokens=64", "sample.prompt=a")
        assert done.returncode == 2
        assert done.stderr == (
            "sample.max_new_tokens=64 and a prompt of 1 tokens are more than model.max_seq_len=64. "
            "Fix: use 63 or less, or a shorter prompt.\n"
        )

    def test_eval_gives_the_training_runs_loss(self, copy_of_finished):
        done = forks.run(copy_of_finished, "do=eval", "resume=last", "tracking=none")
        assert done.returncode == 0, done.stderr
        trained = runs.trace(runs.run_dirs(copy_of_finished)[0], "val/loss")[12]
        measured = runs.trace(runs.run_dirs(copy_of_finished)[-1], "val/loss")
        assert list(measured.values()) == [trained]
        assert f"loss {trained:.3f} nats per token" in done.stdout

    def test_another_model_is_refused(self, finished):
        done = forks.run(finished[0], "resume=last", "model.n_layers=3")
        assert done.returncode == 2
        assert done.stderr == (
            "model.n_layers=3 differs from the checkpoint's 2. "
            "Fix: leave model.n_layers out, or start a new run with resume=null.\n"
        )

    def test_nothing_left_to_train(self, finished):
        done = forks.run(finished[0], "resume=last")
        assert done.returncode == 2
        assert re.fullmatch(
            r"trainer.max_steps=12 is reached: outputs/runs/\S+/step-00000012 is at step 12. "
            r"Fix: set trainer.max_steps=24 to continue.\n",
            done.stderr,
        )

    def test_sampling_needs_no_training_text(self, copy_of_finished):
        shutil.rmtree(copy_of_finished / "outputs" / "cache")
        done = forks.run(copy_of_finished, "do=sample", "sample.max_new_tokens=3")
        assert done.returncode == 0 and not (copy_of_finished / "outputs" / "cache").exists()

    def test_text_that_changed_since_is_refused(self, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text("".join(f"line {i} has {i * i} in it\n" for i in range(4000)))
        own = [o for o in runs.QUICK if o != "data=synthetic"]
        done = forks.run(tmp_path, *own, "data=text", f"data.path={text}", "trainer.max_steps=4")
        assert done.returncode == 0, done.stderr
        text.write_text("".join(f"line {i} has {i * i} in it\n" for i in range(4001)))
        done = forks.run(tmp_path, "resume=last", "trainer.max_steps=8")
        assert done.returncode == 1
        said = done.stderr.strip().splitlines()[-1]
        assert re.search(
            r"\(changed: .*\). Fix: restore the text \(for stdlib: use the same Python\), "
            r"or train on this text in a new run from its weights with init_from=outputs/runs/\S+/step-00000004.$",
            said,
        )
        (old,) = runs.run_dirs(tmp_path)
        assert runs.ending(old) == "FINISHED"  # the refused resume is recorded nowhere
        further = [o for o in own if o != "size=tiny"]
        done = forks.run(tmp_path, *further, "init_from=last", "data=text", f"data.path={text}", "trainer.max_steps=4")
        assert done.returncode == 0, done.stderr
        old, new = runs.run_dirs(tmp_path)
        assert runs.trace(new, "train/loss")[1] < runs.trace(old, "train/loss")[1] - 0.5
        tags = Spec.load(new).tags
        assert (tags["init_from.run_id"], tags["init_from.step"]) == (Progress.load(old).run_id, "4")

    def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(self, copy_of_finished):
        (run_dir,) = runs.run_dirs(copy_of_finished)
        damaged = run_dir / "checkpoints" / "step-00000012" / "state.safetensors"
        os.truncate(damaged, 1000)
        done = forks.run(copy_of_finished, "do=sample", "sample.max_new_tokens=4")
        assert done.returncode == 0, done.stderr
        assert "step-00000012 is damaged (state.safetensors is truncated: 1000 of" in done.stdout
        exact = forks.run(copy_of_finished, "do=sample", f"resume={damaged.parent}")
        assert exact.returncode == 1 and "is damaged" in exact.stderr

    def test_a_changed_resume_is_a_new_run_with_the_whole_curve(self, tmp_path):
        """Parameters in MLflow never change, so the run that had others stays as it was."""
        done = forks.run(tmp_path, *runs.TRACKED, "trainer.max_steps=4")
        assert done.returncode == 0, done.stderr
        (before,) = all_runs(tmp_path)
        words = ("trainer.max_steps=6", "optim.lr=1e-5", "optim.min_lr_ratio=1")
        done = forks.run(tmp_path, f"resume={before.info.run_id}", *words)
        assert done.returncode == 0, done.stderr
        old, new = runs.run_dirs(tmp_path)
        assert runs.trace(new, "optim/lr")[5] == 1e-5 and max(runs.trace(old, "train/loss")) == 4
        after, same = all_runs(tmp_path)
        assert same.data.params == before.data.params and same.data.metrics == before.data.metrics
        differing = {k for k, v in after.data.params.items() if before.data.params.get(k) != v}
        assert differing == {"trainer.max_steps", "optim.lr", "optim.min_lr_ratio", "resume"}
        assert after.data.tags["continues.run_id"] == before.info.run_id and after.data.tags["continues.step"] == "4"
        history = store(tmp_path).get_metric_history(after.info.run_id, "train/loss")
        assert [m.step for m in history] == [1, 2, 3, 4, 5, 6] and after.info.status == "FINISHED"
        assert {p.name for p in (old / "checkpoints").iterdir()} == {"step-00000004"}


class TestKill:
    def test_resume_is_bit_exact(self, tmp_path):
        """One of the kills that tests/bench/kill.py does twenty of, between two checkpoints."""
        reference = kill.unbroken(tmp_path / "reference", by=forks)
        assert kill.differences(tmp_path / "killed", reference, 18, by=forks) == []

    def test_sigterm_saves_and_a_memory_goes_on(self, tmp_path):
        """With segment memory and two micro batches a step, stopped where no checkpoint was due."""
        memory = ("model.memory_len=15", "data.order=contiguous", "trainer.checkpoint_every_steps=100")
        overrides = (*runs.QUICK, "trainer.max_steps=40", *memory)
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        assert forks.run(tmp_path / "a", *overrides).returncode == 0
        process = forks.start(tmp_path / "b", *overrides)
        runs.signal_at_step(process, tmp_path / "b", 20, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, err
        stopped = re.search(
            r"stopped by SIGTERM after step (\d+); the checkpoint is saved. Continue with: .* resume=\w+", out
        )
        assert stopped and 20 <= int(stopped[1]) < 40
        assert runs.ending(runs.run_dirs(tmp_path / "b")[0]) == "KILLED"
        done = forks.run(tmp_path / "b", "resume=last")
        assert done.returncode == 0, done.stderr
        (a,), (b,) = runs.run_dirs(tmp_path / "a"), runs.run_dirs(tmp_path / "b")
        for name in kill.TRACES:
            assert runs.trace(a, name) == runs.trace(b, name), name
        ours, theirs = runs.weights(b, 40), runs.weights(a, 40)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestFailure:
    def test_a_loss_that_is_not_finite_ends_the_run(self, tmp_path):
        done = forks.run(tmp_path, *runs.QUICK, "optim.lr=1e30", "optim.clip_norm=0")
        assert done.returncode == 1
        want = (
            r"(train/loss|optim/grad_norm)=(nan|inf) is not finite at step \d+ \(optim.lr=1e\+30\). "
            r"Fix: lower optim.lr or lengthen optim.warmup_steps, "
            r"or skip such steps with trainer.on_nonfinite=skip."
        )
        assert re.fullmatch(want, done.stderr.strip().splitlines()[-1])
        (run_dir,) = runs.run_dirs(tmp_path)
        assert runs.ending(run_dir) == "FAILED"

    def test_unreachable_server(self, tmp_path):
        done = forks.run(tmp_path, *runs.TRACKED, "tracking.uri=http://127.0.0.1:9")
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("tracking.uri='http://127.0.0.1:9' does not answer")
        assert "have not reached" not in done.stdout  # there was nothing to send


class TestSweep:
    def test_a_failed_job_takes_no_other_down_and_the_exit_code_says_so(self, swept):
        _, done = swept
        assert done.returncode == 1
        assert "\n2 of 4 jobs failed; MLflow run " in done.stdout
        assert re.search(r"\nnext:\n  .* resume=[0-9a-f]{12} do=sample ", done.stdout)
        table = [
            line for line in done.stdout.splitlines() if "lr=" in line and ("FINISHED" in line or "FAILED" in line)
        ]
        assert [("FINISHED" in line, line.startswith("*")) for line in table] == [
            (True, True),
            (True, False),
            (False, False),
            (False, False),
        ]

    def test_jobs_are_children_of_one_run(self, swept):
        folder, _ = swept
        found = all_runs(folder)
        (parent,) = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
        children = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert len(children) == 4 and parent.info.status == "FAILED"
        assert {(r.data.params["optim.lr"], r.data.params["model.n_heads"]) for r in children} == {
            ("1e+30", "2"),
            ("1e+30", "4"),
            ("0.001", "2"),
            ("0.001", "4"),
        }
        assert {f.path for f in store(folder).list_artifacts(parent.info.run_id)} == {"summary.csv", "summary.md"}

    def test_a_jobs_checkpoint_is_found_by_its_run_id(self, swept):
        folder, _ = swept
        run = next(r for r in all_runs(folder) if r.data.params.get("optim.lr") == "0.001")
        done = forks.run(folder, "do=sample", f"resume={run.info.run_id}", "sample.max_new_tokens=3")
        assert done.returncode == 0, done.stderr


def test_gradient_checkpointing_and_precision_and_callbacks(tmp_path):
    """The keys of the training loop that no other test here turns on, in one run."""
    done = forks.run(
        tmp_path,
        *runs.QUICK,
        "trainer.precision=bf16",
        "trainer.activation_checkpointing=full",
        "optim=adafactor",
        "trainer.max_steps=60",
        "+trainer.callbacks.stop={_target_:pytorch_lightning.callbacks.EarlyStopping,monitor:val/loss,patience:1,"
        "min_delta:100.0}",
    )
    assert done.returncode == 0, done.stderr
    (run_dir,) = runs.run_dirs(tmp_path)
    loss = runs.trace(run_dir, "train/loss")
    assert max(loss) == 12  # the second validation was not 100 nats better
    assert "stopped     after step 12 of 60 by a callback (trainer.callbacks: stop)" in done.stdout
    assert loss[12] < loss[1]
    assert {t.dtype for t in runs.weights(run_dir, 12).values()} == {torch.bfloat16}


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_follows_the_eager_one(finished, tmp_path):
    done = forks.run(tmp_path, *runs.QUICK, "trainer.compile=true", "trainer.max_steps=12")
    assert done.returncode == 0, done.stderr
    eager, compiled = (runs.trace(runs.run_dirs(f)[0], "train/loss") for f in (finished[0], tmp_path))
    assert compiled == pytest.approx(eager, rel=1e-3)
