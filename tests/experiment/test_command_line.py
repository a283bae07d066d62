"""What a command line and files may ask of Hydra: nothing that loads or runs what they name."""

from __future__ import annotations

import errno
import os

import pytest

from deepseek_exp import config
from deepseek_exp.commands import dispatch
from deepseek_exp.config import compose
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.rules import validate
from deepseek_exp.experiment.command_line import check_command_line, with_text_run_ids
from deepseek_exp.experiment.job import make_job
from tests.composing import shared_hydra
from tests.config.command_lines import ids, refusal


@pytest.fixture(autouse=True, scope="module")
def _schema():
    config.register()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Return a function that writes an option into a folder of the user's."""
    monkeypatch.chdir(tmp_path)

    def write(option: str, text: str) -> None:
        file = tmp_path / "mine" / f"{option}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    return write


RECIPE = "# @package _global_\n"


@pytest.mark.parametrize("do", ["train", "plan"])
def test_a_recipe_cannot_name_a_callback_of_hydra(mine, do):
    mine("recipes/evil", RECIPE + "hydra: {callbacks: {evil: {_target_: pandas.read_pickle, filepath: x}}}\n")
    assert ids(refusal(["--config-dir", "mine", "recipes=evil", f"do={do}"])) == [
        "hydra.callbacks.evil._target_ section_problems",
        "hydra.callbacks.evil.filepath section_problems",
    ]


@pytest.mark.parametrize(
    "section",
    [
        "job_logging: {handlers: {x: {(): os.system}}}",
        "launcher: {_target_: evil.Evil}",
        "searchpath: [pkg://evil]",
        "run: {dir: /x}",
        "job: {env_set: {LD_PRELOAD: x}}",
        "overrides: {hydra: ['+hydra.job_logging.handlers.x={class:subprocess.Popen,args:[id]}']}",
        "overrides: {task: ['tracking.uri=http://elsewhere']}",
    ],
)
def test_a_recipe_sets_no_key_of_hydra(mine, section):
    mine("recipes/evil", RECIPE + f"hydra: {{{section}}}\n")
    assert f"hydra.{section.split(':')[0]}" in str(refusal(["-m", "--config-dir=mine", "recipes=evil", "seed=1,2"]))


def test_a_recipe_that_is_swept_over_is_checked(mine):
    mine("recipes/evil", RECIPE + "hydra: {callbacks: {evil: {_target_: evil.Evil}}}\n")
    found = ids(refusal(["-m", "--config-dir=mine", "recipes=scaled_lr,evil"]))
    assert found == ["hydra.callbacks.evil._target_ section_problems"]


def test_the_defaults_of_a_recipe_stay_in_the_folders(mine, tmp_path):
    (tmp_path / "elsewhere.yaml").write_text("seed: 7\n", encoding="utf-8")
    for entry in ("../../elsewhere", str(tmp_path / "elsewhere"), "override /size: ../../../elsewhere"):
        mine("recipes/dots", RECIPE + f"defaults:\n  - {entry}\n")
        assert ids(refusal(["--config-dir=mine", "recipes=dots"])) == ["recipes _option_words"]


def test_own_folders_are_found(mine):
    mine("cluster/rtx", "defaults: [h100_8, _self_]\ngpu: RTX\n")
    mine("size/micro", "# @package model\nn_layers: 1\n")
    check_command_line(["--config-dir=mine", "cluster=rtx", "size=micro", "do=plan"])
    check_command_line(["hydra.searchpath=[file://mine]", "cluster=rtx", "size=micro", "do=plan"])
    elsewhere = ["hydra.searchpath=[file://mine]", "recipes=balance"]
    assert ids(refusal(elsewhere)) == ["recipes _option_words"]
    assert "--config-dir=<folder>" in str(refusal(elsewhere))
    check_command_line(["--config-dir=mine", "size=micro", "recipes=scaled_lr"])
    (problem,) = refusal(["--config-dir=mine", "cluster=rtxx"]).problems
    assert problem.fix == "use cluster=rtx"


def test_a_file_that_changes_is_read_again(mine):
    for n_layers in (1, 3):
        mine("size/micro", f"# @package model\nn_layers: {n_layers}\n")
        found = check_command_line(["--config-dir=mine", "size=micro", "do=plan"])
        assert found.exp.model.n_layers == n_layers


@pytest.mark.parametrize(
    "words", ["", "recipes=balance size=tiny seed=3 do=plan", "model=v3_moe ~optim.optimizer.fused"]
)
def test_a_job_of_a_sweep_is_composed_as_a_single_run_is(words):
    with shared_hydra():
        single, swept = compose.compose_run(words.split()), compose.compose_tree(words.split())
    assert swept == (single[0], single[2])


def test_a_recipe_may_list_the_values_of_a_sweep(mine):
    mine("recipes/seeds", RECIPE + 'hydra: {sweeper: {params: {model.n_heads: "4,5"}}}\n')
    assert ids(refusal(["-m", "--config-dir=mine", "recipes=seeds"])) == ["model.n_kv_heads _heads"]


def test_the_project_itself_sets_what_it_sets():
    with compose.hydra_ready():
        assert compose.compose_tree([])[1] == []


def test_a_disk_error_of_a_run_is_put_into_words():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (problem,) = dispatch.in_words(error, "o").problems
    assert (problem.key, problem.value) == ("output_dir", "o") and os.strerror(errno.ENOSPC) in problem.rule
    assert dispatch.in_words(KeyError("a defect"), "o") is None
    with compose.hydra_ready():
        assert compose.compose_tree([])[1] == []


def test_a_run_id_is_no_number():
    assert with_text_run_ids(["resume=12e4", "+x=12e4", "resume=last", "resume=7"]) == [
        "resume='12e4'",
        "+x=12e4",
        "resume=last",
        "resume='7'",
    ]


class TestWhatIsComposed:
    """A single job is made from the tree that its check composed."""

    def test_a_single_job(self):
        found = check_command_line(["size=tiny", "do=plan", "hydra.verbose=false"], Machine())
        assert (found.exp.model.d_model, found.tree.model.d_model) == (64, 64) and "hydra" not in found.tree
        assert found.hydra.hydra.overrides.task == ["size=tiny", "do=plan"]
        assert found.hydra.hydra.runtime.choices["size"] == "tiny"

    def test_it_is_validated_once(self, monkeypatch):
        found = check_command_line(["size=tiny", "do=plan"], Machine())
        monkeypatch.setattr(validate, "problems", lambda *_: pytest.fail("validated twice"))
        job = make_job(found.tree, ["size=tiny", "do=plan"], "tiny", None, Machine(), found.exp)
        assert job.cfg is found.exp

    def test_what_depends_on_a_checkpoint_is_validated_with_it(self):
        assert check_command_line(["do=sample"], Machine()).exp is None

    @pytest.mark.parametrize("argv", [["-m", "seed=1,2"], ["--cfg", "job"], ["--info"], ["--help", "size=tiny"]])
    def test_the_rest_is_hydras(self, argv):
        assert check_command_line(argv, Machine()) is None
