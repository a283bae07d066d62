"""Errors of the configuration that depend on the machine, on files or on a whole job; the others: command_lines.py."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import ClassVar

import pytest

from deepseek_exp import config
from deepseek_exp.config import Device, Do, compose
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.rules import bounds, validate, values
from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.experiment import command_line, init_from
from deepseek_exp.experiment.job import make_job
from tests.composing import as_in_a_sweep, composed, shared_hydra, tree
from tests.config.command_lines import ids, refusal
from tests.runs import ROOT


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with as_in_a_sweep():
        yield


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [({"ge": 1}, (1, 2), 0), ({"gt": 1}, (2,), 1), ({"le": 1}, (1, 0), 2), ({"lt": 1}, (0,), 1)],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_bound_is_inclusive_or_exclusive(bound, inside, outside):
    section = dataclasses.make_dataclass("Section", [("n", int, dataclasses.field(metadata={"bounds": bound}))])
    assert [p for n in inside for p in bounds.range_problems(section(n), "")] == []
    (problem,) = bounds.range_problems(section(outside), "a.")
    assert (problem.key, problem.value) == ("a.n", outside)


def test_no_rule_counts_up_to_a_huge_number(monkeypatch):
    exp = composed("do=plan")
    exp.model.n_heads = 10**9 + 1
    monkeypatch.setattr(validate, "model_problems", lambda _: pytest.fail("a rule is asked"))
    assert [p.key for p in validate.problems(exp, Machine())] == ["model.n_heads"]


def test_a_null_character_is_no_part_of_a_path():
    (problem,) = values.path_problems("data.mixture.a.path", "a\0b")
    assert (problem.key, problem.id) == ("data.mixture.a.path", "path_problems") and "null" in problem.rule


def test_a_tilde_is_taken_where_it_is_expanded():
    assert [*values.path_problems("data.path", "~/x")] == []


def test_missing_path_names_the_folder_it_looked_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (problem,) = refusal(["data=text", "data.path=nowhere"]).problems
    assert (problem.key, problem.id) == ("data.path", "_exists") and str(tmp_path) in problem.rule


def test_missing_parts_and_tokenizers_are_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parts = ("+data.mixture.a.path=nowhere", "+data.mixture.b.path=.", "+data.mixture.b.valid_path=x/*")
    error = refusal(["data=mixture", *parts, "data.tokenizer=gone.json"])
    assert ids(error) == [
        "data.tokenizer data_problems",
        "data.mixture.a.path _exists",
        "data.mixture.b.valid_path _exists",
    ]
    assert all(str(tmp_path) in p.rule for p in error.problems)


class TestInitFrom:
    LLAMA: ClassVar = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(self.LLAMA))
        (tmp_path / "tokenizer.json").write_text("{}")
        return tmp_path

    def test_it_decides_the_model_and_the_tokenizer(self, folder):
        config.register()
        overrides = [f"init_from={folder}", "model.max_seq_len=32", "model.init_std=0.5"]
        with shared_hydra():
            cfg, problems = init_from.start_from(tree(*overrides), overrides)
        assert problems == []
        cfg = compose.to_experiment(cfg, Machine())
        assert (cfg.model.version, cfg.model.d_model, cfg.model.n_kv_heads, cfg.model.window) == ("llama", 64, 4, 0)
        assert (cfg.model.max_seq_len, cfg.data.seq_len, cfg.model.init_std) == (32, 32, 0.5)
        assert cfg.model.rope_scaling.original_max_seq_len == 64
        assert cfg.data.tokenizer == str(folder / "tokenizer.json")

    @pytest.mark.parametrize("override", ["model=v3_moe", "size=tiny", "model.n_layers=4", "model.moe.top_k=0"])
    def test_nothing_else_does(self, folder, override):
        assert ids(refusal([f"init_from={folder}", override])) == [f"{override.split('=')[0]} _model_overrides"]

    def test_what_it_cannot_be_combined_with(self, folder):
        assert ids(refusal([f"init_from={folder}", "resume=last"])) == ["init_from start_from"]
        assert ids(refusal([f"init_from={folder}", "do=export"])) == ["init_from start_from"]

    def test_what_is_missing(self, folder):
        (folder / "tokenizer.json").unlink()
        (problem,) = refusal([f"init_from={folder}"]).problems
        assert (problem.key, problem.id) == ("init_from", "start_from") and "tokenizer.json" in problem.rule
        (problem,) = refusal([f"init_from={folder}/gone"]).problems
        assert (problem.key, problem.id) == ("init_from", "read_json") and "hf download" in problem.fix

    def test_a_field_that_is_not_built_and_a_broken_rule_are_found(self, folder):
        (folder / "config.json").write_text(json.dumps({**self.LLAMA, "hidden_act": "gelu"}))
        found = ids(refusal([f"init_from={folder}", "optim.lr=-1"]))
        assert found == ["hidden_act Fields.refuse", "optim.lr range_problems"]
        (folder / "config.json").write_text(json.dumps({**self.LLAMA, "num_key_value_heads": 3}))
        assert ids(refusal([f"init_from={folder}", "do=eval"])) == ["model.n_kv_heads _heads"]


def test_a_gpu_that_is_not_there():
    assert ids(refusal(["device=cuda"], Machine())) == ["device device_problems"]
    command_line.check_command_line(["device=cuda", "do=plan"], Machine())  # a plan needs none


@pytest.mark.parametrize(
    ("device", "rule"),
    [("auto", "none is visible"), ("cpu", "device=cpu is asked for")],
)
def test_kernels_for_a_gpu_that_is_not_there(device, rule):
    machine = Machine(n_gpus=int(device == "cpu"))
    argv = ["kernels.rms_norm=triton", f"device={device}"]
    (problem,) = refusal(argv, machine).problems
    assert (problem.key, problem.id) == ("kernels.rms_norm", "kernel_problems") and rule in problem.rule
    assert ids(refusal([*argv, "kernels.rope=triton"], machine)) == ["kernels.{rms_norm,rope} kernel_problems"]
    command_line.check_command_line([*argv, "do=plan"], machine)
    export = composed(*argv[:1], "do=plan")
    export.do, export.device = Do.export, Device(device)
    assert not any(p.key.startswith("kernels") for p in validate.problems(export, machine))  # it reads files alone
    command_line.check_command_line([*argv, "launch=torchrun"], machine)  # the machines with the ranks may have one
    command_line.check_command_line(argv, dataclasses.replace(machine, interprets_triton=True))


def misfit(*argv: str) -> Problem:
    with shared_hydra(), pytest.raises(ConfigError) as caught:
        make_job(tree(*argv), argv, "small", None)
    (problem,) = caught.value.problems
    return problem


BIG = ("model=v4_distill", "size=7b", "cluster=h100_8", "trainer.micro_batch_seqs=1")


class TestMemory:
    """What does not fit the cluster is refused when the job is made."""

    def test_a_layout_is_refused_with_one_that_fits(self):
        problem = misfit(*BIG, "parallel=ddp", "trainer.precision=bf16")
        assert (problem.key, problem.value, problem.id) == ("parallel.dp", 8, "misfit")
        assert "163.40 GB of 73.60 GB" in problem.rule
        assert problem.fix.startswith(
            "use parallel.dp=8 parallel.tp=1 parallel.pp=1 parallel.ep=1 parallel.zero_stage=2"
        )

    def test_if_nothing_fits_the_remedies_are_named(self):
        small = (*BIG, "size=3b", "cluster.gpus_per_node=2", "cluster.memory_bytes=2.8e10")
        alone, chosen = misfit(*small, "parallel=ddp"), misfit(*small, "parallel=auto")
        assert (alone.key, chosen.key) == ("parallel.dp", "parallel.auto")
        assert "80.63 GB of 25.76 GB" in alone.rule and "2 ranks of 25.76 GB" in chosen.rule
        assert alone.fix == chosen.fix == "set data.seq_len=2048, or cluster.n_nodes=2"

    @pytest.mark.parametrize(("device", "names_gpus"), [("cpu", False), ("auto", True)])
    def test_if_nothing_helps(self, device, names_gpus):
        problem = misfit("parallel=auto", "cluster.memory_bytes=1", f"device={device}")
        assert problem.key == "parallel.auto" and "CPU process" in problem.rule
        assert ("cluster=h100_8" in problem.fix) == names_gpus and "take a smaller model" in problem.fix

    def test_gpus_planned_as_processes_of_a_cpu(self):
        layout = ("parallel=ddp", "parallel.dp=2", "trainer.micro_batch_seqs=4")
        assert "cluster=h100_8" in misfit("model=v1_dense", "size=1b", *layout).fix


def test_more_ranks_than_gpus():
    machine = Machine(n_gpus=2)
    (problem,) = refusal(["parallel=3d"], machine).problems
    assert (problem.key, problem.id) == ("parallel.dp", "too_many") and "this machine has 2 GPUs" in problem.rule
    # on a CPU there may be any number; other machines are not this one; one process needs one GPU
    for more in (["device=cpu"], ["launch=torchrun"], ["launch=slurm", "launch.n_nodes=4"], ["do=plan"]):
        command_line.check_command_line(["parallel=3d", *more], machine)
    command_line.check_command_line(["parallel=3d", "parallel.dp=1", "parallel.tp=1", "parallel.ep=1"], machine)


def test_slurm_that_is_not_there():
    command_line.check_command_line(["launch=slurm", "launch.submit=true"], Machine(has_sbatch=True))
    assert ids(refusal(["launch=slurm", "launch.submit=true"], Machine())) == ["launch.submit launch_problems"]


def test_all_problems_are_reported_together():
    error = refusal(["optim.lr=x", "size=hugee", "seed=a", "model.n_heads=0", "data.seq_len=4096"])
    assert [p.key for p in error.problems] == ["size", "optim.lr", "seed", "model.n_heads", "data.seq_len"]


def test_a_sweep_is_checked_whole_before_its_first_job():
    error = refusal(["-m", "model.n_heads=4,3,5", "optim.lr=-1,1e-3"])
    assert ids(error) == ["optim.lr range_problems", "model.n_kv_heads _heads", "model.n_kv_heads _heads"]
    assert ["model.n_heads=3" in str(p) for p in error.problems] == [False, True, False]


def test_an_error_answers_without_heavy_imports():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['run.py', 'optim.lrr=1']\n"
        "try:\n    runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit as e:\n"
        "    heavy = {'torch', 'pytorch_lightning', 'mlflow', 'transformers', 'deepspeed'} & set(sys.modules)\n"
        "    print(e.code, sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2 []", done.stderr
    assert done.stderr.strip() == str(refusal(["optim.lrr=1"]))


def test_help_lists_every_key_and_group():
    done = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"  {key} " in done.stdout for key in compose.schema_keys())
    assert "  size        175b, 1b, 3b, 70b, 7b, base, published, small, tiny" in done.stdout
