"""What a command line and files may ask of Hydra: nothing that loads or runs what they name."""

from __future__ import annotations

import errno
import os

import pytest

from deepseek_exp import config
from deepseek_exp.commands import dispatch
from deepseek_exp.config import compose
from deepseek_exp.errors import ConfigError
from deepseek_exp.experiment.command_line import check_command_line

REFUSED = (
    "is not a key of Hydra that may be set. Fix: leave it out; those that may be: hydra/launcher, hydra/sweeper, "
    "hydra.launcher, hydra.sweeper, hydra.searchpath, hydra.sweep.dir, hydra.verbose."
)
MESSAGES = {
    "+hydra.callbacks.x._target_=evil.Evil do=plan": f"hydra.callbacks.x._target_='evil.Evil' {REFUSED}",
    "~hydra.callbacks.sweep": f"hydra.callbacks.sweep=null {REFUSED}",
    "hydra.sweep.subdir=../../x": f"hydra.sweep.subdir='../../x' {REFUSED}",
    "hydra.job.env_copy=[NOPE]": f"hydra.job.env_copy=['NOPE'] {REFUSED}",
    "hydra.mode=MULTIRUN": f"hydra.mode='MULTIRUN' {REFUSED}",
    "-m hydra.job.name=a,b": f"hydra.job.name='a,b' {REFUSED}",
    "hydra.launcher._target_=os.system": "hydra.launcher._target_='os.system' is not a launcher or sweeper of "
    "Hydra's. Fix: leave it out; hydra/launcher and hydra/sweeper choose one.",
    "+hydra.launcher.x=1": "hydra.launcher.x=1 is not a key of Hydra's basic launcher. "
    "Fix: leave it out, or choose another hydra/launcher.",
    "hydra.searchpath=[pkg://evil]": "hydra.searchpath='pkg://evil' is not a folder of files. "
    "Fix: use --config-dir=<folder>, or 'hydra.searchpath=[file://<folder>]'.",
    "hydra.sweep.dir=/x": "hydra.sweep.dir='/x' is not below output_dir=outputs. "
    "Fix: use hydra.sweep.dir=outputs/multiruns/my_sweep.",
    "hydra.sweeper.params=..": "hydra.sweeper.params='..' is not a mapping of keys to values. "
    "Fix: use '+hydra.sweeper.params={seed:\"1,2\"}'.",
    "hydra.verbose=7": "hydra.verbose=7 is not true, false or a logger's name. Fix: use hydra.verbose=true.",
    "recipes=../../elsewhere/x": "recipes='../../elsewhere/x' leaves the folders that hold the options. "
    "Fix: name an option of the group; --config-dir=<folder> adds options of your own.",
    "size=/etc/x": "size='/etc/x' leaves the folders that hold the options. "
    "Fix: name an option of the group; --config-dir=<folder> adds options of your own.",
    "--experimental-rerun x.pickle": "--experimental-rerun='x.pickle' unpickles a file, which can run any code. "
    "Fix: go on from a checkpoint with resume=<MLflow run id>.",
    "--config-name x": "--config-name='x' cannot be used: conf/config.yaml is where every experiment starts. "
    "Fix: put options of your own below a folder, and name it with --config-dir.",
    "--run -m": "command line='--run --multirun' are several things to do. Fix: leave --multirun out.",
    "-p nope": "--package='nope' says how the configuration is printed, and nothing asks for that. "
    "Fix: add --cfg job, or leave --package out.",
    "-m seed=interval(0,1)": "seed='interval(0,1)' is an interval, and the sweeper runs listed values. "
    "Fix: list the values, as in seed=a,b or seed=range(1,5).",
    "-m model=glob(zz*)": "model='glob(zz*)' makes a sweep of no jobs. Fix: use two values or more, as in seed=1,2.",
    "-m seed=range(0,100000000)": "sweep='seed=range(0,100000000)' makes 100,000,000 jobs, and a sweep has 1,000 at "
    "most. Fix: sweep over fewer values at a time.",
    "size=7": "size=7 is not an option of the group size. "
    "Fix: use one of 175b, 1b, 3b, 70b, 7b, base, published, small, tiny.",
    "recipes=null": "recipes=null is not an option of the group recipes. Fix: leave it out.",
    "kernels=[torch,1]": "kernels=['torch', 1] is not an option of the group kernels. Fix: use one of fused, torch.",
    "+size@_global_=tiny": "size@_global_='tiny' would put a group's option into another place of the tree. "
    "Fix: use size=tiny.",
    "~seed": "seed=null cannot be deleted: every key of an experiment has a value. Fix: leave ~seed out.",
    "~size": "size=null cannot be deleted: it is what an experiment takes one option from. "
    "Fix: use one of 175b, 1b, 3b, 70b, 7b, base, published, small, tiny.",
}


@pytest.fixture(autouse=True, scope="module")
def _schema():
    config.register()


def problems_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_command_line(argv)
    return str(caught.value)


@pytest.mark.parametrize("command_line", MESSAGES)
def test_message(command_line):
    assert problems_of(*command_line.split(" ")) == MESSAGES[command_line]


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
    assert problems_of("--config-dir", "mine", "recipes=evil", f"do={do}").splitlines() == [
        "hydra.callbacks.evil._target_='pandas.read_pickle' is not a launcher or sweeper of Hydra's. "
        "Fix: leave it out; hydra/launcher and hydra/sweeper choose one.",
        "hydra.callbacks.evil.filepath='x' is set by a file, which may set no key of Hydra but hydra.sweeper.params. "
        "Fix: remove it from that file.",
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
    assert f"hydra.{section.split(':')[0]}" in problems_of("-m", "--config-dir=mine", "recipes=evil", "seed=1,2")


def test_a_recipe_that_is_swept_over_is_checked(mine):
    mine("recipes/evil", RECIPE + "hydra: {callbacks: {evil: {_target_: evil.Evil}}}\n")
    assert "hydra.callbacks.evil" in problems_of("-m", "--config-dir=mine", "recipes=scaled_lr,evil")


def test_the_defaults_of_a_recipe_stay_in_the_folders(mine, tmp_path):
    (tmp_path / "elsewhere.yaml").write_text("seed: 7\n", encoding="utf-8")
    for entry in ("../../elsewhere", str(tmp_path / "elsewhere"), "override /size: ../../../elsewhere"):
        mine("recipes/dots", RECIPE + f"defaults:\n  - {entry}\n")
        assert problems_of("--config-dir=mine", "recipes=dots").startswith("recipes='dots' cannot be composed (")


def test_own_folders_are_found(mine):
    mine("cluster/rtx", "defaults: [h100_8, _self_]\ngpu: RTX\n")
    mine("size/micro", "# @package model\nn_layers: 1\n")
    check_command_line(["--config-dir=mine", "cluster=rtx", "size=micro", "do=plan"])
    check_command_line(["hydra.searchpath=[file://mine]", "cluster=rtx", "size=micro", "do=plan"])
    assert problems_of("hydra.searchpath=[file://mine]", "recipes=balance") == (
        "recipes='balance' is not in the folders that are searched, since hydra.searchpath names others. "
        "Fix: use --config-dir=<folder> in place of hydra.searchpath."
    )
    check_command_line(["--config-dir=mine", "size=micro", "recipes=scaled_lr"])
    assert problems_of("--config-dir=mine", "cluster=rtxx").endswith("Fix: use cluster=rtx.")


def test_a_recipe_may_list_the_values_of_a_sweep(mine):
    mine("recipes/seeds", RECIPE + 'hydra: {sweeper: {params: {model.n_heads: "4,5"}}}\n')
    assert problems_of("-m", "--config-dir=mine", "recipes=seeds") == (
        "model.n_kv_heads=2 does not divide model.n_heads=5. Fix: use model.n_kv_heads of 1, 5."
    )


def test_the_project_itself_sets_what_it_sets():
    with compose.hydra_ready():
        assert compose.compose_tree([])[1] == []


def test_a_disk_error_of_a_run_is_put_into_words():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    want = "output_dir='o' cannot be written (No space left on device). Fix: free space on that disk"
    assert str(dispatch.in_words(error, "o")).startswith(want)
    assert dispatch.in_words(KeyError("a defect"), "o") is None
    with compose.hydra_ready():
        assert compose.compose_tree([])[1] == []
