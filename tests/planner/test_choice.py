"""What parallel=auto takes, where it is written down, and what is refused."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from deepseek_exp import planner
from deepseek_exp.checkpoint import manifest
from deepseek_exp.config.rules import validate
from deepseek_exp.config.rules.parallel import illegal
from deepseek_exp.experiment.job import Job, make_job
from deepseek_exp.planner.search import asked_layout, best_plans
from tests.composing import shared_hydra, tree
from tests.planner.plan_parts import experiment
from tests.runs import run

LAYOUTS = ("parallel=3d", "parallel=3d parallel.pp=1 parallel.dp=0", "parallel=ddp", "parallel=zero2", "parallel=zero3")


def job(*overrides: str) -> Job:
    with shared_hydra():
        return make_job(tree(*overrides), overrides, "small", None)


@pytest.mark.parametrize(
    "overrides",
    [
        ("size=tiny",),
        ("model=v3_moe", "size=1b", "cluster=h100_8", "trainer.precision=bf16", "trainer.global_batch_seqs=64"),
        ("model=v4_distill", "size=70b", "cluster=h100_1024", "trainer.global_batch_seqs=1024"),
        ("optim=adafactor", "size=tiny"),
        ("cluster=h100_1",),
        ("model=v4_distill", "size=7b", "cluster=h200_8", "parallel.sequence_parallel=true"),
    ],
)
def test_auto_is_the_first_of_the_best_and_stands_in_the_tree(overrides, capsys):
    made = job("do=plan", "parallel=auto", *overrides)
    (best,) = best_plans(experiment("parallel=auto", *overrides), 1)
    assert asked_layout(made.cfg) == best.layout
    assert list(illegal(made.cfg, best.layout.degrees)) == []
    d, written = best.layout.degrees, OmegaConf.create(made.yaml)
    asked = {"dp": d.dp, "tp": d.tp, "pp": d.pp, "ep": d.ep, "zero_stage": best.layout.zero_stage}
    assert written.parallel == {"auto": False, **asked, "sequence_parallel": best.layout.sequence_parallel}
    assert written.trainer.micro_batch_seqs == best.layout.micro_batch_seqs
    assert written.trainer.activation_checkpointing == best.layout.checkpointing.value
    told = capsys.readouterr().out
    assert told.startswith("chosen    ")
    assert told.count("\n") == 1


def test_one_rank_is_left_as_it_is():
    made = job("parallel=auto", "cluster.gpus_per_node=1")
    assert (made.cfg.parallel, made.cfg.trainer) == (experiment().parallel, experiment().trainer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tiny_model_fits_a_cpu_host_in_every_layout(layout):
    words = (*layout.split(" "), "size=tiny", "trainer.micro_batch_seqs=1")
    for model in ("v1_dense", "v2_moe", "v3_moe"):
        assert planner.misfit(experiment(f"model={model}", *words)) is None


def test_one_rank_is_not_refused():
    assert planner.misfit(experiment("cluster.memory_bytes=1")) is None


def test_what_is_told_to_fit_does():
    exp = experiment("model=v4_distill", "size=7b", "cluster=h100_8", "parallel=ddp", "trainer.micro_batch_seqs=1")
    problem = planner.misfit(exp)
    words = problem.fix.removeprefix("use ").split()
    assert planner.misfit(experiment("model=v4_distill", "size=7b", "cluster=h100_8", *words)) is None


@pytest.mark.parametrize("what", ["plan", "sample", "export"])
def test_what_starts_no_ranks_needs_no_room(what, monkeypatch, tmp_path):
    monkeypatch.setattr(validate, "layout_problems", lambda _: [])
    big = ("model=v4_distill", "size=70b", "parallel=3d", f"do={what}")
    monkeypatch.setattr(manifest, "locate", lambda *_: (tmp_path, []))
    monkeypatch.setattr(manifest, "run_dir_of", lambda *_: tmp_path)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(tree(*big), resolve=True))
    assert job(*big).cfg.do == what


def test_the_command_says_what_it_chose(tmp_path):
    done = run(tmp_path, "parallel=auto", "do=plan", "cluster.gpus_per_node=2", "size=tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "chosen    2 of 2 ranks: dp 2 x tp 1 x pp 1, ep 1, ZeRO 1, micro batches of 1; by the plan"
    )
