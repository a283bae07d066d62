"""What a command line makes of a checkpoint: which values hold, which run records it, and what is not obeyed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from deepseek_exp.checkpoint import manifest, saved_config
from deepseek_exp.errors import CheckpointError, ConfigError
from deepseek_exp.experiment.job import COMMAND_FILE, Job, make_job
from deepseek_exp.tracking.rundir import Spec
from tests.composing import shared_hydra, tree

QUICK = ("size=tiny", "data=synthetic", "optim.warmup_steps=0")


def job(*overrides: str) -> Job:
    """Make the job of a command line, as run.py does."""
    composed = tree(*overrides)
    with shared_hydra():
        return make_job(composed, overrides, "tiny", None)


def checkpoint(
    folder: Path,
    *overrides: str,
    run: str = "a",
    step: int = 2,
    edit=lambda text: text,
    history=("size=tiny", "data=synthetic"),
    start: Path | None = None,
) -> Path:
    """Write the checkpoint of a run that a command line would train, from a start if any, without its tensors."""
    text = saved_config.dump(tree(*QUICK, *overrides, f"output_dir={folder}"))
    target = folder / "runs" / run / "checkpoints" / manifest.checkpoint_name(step)
    part = target.with_name(".part")
    part.mkdir(parents=True)
    (part / saved_config.FILE).write_text(edit(text), encoding="utf-8")
    (part / COMMAND_FILE).write_text(json.dumps({"overrides": list(history), "size": "tiny"}), encoding="utf-8")
    (part / "tokenizer.json").write_text("{}", encoding="utf-8")
    for name in ("model.safetensors", "state.safetensors", "state.json", "data.json"):
        (part / name).write_bytes(b"")
    lineage = manifest.Lineage({} if start is None else {"start": manifest.digest(start)})
    manifest.seal(part, target, step=step, run_id=run * 32, val_loss=None, digests={}, lineage=lineage)
    return target


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("some text\n" * 100, encoding="utf-8")
    return path


class TestWhatAVerbNeeds:
    """A checkpoint is used without what its training needed."""

    @pytest.mark.parametrize("do", ["sample", "export"])
    def test_neither_data_nor_kernels_nor_layout(self, tmp_path, text, do, monkeypatch):
        out, where = tmp_path / "out", f"output_dir={tmp_path / 'out'}"
        trained = ("kernels.swiglu=triton", "device=cuda", "parallel.pp=2", "parallel.zero_stage=1", "seed=7")
        checkpoint(out, "data=text", f"data.path={text}", *trained, "model.window=8")
        text.unlink()
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        cfg = job(f"do={do}", where).cfg
        assert (cfg.device, cfg.kernels.swiglu, cfg.parallel.pp) == ("auto", "torch", 1)
        assert (cfg.seed, cfg.model.window) == (7, 8)

    @pytest.mark.parametrize("do", ["train", "eval"])
    def test_what_is_named_replaces_what_cannot_run_here(self, tmp_path, do, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        checkpoint(tmp_path, "kernels.swiglu=triton")
        words = (f"do={do}", "resume=last", f"output_dir={tmp_path}", "trainer.max_steps=9")
        with pytest.raises(ConfigError, match=r"kernels.swiglu='triton' needs a CUDA device"):
            job(*words)
        assert job(*words, "kernels=torch").cfg.kernels.swiglu == "torch"

    def test_text_may_have_moved(self, tmp_path, text):
        checkpoint(tmp_path, "data=text", f"data.path={text}")
        moved = text.rename(tmp_path / "moved.txt")
        words = ("resume=last", f"output_dir={tmp_path}")
        with pytest.raises(ConfigError, match=r"data.path='.*text.txt' does not exist"):
            job(*words)
        found = job(*words, f"data.path={moved}")
        assert found.cfg.data.path == str(moved) and found.continues is None  # digests say whether it is the same

    def test_a_tokenizer_that_is_gone_is_the_checkpoints_own(self, tmp_path, text):
        given = text.with_name("tokenizer.json")
        given.write_text("{}", encoding="utf-8")
        saved = checkpoint(tmp_path, "data=text", f"data.path={text}", f"data.tokenizer={given}")
        words = ("resume=last", f"output_dir={tmp_path}")
        assert job(*words).cfg.data.tokenizer == str(given)
        given.unlink()
        assert job(*words).cfg.data.tokenizer == str(saved / "tokenizer.json")

    def test_a_tokenizer_in_a_home_that_is_not_here_is_gone(self, tmp_path, text):
        saved = checkpoint(tmp_path, "data=text", f"data.path={text}", "data.tokenizer='~not-here/tokenizer.json'")
        assert job("resume=last", f"output_dir={tmp_path}").cfg.data.tokenizer == str(saved / "tokenizer.json")

    def test_eval_of_other_text_takes_the_checkpoints_tokenizer(self, tmp_path, text):
        saved = checkpoint(tmp_path)
        found = job("do=eval", "resume=last", f"output_dir={tmp_path}", "data=text", f"data.path={text}")
        assert found.cfg.data.tokenizer == str(saved / "tokenizer.json")
        assert job("do=eval", f"output_dir={tmp_path}").cfg.data.tokenizer is None


class TestSavedValues:
    """A leaf that nobody named keeps its saved value."""

    def test_a_leaf_that_follows_another_stays(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        checkpoint(Path("out"), "tracking.uri=sqlite:///custom.db", "data.cache_dir=mycache")
        for do in ("train", "eval"):
            cfg = job(f"do={do}", "resume=last", "output_dir=out").cfg
            assert (cfg.tracking.uri, cfg.data.cache_dir) == ("sqlite:///custom.db", "mycache")

    def test_a_moved_output_dir_takes_its_store_along(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        checkpoint(Path("out"))
        Path("out").rename("moved")
        cfg = job("resume=last", "output_dir=moved").cfg
        assert (cfg.tracking.uri, cfg.data.cache_dir) == ("sqlite:///moved/mlflow.db", "moved/cache")

    def test_a_store_of_another_working_directory_is_found(self, tmp_path, monkeypatch):
        here, there = tmp_path / "here", tmp_path / "there"
        for folder in (here, there):
            folder.mkdir()
        monkeypatch.chdir(here)
        saved = checkpoint(Path("out"), "tracking.uri=sqlite:///custom.db")
        recorded = dataclasses.replace(job(*QUICK).cfg.tracking, uri=f"sqlite:///{here}/custom.db")
        Spec(recorded, "a", {}, "", {}, "", "", "", "a" * 32, 0).save(manifest.run_dir_of(saved))
        Path("custom.db").touch()
        assert job("resume=last", "output_dir=out").cfg.tracking.uri == "sqlite:///custom.db"
        monkeypatch.chdir(there)
        where = f"output_dir={here / 'out'}"
        assert job("resume=last", where).cfg.tracking.uri == recorded.uri
        (here / "custom.db").unlink()  # a store that is lost is that of the command's directory
        assert job("resume=last", where).cfg.tracking.uri == "sqlite:///custom.db"

    def test_what_is_asked_for_refers_to_saved_values(self, tmp_path):
        checkpoint(tmp_path, "trainer.global_batch_seqs=512")
        assert job("resume=last", f"output_dir={tmp_path}", "optim=adamw_scaled").cfg.optim.lr == pytest.approx(1e-3)

    def test_an_entry_of_a_mapping_joins_the_saved_ones(self, tmp_path):
        stop = "{_target_:pytorch_lightning.callbacks.EarlyStopping,monitor:val/loss}"
        checkpoint(tmp_path, f"+trainer.callbacks.stop={stop}", "+tracking.tags.a=1")
        words = ("+trainer.callbacks.lr._target_=pytorch_lightning.callbacks.LearningRateMonitor", "+tracking.tags.b=2")
        cfg = job("resume=last", f"output_dir={tmp_path}", *words).cfg
        assert list(cfg.trainer.callbacks) == ["stop", "lr"] and cfg.tracking.tags == {"a": "1", "b": "2"}
        assert cfg.trainer.callbacks["stop"]["monitor"] == "val/loss"

    def test_an_entry_of_a_mapping_is_deleted(self, tmp_path):
        checkpoint(tmp_path)
        with pytest.raises(ConfigError, match=r"optim.optimizer=.* differs from the checkpoint's"):
            job("resume=last", f"output_dir={tmp_path}", "~optim.optimizer.fused")

    def test_a_text_that_looks_like_a_reference_is_a_text(self, tmp_path):
        checkpoint(tmp_path, r'sample.prompt="echo \${HOME} "')
        found = job("do=sample", f"output_dir={tmp_path}")
        assert found.cfg.sample.prompt == "echo ${HOME} "
        file = found.save(None)
        assert Job.load(file)[0] == found

    def test_micro_batches_of_earlier_versions_are_sequences_now(self):
        saved = saved_config.parse("trainer: {eval_batches: 32, micro_batch_seqs: 4}")
        assert saved == {"trainer": {"micro_batch_seqs": 4, "eval_seqs": 128}}

    def test_own_callbacks_of_earlier_versions_are_found_where_they_are_now(self):
        others = {"_target_": "pytorch_lightning.callbacks.Timer"}
        saved = saved_config.parse(
            "trainer: {callbacks: {a: {_target_: deepseek_exp.callbacks.Mine, n: 1}, "
            "b: {_target_: pytorch_lightning.callbacks.Timer}, c: null}}"
        )
        moved = {"_target_": "deepseek_exp.train.callbacks.Mine", "n": 1}
        assert saved == {"trainer": {"callbacks": {"a": moved, "b": others, "c": None}}}


class TestWhichRunRecordsIt:
    def test_an_unchanged_resume_is_the_same_run(self, tmp_path):
        saved = checkpoint(tmp_path)
        found = job("resume=last", f"output_dir={tmp_path}")
        assert found.run_dir == manifest.run_dir_of(saved) and found.continues is None

    @pytest.mark.parametrize(("began", "now"), [("mlflow", "none"), ("none", "mlflow")])
    def test_a_run_has_one_kind_of_record(self, tmp_path, began, now):
        checkpoint(tmp_path, f"tracking={began}")
        words = "resume=last", f"output_dir={tmp_path}", f"tracking={now}"
        with pytest.raises(ConfigError) as caught:
            job(*words)
        assert str(caught.value) == (
            f"tracking.backend='{now}' cannot record the rest of a run that began with tracking.backend={began}. "
            f"Fix: set tracking.backend={began}, or tracking.new_run=true to record it as a new run."
        )
        assert job(*words, "tracking.new_run=true").continues is not None

    def test_what_is_no_parameter_of_the_training_may_change(self, tmp_path):
        saved = checkpoint(tmp_path)
        found = job("resume=last", f"output_dir={tmp_path}", "data.n_workers=1", "sample.top_p=0.5", "cluster=h100_8")
        assert found.run_dir == manifest.run_dir_of(saved)

    @pytest.mark.parametrize("word", ["trainer.max_steps=900", "optim.lr=1", "parallel=ddp", "tracking.new_run=true"])
    def test_a_changed_one_is_a_new_run_that_continues_it(self, tmp_path, word):
        saved = checkpoint(tmp_path)
        few = ("cluster.gpus_per_node=2", "trainer.micro_batch_seqs=4")
        found = job("resume=last", f"output_dir={tmp_path}", "device=cpu", *few, word)
        assert found.run_dir.parent == tmp_path / "runs" and found.run_dir != manifest.run_dir_of(saved)
        assert (found.continues.run_id, found.continues.step) == ("a" * 32, 2)
        assert found.continues.run_dir == manifest.run_dir_of(saved)

    def test_a_layout_that_is_chosen_again_is_no_change(self, tmp_path):
        saved = checkpoint(
            tmp_path, "parallel.dp=2", "parallel.zero_stage=1", "device=cpu", "trainer.micro_batch_seqs=1"
        )
        words = ("resume=last", f"output_dir={tmp_path}", "parallel=auto", "cluster.gpus_per_node=2")
        found = job(*words)
        assert (found.cfg.parallel.dp, found.cfg.parallel.zero_stage) == (2, 1)
        assert found.run_dir == manifest.run_dir_of(saved) and found.continues is None
        assert job(*words[:3], "cluster.gpus_per_node=4").continues is not None

    def test_a_chosen_micro_batch_does_not_cut_memories(self, tmp_path):
        lanes = ("model.window=8", "model.memory_len=4", "data.order=contiguous", "trainer.micro_batch_seqs=8")
        checkpoint(tmp_path, *lanes, "device=cpu")
        words = ("resume=last", f"output_dir={tmp_path}")
        assert job(*words).continues is None
        with pytest.raises(ConfigError, match=r"trainer.micro_batch_seqs=1 differs from the checkpoint's 8"):
            job(*words, "parallel=auto", "cluster.gpus_per_node=1", "cluster.memory_bytes=1e7")

    def test_the_next_resume_is_of_the_new_run(self, tmp_path):
        checkpoint(tmp_path)
        later = checkpoint(tmp_path, "trainer.max_steps=900", run="b", step=4)
        found = job("resume=last", f"output_dir={tmp_path}", "trainer.max_steps=900")
        assert found.run_dir == manifest.run_dir_of(later) and found.continues is None

    def test_a_new_run_is_asked_for_once(self, tmp_path):
        saved = checkpoint(tmp_path, "tracking.new_run=true")
        found = job("resume=last", f"output_dir={tmp_path}")
        assert found.run_dir == manifest.run_dir_of(saved) and found.continues is None

    def test_the_history_names_what_made_it(self, tmp_path):
        checkpoint(tmp_path)
        found = job("resume=last", f"output_dir={tmp_path}", "optim.lr=1", "size=tiny")
        assert found.history == ("size=tiny", "data=synthetic", f"output_dir={tmp_path}", "optim.lr=1")
        assert found.name == "v1_dense tiny synthetic lr=1"

    def test_an_evaluation_has_the_name_that_it_is_given(self, tmp_path):
        checkpoint(tmp_path, "tracking.run_name=training", "tracking.parent_run_id=p")
        words = ("do=eval", f"output_dir={tmp_path}")
        tracking = job(*words).cfg.tracking
        assert (tracking.run_name, tracking.parent_run_id) == (None, None)
        found = job(*words, "tracking.run_name=mine", "tracking.parent_run_id=q")
        assert (found.name, found.cfg.tracking.parent_run_id) == ("mine", "q")

    def test_no_secret_in_a_name(self, tmp_path):
        found = job(*QUICK, f"output_dir={tmp_path}", "tracking.run_name='password=hunter2'")
        assert "hunter2" not in found.name + str(found.run_dir)

    def test_the_job_of_an_earlier_version_is_closed_to_others(self, tmp_path):
        found = job(*QUICK, f"output_dir={tmp_path}")
        file = found.save(None)
        file.chmod(0o644)
        assert found.save(None).stat().st_mode & 0o777 == 0o600


class TestForeign:
    """A checkpoint that lies elsewhere says what the model is, and not what this machine does."""

    def test_its_places_are_not_obeyed(self, tmp_path, monkeypatch):
        def theirs(text: str) -> str:
            return text.replace("sqlite:///", "http://attacker/").replace("launcher: local", "launcher: slurm")

        saved = checkpoint(tmp_path / "theirs", "+tracking.tags.leak=x", edit=theirs)
        cfg = job("do=eval", f"resume={saved}", f"output_dir={tmp_path / 'mine'}").cfg
        assert cfg.tracking.uri == f"sqlite:///{tmp_path / 'mine'}/mlflow.db" and cfg.tracking.tags == {}
        assert (cfg.launch.launcher, cfg.data.cache_dir) == ("local", str(tmp_path / "mine" / "cache"))

    def test_what_is_not_used_of_it_may_be_anything(self, tmp_path):
        checkpoint(tmp_path, edit=lambda text: text.replace("mixture: {}", "mixture: {a: 1}"))
        assert job("do=sample", f"output_dir={tmp_path}").cfg.data.mixture == {}
        with pytest.raises(ConfigError, match=r"data.mixture='a' has parts"):
            job("resume=last", f"output_dir={tmp_path}")

    def test_its_references_are_not_evaluated(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FUZZ_SECRET", "hunter2")
        saved = checkpoint(
            tmp_path, edit=lambda text: text.replace("text_key: text", "text_key: ${oc.env:FUZZ_SECRET}")
        )
        found = job("do=eval", f"resume={saved}", f"output_dir={tmp_path}")
        assert found.cfg.data.text_key == "${oc.env:FUZZ_SECRET}" and "hunter2" not in found.yaml

    def test_aliases_and_tags_are_refused(self):
        for text in ("a: &x [1]\nb: *x", "a: !!python/object/apply:os.system [id]", "[" * 10_000, "- 1"):
            with pytest.raises(ValueError, match=r"."):
                saved_config.parse(text)

    def test_its_training_needs_a_place_to_be_recorded(self, tmp_path):
        saved = checkpoint(tmp_path / "theirs")
        words = (f"resume={saved}", f"output_dir={tmp_path / 'mine'}")
        with pytest.raises(ConfigError, match=r"resume=.* lies outside of output_dir=.*tracking.new_run=true"):
            job(*words)
        found = job(*words, "tracking.new_run=true")
        assert found.run_dir.parent == tmp_path / "mine" / "runs" and found.continues.run_id == "a" * 32
        assert job(*words, "tracking.uri=sqlite:///x.db").run_dir == manifest.run_dir_of(saved)
        swept = (tmp_path / "theirs" / "runs").rename(tmp_path / "theirs" / "sweep")
        swept = swept.rename((tmp_path / "theirs" / "multiruns").mkdir() or tmp_path / "theirs" / "multiruns" / "s")
        with pytest.raises(ConfigError, match=rf"Fix: set output_dir={tmp_path / 'theirs'} if"):
            job(f"resume={swept / 'a'}", words[1])

    def test_its_overrides_are_no_part_of_a_command_to_paste(self, tmp_path):
        theirs = ["size=tiny", "tracking.uri=http://attacker/", "+tracking.tags.a=b", "launch=slurm"]
        theirs += ["launch.submit=true", "data.cache_dir=/x", "hydra.searchpath=[/x]", "--config-dir=/x", "optim.lr=1"]
        saved = checkpoint(tmp_path / "theirs", "optim.lr=1", history=theirs)
        mine = f"output_dir={tmp_path / 'mine'}"
        found = job(f"resume={saved}", mine, "tracking.new_run=true")
        assert found.history == ("size=tiny", "optim.lr=1", mine)
        assert job("resume=last", f"output_dir={tmp_path / 'theirs'}").history[:-1] == tuple(theirs)

    def test_it_may_lie_outside_of_a_run(self, tmp_path, monkeypatch):
        saved = checkpoint(tmp_path / "theirs").rename(tmp_path / "copy")
        words = (f"resume={saved}", f"output_dir={tmp_path / 'mine'}")
        assert job("do=eval", *words).name == f"eval v1_dense {tmp_path.parent.name} copy"
        monkeypatch.setattr(Path, "resolve", lambda path, strict=False: Path("/copy"))  # the root of a container
        assert job("do=eval", *words).name == "eval v1_dense copy"
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=r"Fix: put it back there, or set tracking.new_run=true"):
            job(*words, "tracking.uri=sqlite:///x.db")
        assert job(*words, "tracking.new_run=true").continues.step == 2


class TestWeightsOfARun:
    def test_another_text_in_a_new_run(self, tmp_path, text):
        saved = checkpoint(tmp_path, "model.window=8", "optim.lr=0.5")
        for name in ("last", "aaaa", str(saved), str(saved.parent.parent)):
            found = job(f"init_from={name}", f"output_dir={tmp_path}", "data=text", f"data.path={text}")
            assert found.cfg.model.window == 8 and found.cfg.optim.lr == 3e-3 and found.checkpoint is None
            assert found.cfg.data.tokenizer == str(saved / "tokenizer.json")
            assert (found.started_from.run_id, found.started_from.step) == ("a" * 32, 2)
        assert found.run_dir != manifest.run_dir_of(saved)

    def test_its_model_is_given(self, tmp_path):
        checkpoint(tmp_path)
        with pytest.raises(ConfigError, match=r"model.n_layers=3 cannot be used with init_from="):
            job("init_from=last", f"output_dir={tmp_path}", "model.n_layers=3")

    def test_a_run_that_is_not_there(self, tmp_path):
        with pytest.raises(Exception, match=r"^init_from='last' matches no single run"):
            job("init_from=last", f"output_dir={tmp_path}")
        with pytest.raises(Exception, match=r"^init_from='nowhere'"):
            job("init_from=nowhere", f"output_dir={tmp_path}")
