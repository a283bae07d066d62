"""How the stages of a chain are composed, and what makes two stages the same."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
from omegaconf import OmegaConf

from deepseek_exp import config
from deepseek_exp.config import Do, Reuse, compose
from deepseek_exp.errors import CheckpointError
from deepseek_exp.experiment import command_line
from deepseek_exp.experiment.chain import Stage, set_words
from deepseek_exp.experiment.chain_file import FILE, ChainFile, Record, how, stage_key
from tests.composing import as_in_a_sweep
from tests.experiment.test_job import checkpoint

TWO = ("size=tiny", "data=synthetic", "+chain.stages.a.do=train", "+chain.stages.b.do=train")
RECIPE = """# @package _global_
optim: {lr: 0.02}
chain:
  stages:
    first: {do: train, set: {model: v4_distill, size: tiny, data: synthetic, optim: {lr: 0.01}}}
    second:
      do: train
      set:
        data: text
        data.path: TEXT
        optim: {warmup_steps: 7}
    test:
      do: eval
      set: {data: {source: mixture, mixture: {law: {path: TEXT, weight: 2}}}, trainer: {eval_seqs: 8}}
"""


def stages(*words: str) -> dict[str, Stage]:
    """Compose the stages of a command line; the options of other folders are read by a Hydra for it alone."""
    config.register()
    with nullcontext() if "--config-dir" in words else as_in_a_sweep():
        composed = command_line.check_command_line(list(words))
    return {stage.name: stage for stage in composed.stages}


def key(stage: Stage, inputs=(), **data: str) -> str:
    return stage_key(stage.do, stage.tree, dict(inputs), data)


class TestComposing:
    def test_a_stage_is_the_shared_tree_with_what_it_sets(self, tmp_path):
        mine = tmp_path / "mine"
        (mine / "recipes").mkdir(parents=True)
        text = tmp_path / "law.txt"
        text.write_text("law\n")
        (mine / "recipes" / "two.yaml").write_text(RECIPE.replace("TEXT", str(text)))
        words = ("--config-dir", str(mine), "recipes=two", "seed=5", "optim.weight_decay=0.3")
        found = stages(*words, "chain.stages.first.set.optim.lr=0.5", "+chain.stages.test.set.seed=6")
        first, second, test = found.values()
        assert [(s.name, s.do, s.start) for s in (first, second, test)] == [
            ("first", Do.train, None),
            ("second", Do.train, "first"),
            ("test", Do.eval, "second"),
        ]
        # a group's option; the command line above `set`, `set` above the recipe; what is shared
        assert (first.exp.model.version, first.size, first.exp.optim.lr) == ("v4_distill", "tiny", 0.5)
        assert (second.exp.optim.lr, second.exp.optim.warmup_steps, test.exp.optim.lr) == (0.02, 7, 0.02)
        assert [s.exp.seed for s in found.values()] == [5, 5, 6]
        assert {s.exp.optim.weight_decay for s in found.values()} == {0.3}
        assert (second.exp.data.source, second.exp.data.path, test.exp.data.path) == ("text", str(text), None)
        assert {n: (p.path, p.weight) for n, p in test.exp.data.mixture.items()} == {"law": (str(text), 2)}
        assert test.exp.trainer.eval_seqs == 8
        # the model of the stage that it starts from, and no chain within a stage
        assert second.exp.model == test.exp.model == first.exp.model
        assert all(s.exp.chain.stages == {} for s in found.values())

    def test_each_stage_comes_after_its_start(self):
        words = ("+chain.stages.b={do:train,start:a}", "+chain.stages.c={do:eval,start:b}")
        words += ("+chain.stages.a={do:train,start:scratch}",)
        found = stages("size=tiny", "data=synthetic", *words)
        assert [(s.name, s.start) for s in found.values()] == [("a", None), ("b", "a"), ("c", "b")]

    def test_a_stage_may_start_from_scratch_and_be_taken_out(self):
        found = stages(*TWO, "+chain.stages.b.start=scratch", "+chain.stages.b.set.model.n_layers=1")
        assert (found["b"].start, found["b"].exp.init_from, found["b"].exp.model.n_layers) == (None, None, 1)
        assert list(stages(*TWO, "~chain.stages.a")) == ["b"]

    def test_a_stage_may_start_from_a_run(self, tmp_path):
        saved = checkpoint(tmp_path, "model.d_ff=64")
        found = stages("data=synthetic", f"output_dir={tmp_path}", "+chain.stages.a={do:train,start:aaaa}")
        assert (found["a"].start, found["a"].exp.init_from) == (None, str(saved))
        assert found["a"].exp.model.d_ff == 64
        assert found["a"].exp.data.tokenizer == str(saved / "tokenizer.json")

    def test_a_reference_is_a_stage_before_it_or_a_run(self, tmp_path):
        saved = checkpoint(tmp_path)
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text("")
        sets = f"set:{{data:preference,data.path:{pairs}}}"
        words = ("+chain.stages.x={do:train,start:scratch}", "+chain.stages.a={do:train,start:scratch}")
        few = ("size=tiny", "data=synthetic", f"output_dir={tmp_path}", *words)
        end = stages(*few, f"+chain.stages.end={{do:dpo,reference:x,{sets}}}")["end"]
        assert (end.start, end.reference, end.reads) == ("a", "x", ("a", "x"))
        assert end.exp.dpo.reference is None and end.tree.dpo.reference is None
        end = stages(*few, f"+chain.stages.end={{do:dpo,reference:aaaa,{sets}}}")["end"]
        assert (end.reference, end.reads, end.exp.dpo.reference) == (None, ("a",), str(saved))

    def test_texts_reach_the_tree_as_they_are(self):
        prompt = "it's ${no} \\'reference\\', {a: b} [1]"
        config.register()
        values = {"sample": {"prompt": prompt, "domain": None}, "trainer": {"compile": True, "callbacks": {}}}
        values |= {"model": {"moe": {"domains": ["a, b", "c"]}}}
        values |= {
            "optim": {"optimizer": {"betas": [0.9, 0.5]}, "lr_multipliers": {"*.attention.w?.*": 0.5, "head.*": 0}}
        }
        with compose.hydra_ready():
            good, problems = compose.usable(list(set_words(values)))
            tree = compose.compose_run(good)[0]
        assert problems == []
        assert (tree.sample.prompt, tree.trainer.compile, tree.model.moe.domains) == (prompt, True, ["a, b", "c"])
        assert tree.optim.optimizer.betas == [0.9, 0.5] and "_target_" in tree.optim.optimizer
        assert tree.optim.lr_multipliers == {"*.attention.w?.*": 0.5, "head.*": 0}


class TestKey:
    def test_what_is_computed_makes_the_key(self):
        base = stages(*TWO)
        before = key(base["a"], train="1")
        assert before == key(stages(*TWO)["a"], train="1") == key(base["b"], train="1")
        assert len({before, key(base["a"], train="2"), key(base["a"], {"start": "3"}.items(), train="1")}) == 3
        evaluated = stages(*TWO, "+chain.stages.c.do=eval")["c"]
        assert key(evaluated, train="1") != before
        for word in ("optim.lr=1", "seed=7", "trainer.max_steps=99", "model.d_ff=64"):
            assert key(stages(*TWO, word)["a"], train="1") != before, word

    def test_how_and_where_do_not(self, tmp_path):
        words = (
            *("trainer.log_every_steps=1", "trainer.checkpoint_every_steps=3", "trainer.keep_checkpoints=9"),
            *("trainer.micro_batch_seqs=4", "trainer.n_threads=1", "device=cpu", f"output_dir={tmp_path}"),
            *("tracking=none", "data.n_workers=2", "parallel.dp=2", "kernels.linears=accumulated", "sample.top_p=0.5"),
            *("cluster=h100_8", "chain.reuse=strict", "chain.yardstick.tokens=5"),
        )
        assert key(stages(*TWO, *words)["a"]) == key(stages(*TWO)["a"])

    def test_how_is_recorded(self):
        one, other = (
            how(stages(*TWO, "trainer.micro_batch_seqs=4", f"parallel.dp={dp}")["a"].tree, {"torch": "2"})
            for dp in (1, 2)
        )
        assert {n for n in one if one[n] != other[n]} == {"parallel.dp"} and one["torch"] == "2"

    def test_the_weights_of_a_mixture_count_and_its_paths_do_not(self, tmp_path):
        for name in ("x", "y"):
            (tmp_path / f"{name}.txt").write_text("text\n")

        def mixed(path, weight):
            part = f"+data.mixture.law={{path:{tmp_path / path}.txt,weight:{weight}}}"
            return key(stages("size=tiny", "data=mixture", part, "+chain.stages.a.do=train")["a"])

        assert mixed("x", 1) == mixed("y", 1) != mixed("x", 2)


class TestFile:
    def test_what_is_written_is_read(self, tmp_path):
        file = ChainFile(tmp_path, "run")
        file.put("a", Record("running", "k1", "", "runs/1", how={"torch": "2"}))
        file.put("a", Record("done", "k1", "r1", "runs/1", "runs/1/checkpoints/step", "d", 1.5, 10.0, 2.0))
        file.put("a", Record("done", "k2", "r2", "runs/2"))
        found = ChainFile.load(tmp_path)
        assert found == file
        assert (found.find("k1").run_id, found.find("k2").run_id, found.find("k3")) == ("r1", "r2", None)
        file.put("a", dataclasses.replace(found.find("k1"), loss=2.0))  # what was done before is used again
        assert ChainFile.load(tmp_path).earlier.keys() == {"k2"}

    @pytest.mark.parametrize("content", ["", "[]", '{"format": 9}', '{"format": 1}', '{"format": 1, "stages": 7}'])
    def test_one_that_is_none_is_worded(self, tmp_path, content):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(CheckpointError, match=r"chain='.*chain\.json' cannot be read .* Fix: remove it"):
            ChainFile.load(tmp_path)

    def test_reuse_has_words_that_yaml_reads_as_texts(self):
        assert [OmegaConf.create(f"x: {r.value}").x for r in Reuse] == [r.value for r in Reuse]
