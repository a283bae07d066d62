"""The search, and `do=plan` as a person meets it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from deepseek_exp.config.rules.parallel import illegal
from deepseek_exp.config.topology import Degrees
from deepseek_exp.planner import report
from deepseek_exp.planner.memory import USABLE
from deepseek_exp.planner.search import asked_layout, best_plans
from tests.planner.plan_parts import experiment, layout, planned
from tests.runs import ROOT, run

PUBLISHED = ("model=v3_moe", "size=published", "parallel=3d", "cluster=h100_1024")


class TestSearch:
    def test_the_best_fit_and_come_in_order(self):
        exp = experiment(*PUBLISHED, "trainer.precision=bf16", "trainer.global_batch_seqs=8192")
        plans = best_plans(exp, 5)
        assert len(plans) == 5
        assert [p.speed.step_seconds for p in plans] == sorted(p.speed.step_seconds for p in plans)
        for plan in plans:
            assert plan.layout.degrees.world_size == 1024
            assert max(m.total for m in plan.memory) <= USABLE * exp.cluster.memory_bytes
            assert list(illegal(exp, plan.layout.degrees)) == []

    def test_no_layout_that_fits_is_faster(self):
        exp = experiment("model=v2_moe", "size=1b", "cluster=h100_8", "trainer.precision=bf16")
        (best,) = best_plans(exp, 1)
        for dp, tp, pp in [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1), (2, 4, 1), (1, 2, 4)]:
            for ep in (1, dp):
                other = planned(exp, layout(dp, tp, pp, ep, zero=1))
                assert not other.fits or best.speed.step_seconds <= other.speed.step_seconds

    def test_zero_is_cut_further_where_data_parallelism_is_alone(self):
        exp = experiment("model=v4_distill", "size=7b", "cluster=h100_8", "trainer.precision=bf16")
        exp = dataclasses.replace(exp, cluster=dataclasses.replace(exp.cluster, memory_bytes=4e10))
        found = {(p.layout.zero_stage, p.layout.degrees) for p in best_plans(exp, 100)}
        assert {zero for zero, d in found if d == Degrees(8, 1, 1, 1)} == {2, 3}
        assert {zero for zero, d in found if d != Degrees(8, 1, 1, 1)} == {1}

    def test_zero_is_left_out_where_it_cannot_cut_the_optimizer(self):
        exp = experiment("cluster=h100_8", "optim=adafactor")
        found = {(p.layout.zero_stage, p.layout.degrees.world_size) for p in best_plans(exp, 100)}
        assert found == {(0, 8)}

    def test_sequence_parallelism_is_as_configured_where_there_are_tensor_ranks(self):
        exp = experiment("cluster=h100_8", "parallel=auto", "parallel.sequence_parallel=true")
        plans = best_plans(exp, 100)
        assert {p.layout.degrees.tp for p in plans} == {1, 2}
        assert all(p.layout.sequence_parallel == (p.layout.degrees.tp > 1) for p in plans)

    def test_of_equals_the_larger_micro_batch_comes_first(self):
        (best,) = best_plans(experiment("cluster=h100_1"), 1)
        assert best.layout.micro_batch_seqs == 8

    def test_fewer_ranks_where_the_batch_is_too_small_for_all(self):
        exp = experiment("model=v4_distill", "size=tiny", "cluster=h100_1024")
        (best,) = best_plans(exp, 1)
        assert best.layout.degrees.world_size < 1024

    def test_nothing_fits(self):
        assert best_plans(experiment("model=v3_moe", "size=published", "cluster=h100_8"), 1) == []

    def test_the_layout_is_the_one_that_was_asked_for(self):
        exp = experiment("model=v3_moe", "size=tiny", "parallel=3d", "parallel.dp=0", "trainer.global_batch_seqs=16")
        assert asked_layout(exp) == layout(dp=2, tp=2, pp=2, ep=2, zero=1)


class TestReport:
    def test_what_does_not_fit_is_told_with_what_does(self):
        lines = report(experiment(*PUBLISHED)).splitlines()
        verdict = next(i for i, line in enumerate(lines) if line.startswith("does not fit: the largest stage needs"))
        fitting = lines[verdict + 1].removeprefix("a layout that fits: ").split()
        exp = experiment(*PUBLISHED, *fitting)
        assert planned(exp, asked_layout(exp)).fits

    def test_the_hint_keeps_its_word(self):
        lines = report(experiment(*PUBLISHED)).splitlines()
        told = next(i for i, line in enumerate(lines) if line.startswith("with trainer.precision=bf16"))
        words = lines[told].removeprefix("with ").split(":")[0].split()
        exp = experiment(*PUBLISHED, *words, *lines[told + 1].split())
        plan = planned(exp, asked_layout(exp))
        assert plan.fits
        assert f"MFU {plan.speed.mfu:.1%}" in lines[told]

    def test_nothing_fits(self):
        text = report(experiment("model=v3_moe", "size=published", "cluster=h100_8"))
        assert "no layout fits 8 GPUs with 8 sequences per step" in text
        assert "a layout that fits" not in text

    @pytest.mark.parametrize("cluster", ["cpu_host", "h100_1", "h100_8", "h100_1024", "a100_1024", "h200_8"])
    def test_every_cluster(self, cluster):
        text = report(experiment(f"cluster={cluster}"))
        assert "\nfits\n" in text
        assert max(map(len, text.splitlines())) < 190

    def test_the_overlap_is_told(self):
        assert "no communication overlaps with compute" in report(experiment())
        assert "50% of non-TP communication overlaps with compute" in report(experiment("cluster.overlap=0.5"))


def test_the_command_answers_and_leaves_nothing_behind(tmp_path):
    done = run(tmp_path, "do=plan")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("model     v1_dense, 2.36M parameters")
    assert not (tmp_path / "outputs").exists()


def test_a_plan_takes_less_than_its_composition_and_imports_nothing_heavy():
    """In processor time of one process, so that neither a slow nor a busy machine counts.

    tests/bench/start_time.py measures the seconds.
    """
    code = (
        "import sys, runpy, time\n"
        f"sys.argv = ['run.py', *{list(PUBLISHED)!r}, 'do=plan']\n"
        "from deepseek_exp import planner\n"
        "report, seconds = planner.report, []\n"
        "def timed(cfg):\n"
        "    started = time.process_time()\n"
        "    text = report(cfg)\n"
        "    seconds.append(time.process_time() - started)\n"
        "    return text\n"
        "planner.report = timed\n"
        "runpy.run_path('run.py', run_name='__main__')\n"
        "heavy = {'torch', 'pytorch_lightning', 'mlflow', 'transformers', 'deepspeed'} & set(sys.modules)\n"
        "print(sorted(heavy), seconds[0], time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    heavy, report, whole = done.stdout.splitlines()[-1].rsplit(" ", 2)
    assert heavy == "[]", done.stderr
    assert float(report) < 0.3 * float(whole), (report, whole)  # 0.24 s of 1.54 s
