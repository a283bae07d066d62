"""The whole configuration tree: every file composes, every key is documented and read by something."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from omegaconf import OmegaConf

from deepseek_exp import config
from deepseek_exp.config import ExperimentConfig, compose
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.rules import validate
from deepseek_exp.config.topology import Degrees, degrees
from deepseek_exp.errors import ConfigError
from deepseek_exp.experiment import resume
from deepseek_exp.experiment.job import _folder_name
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer
from tests.composing import MACHINE, composed, shared_hydra, tree
from tests.runs import ROOT

CONF = ROOT / "conf"
FILES = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.rglob("*.yaml") if p.parent != CONF)
RECIPES = sorted(p.relative_to(ROOT / "recipes").with_suffix("") for p in (ROOT / "recipes").rglob("*.yaml"))
DOMAIN_PATHS = [
    f"data.mixture.{domain}.{key}={ROOT / 'README.md'}"
    for domain in ("general", "finance", "medical", "law")
    for key in ("path", "valid_path")
]
# the path that composing looks at; that the rows are none is found later
ROWS = [f"data.path={ROOT / 'README.md'}", "data.valid_path=null", f"data.tokenizer={ROOT / 'README.md'}"]
# what an option needs beside itself
NEEDS = {
    "kernels=fused": ["do=plan"],  # which needs no GPU
    "parallel=3d": ["device=cpu"],  # there may be fewer GPUs than ranks
    "parallel=ddp": ["device=cpu", "trainer.micro_batch_seqs=1"],
    "parallel=zero2": ["device=cpu", "trainer.micro_batch_seqs=1"],
    "parallel=zero3": ["device=cpu", "trainer.micro_batch_seqs=1"],
    "data=mixture": [f"+data.mixture.readme.path={ROOT / 'README.md'}"],
    "data=chat": ["do=sft", f"data.path={ROOT / 'README.md'}"],
    "evaluate=code": ["evaluate.allow_code_execution=true"],
    "data=text": [f"data.path={ROOT / 'README.md'}"],
    "data=preference": ["do=dpo", *ROWS],
    "data=prompts": ["do=grpo", *ROWS],
    "recipes=arithmetic_grpo": ROWS,
    "recipes=domains": DOMAIN_PATHS,
    "recipes=domains_dense": DOMAIN_PATHS,
    "recipes=shakespeare": [f"data.path={ROOT / 'README.md'}"],
}


def test_the_files_are_found():
    assert len(FILES) == 59
    assert len(RECIPES) == 13


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_option_composes(file):
    override = f"{file.parent}={file.name}"
    composed(override, *NEEDS.get(override, []))


@pytest.mark.parametrize("file", RECIPES, ids=str)
def test_every_recipe_composes(file):
    override = f"recipes={file}"
    composed(override, *NEEDS.get(override, []))
    assert re.search(
        r"^# question:.*^# command:.*^# result:", (ROOT / "recipes" / f"{file}.yaml").read_text(), re.M | re.S
    )


MODELS = [f.name for f in FILES if str(f.parent) == "model"]
SIZES = [f.name for f in FILES if str(f.parent) == "size"]
# The smallest, one between and that of the model's own file: others differ in numbers only.
SOME_SIZES = ["tiny", "1b", "published"]


@pytest.mark.parametrize(("model", "size"), list(itertools.product(MODELS, SOME_SIZES)))
def test_every_model_builds(model, size):
    cfg = composed(f"model={model}", f"size={size}").model
    cfg = dataclasses.replace(
        cfg, n_layers=min(cfg.n_layers, cfg.moe.n_dense_layers + 2)
    )  # blocks repeat from there on
    with torch.device("meta"):
        logits = Transformer(cfg, TORCH)(torch.zeros(1, cfg.max_seq_len, dtype=torch.int64))
    assert logits.shape == (1, cfg.max_seq_len, cfg.vocab_size)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_can_be_laid_out_in_3d_in_every_size(model):
    for size in SIZES:
        exp = composed(f"model={model}", f"size={size}", "parallel=3d", "do=plan")
        assert degrees(exp) == Degrees(dp=2, tp=2, pp=2, ep=2 if exp.model.moe.n_routed_experts else 1), size


@pytest.mark.parametrize(("size", "n_params"), [("published", 120e6), ("1b", 1.06e9), ("3b", 2.92e9), ("7b", 7.1e9)])
def test_a_size_has_the_parameters_it_is_named_for(size, n_params):
    with torch.device("meta"):
        built = Transformer(composed(f"size={size}").model, TORCH)
    assert sum(p.numel() for p in built.parameters()) == pytest.approx(n_params, rel=0.01)


def leaves(tree: dict, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_model_files_list_the_same_keys_in_the_schema_order():
    names = [k.removeprefix("model.") for k in compose.schema_keys() if k.startswith("model.")]
    for model in MODELS:
        assert list(leaves(OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{model}.yaml")))) == names


def test_data_files_list_the_same_keys():
    names = [k.removeprefix("data.") for k in compose.schema_keys() if k.startswith("data.")]
    for name in ("stdlib", "text", "synthetic", "mixture"):
        assert list(OmegaConf.load(CONF / "data" / f"{name}.yaml")) == names


def test_every_key_is_documented():
    assert all(info.metadata["doc"] for info in compose.schema_keys().values())


def test_every_key_is_read_somewhere():
    """No dead keys: the last part of each is an attribute read outside of the schema."""
    code = "\n".join(p.read_text() for p in (ROOT / "deepseek_exp").rglob("*.py") if p.name != "config.py")
    read = set(re.findall(r"\.([a-z_0-9]+)\b", code))
    dead = [k for k in compose.schema_keys() if k.rsplit(".", 1)[-1] not in read]
    assert dead == []


@pytest.mark.parametrize("do", ["sample", "export"])
def test_what_runs_in_one_process_takes_no_heed_of_the_layout(do):
    composed(f"do={do}", "parallel=3d", "parallel.tp=5", "device=cpu", "launch=slurm", "launch.n_nodes=7")


def test_scaled_learning_rate_is_the_sources_rule():
    assert composed("optim=adamw_scaled", "trainer.global_batch_seqs=512").optim.lr == pytest.approx(5e-4 * 512 / 256)


class TestMergeSaved:
    """What a resumed run takes from its checkpoint and what from the command line."""

    def saved(self, *overrides: str) -> dict:
        return OmegaConf.to_container(tree(*overrides), resolve=True)

    def merged(self, saved: dict, *overrides: str) -> ExperimentConfig:
        with shared_hydra():
            return compose.to_experiment(resume.merge_saved(saved, overrides), MACHINE)

    def test_the_saved_values_stay(self):
        cfg = self.merged(self.saved("size=tiny", "optim.lr=0.1", "seed=7"), "resume=last")
        assert (cfg.model.d_model, cfg.optim.lr, cfg.seed, cfg.resume) == (64, 0.1, 7, "last")

    def test_a_named_value_wins_even_where_it_is_the_default(self):
        assert self.merged(self.saved("optim.lr=0.1"), "optim.lr=0.003").optim.lr == 0.003

    def test_a_named_group_wins_even_where_it_is_the_default(self):
        assert self.merged(self.saved("size=tiny"), "size=small").model.d_model == 192

    def test_a_recipe_wins(self):
        assert self.merged(self.saved(), "recipes=scaled_lr").optim.weight_decay == 0.01

    def test_a_section_that_came_later_has_its_default(self):
        saved = {
            name: section for name, section in self.saved("size=tiny").items() if name not in ("parallel", "cluster")
        }
        cfg = self.merged(saved, "resume=last")
        assert (cfg.parallel, cfg.cluster) == (composed().parallel, composed().cluster)
        assert self.merged(saved, "resume=last", "do=plan", "cluster=h100_8").cluster.gpu == "H100 SXM 80GB"

    def test_a_key_that_came_later_has_its_default(self):
        saved = self.saved("size=tiny", "optim.lr=0.1")
        del saved["optim"]["state_bits"], saved["trainer"]["keep_checkpoints"]
        cfg = self.merged(saved, "resume=last")
        assert (cfg.optim.state_bits, cfg.trainer.keep_checkpoints, cfg.optim.lr) == (32, 2, 0.1)
        del saved["model"]["qk_norm"]  # what a model is built from is not made up
        with pytest.raises(ConfigError, match=r"model.qk_norm='\?\?\?' has no value"):
            self.merged(saved, "resume=last")

    def test_a_mapping_is_replaced_whole(self):
        saved = self.saved("optim=adafactor")
        assert self.merged(saved, "optim=adamw").optim.optimizer["_target_"] == "torch.optim.AdamW"
        assert self.merged(saved).optim.optimizer == {"_target_": "torch.optim.Adafactor"}

    def test_what_refers_to_the_model_refers_to_the_saved_one(self):
        cfg = self.merged(self.saved("size=tiny"), "data=stdlib", "resume=last")
        assert (cfg.data.seq_len, cfg.data.vocab_size) == (64, 512)

    def test_what_a_resumed_run_may_not_change(self):
        before, now = composed("seed=1"), composed("seed=2", "model.n_layers=9", "data.text_key=x", "optim.lr=1")
        assert [str(p) for p in resume.resume_problems(before, now)] == [
            "seed=2 differs from the checkpoint's 1. Fix: leave seed out, or start a new run with resume=null.",
            "model.n_layers=9 differs from the checkpoint's 4. "
            "Fix: leave model.n_layers out, or start a new run with resume=null.",
            "data.text_key='x' differs from the checkpoint's text. "
            "Fix: leave data.text_key out, or start a new run with resume=null.",
        ]

    def test_the_parts_of_a_mixture(self):
        one, two = (f"+data.mixture.{name}.path={ROOT / 'README.md'}" for name in ("a", "b"))
        saved = self.saved("data=mixture", one, two, "+data.mixture.b.weight=2")
        before = self.merged(saved, "resume=last")
        assert list(before.data.mixture) == ["a", "b"]
        assert before.data.mixture["b"] == config.MixturePart(str(ROOT / "README.md"), None, 2)
        after = self.merged(saved, "data=mixture", one, two)
        (problem,) = resume.resume_problems(before, after)
        assert (problem.key, problem.value) == ("data.mixture", {"a": 1.0, "b": 1.0})
        moved = self.merged(saved, f"+data.mixture.a.path={ROOT / 'CONTRIBUTING.md'}")
        assert resume.resume_problems(before, moved) == []  # digests say whether it is the same text

    @pytest.mark.parametrize(
        ("before", "now", "keys"),
        [
            ([], ["trainer.precision=bf16"], ["trainer.precision"]),
            ([], ["optim=adafactor"], ["optim.optimizer"]),
            ([], ["optim.lr=1", "optim.weight_decay=0", "trainer.max_steps=900", "trainer.global_batch_seqs=16"], []),
            (
                ["data.order=contiguous"],
                ["data.order=contiguous", "trainer.global_batch_seqs=16"],
                ["trainer.global_batch_seqs"],
            ),
            (
                ["data.order=contiguous", "model.memory_len=9"],
                ["data.order=contiguous", "model.memory_len=9", "trainer.micro_batch_seqs=4"],
                ["trainer.micro_batch_seqs"],
            ),
            ([], ["do=sample", "seed=9", "data=synthetic"], []),
            ([], ["do=sample", "model.n_layers=9"], ["model.n_layers"]),
            ([], ["do=eval", "seed=9", "data.seq_len=99"], []),
            ([], ["do=eval", "data=synthetic"], []),
        ],
    )
    def test_what_each_verb_may_change(self, before, now, keys):
        assert [p.key for p in resume.resume_problems(composed(*before), composed(*now))] == keys


@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(500, 50), (100, 50), (99, 9), (20, 2), (1, 0)])
def test_warm_up_shrinks_with_a_short_run(max_steps, warmup_steps):
    for optim in ("adamw", "adamw_scaled", "adafactor"):
        assert composed(f"optim={optim}", f"trainer.max_steps={max_steps}").optim.warmup_steps == warmup_steps


def test_a_named_warm_up_stays():
    assert composed("trainer.max_steps=20", "optim.warmup_steps=19").optim.warmup_steps == 19


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("team/base line", "team-base_line"),
        ("../../../x", "x"),
        ("日本", "run"),
        ("x" * 300, "x" * 80),
        ("v1_dense tiny synthetic lr=1e-3", "v1_dense_tiny"),
        ("a\x1b]0;b", "a-0-b"),
    ],
)
def test_the_folder_of_a_run_has_a_safe_name(name, folder):
    assert re.fullmatch(rf"[\d_-]{{19}}_{re.escape(folder)}_\d+", _folder_name(name))


@pytest.mark.parametrize("path", [".", "..", "/", "README.md/x"])
def test_an_export_needs_a_folder_that_can_be_made(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    exp = composed("do=plan")
    exp.do, exp.export.path = config.Do.export, path
    assert [p.key for p in validate.problems(exp, Machine())] == ["export.path"]
    exp.export.path = "new"
    assert validate.problems(exp, Machine()) == []
