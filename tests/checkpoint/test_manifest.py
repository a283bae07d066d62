"""What a checkpoint says of itself, and what is said of one that no version wrote: one worded error, and no hang."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepseek_exp.checkpoint import manifest, migrations
from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO, in_one_file, load_weights
from deepseek_exp.checkpoint.shards import open_state
from deepseek_exp.errors import CheckpointError
from tests.fuzz.flips import SHAPES, save_sharded, save_single

WEIGHTS = {name: torch.ones(shape) for name, shape in SHAPES.items()}
NESTED = "[" * 100_000
SAVERS = {"single": save_single, "sharded": save_sharded}


@pytest.fixture(params=SAVERS)
def newest(request, tmp_path):
    """Save two checkpoints of a run; the newer one is to be spoilt."""
    for step in (3, 7):
        SAVERS[request.param](tmp_path / "runs" / "run", step, WEIGHTS)
    return tmp_path / "runs" / "run" / manifest.FOLDER / manifest.checkpoint_name(7)


def edit(folder: Path, **changes) -> None:
    """Change the manifest and renew its digest; a value of ... removes the key."""
    fields = json.loads((folder / manifest.MANIFEST).read_text())
    fields = {key: value for key, value in {**fields, **changes}.items() if value is not ... and key != "sha256"}
    (folder / manifest.MANIFEST).write_text(migrations.with_digest(fields))


def renew(folder: Path) -> None:
    """Make the manifest agree with the files as they are."""
    edit(folder, files={p.name: manifest._digest(p) for p in folder.iterdir() if p.name != manifest.MANIFEST})
    manifest.verify(folder)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[]", "null", "7", NESTED, '{"a":' * 50_000, "\udcff", '{"step": 1e999}', '{"format": 2}'),
        *(pipe, folder, loop, Path.unlink, lambda path: os.truncate(path, 200)),
    ],
)
def test_a_manifest_that_is_none_is_passed_over(newest, content):
    path = newest / manifest.MANIFEST
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(newest)
    assert manifest.MANIFEST in str(caught.value) and "name another checkpoint" in str(caught.value)
    found, (sentence,) = manifest.locate("last", newest.parents[3])
    assert found.name == "step-00000003" and sentence.endswith("; taking the one before")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"step": ...}, "it has no 'step'"),
        ({"files": ...}, "it has no 'files'"),
        ({"bytfs": 1}, "it has 'bytfs', which no version writes"),
        ({"step": "7"}, "its 'step' is not what"),
        ({"step": True}, "its 'step' is not what"),
        ({"step": -1}, "its 'step' is not what"),
        ({"run_id": 5}, "its 'run_id' is not what"),
        ({"saved_at": "x"}, "its 'saved_at' is not what"),
        ({"val_loss": "low"}, "its 'val_loss' is not what"),
        ({"finite": 1}, "its 'finite' is not what"),
        ({"files": [1]}, "its 'files' is not what"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0"}}}, "its 'files' is not what"),
        ({"files": {"x": {"bytes": 1}}}, "its 'files' is not what"),
        ({"files": {}}, "state.safetensors is missing"),
        ({"format": "2"}, "its 'format' is not what"),
        ({"format": True}, "its 'format' is not what"),
        ({"minor": -1}, "its 'format' is not what"),
        ({"inputs": {"start": 7}}, "its 'inputs' is not what"),
        ({"contract": {"tokenizer": "0"}}, "its 'contract' is not what"),
        ({"coverage": 1.5}, "its 'coverage' is not what"),
        ({"stage_key": 7}, "its 'stage_key' is not what"),
    ],
    ids=str,
)
def test_what_no_version_writes_is_named(newest, changes, rule):
    edit(newest, **changes)
    with pytest.raises(CheckpointError, match=rf"^resume='{newest}' is damaged \(.*{rule}"):
        manifest.verify(newest)


def test_a_changed_step_or_run_is_found_by_the_digest(newest):
    path = newest / manifest.MANIFEST
    for old, new in (
        ('"step": 7', '"step": 8'),
        ("0123456789abcdef", "0123456789abcdee"),
        ('"val_loss": 8', '"val_loss": 9'),
    ):
        whole = path.read_text()
        assert whole.count(old) == 1
        path.write_text(whole.replace(old, new))
        with pytest.raises(CheckpointError, match=r"manifest\.json is corrupted: its SHA-256 is not the one"):
            manifest.read_manifest(newest)
        path.write_text(whole)
        manifest.read_manifest(newest)


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "data.json", "shard-00009.safetensors"])
def test_a_file_that_is_read_has_to_be_named(newest, name):
    files = manifest.read_manifest(newest).files
    files.pop(name, None)
    (newest / name).touch()
    edit(newest, files=files)
    with pytest.raises(CheckpointError, match=rf"\({name} is not named in manifest\.json\)"):
        manifest.verify(newest)


def test_a_note_of_the_user_beside_the_files_is_let_be(newest):
    (newest / "notes.txt").write_text("the good one")
    manifest.verify(newest)


def tree_is(text):
    return lambda path: (path / manifest.TREE).write_text(text)


def tree_without(key):
    def spoil(path):
        pairs = json.loads((path / manifest.TREE).read_text())["dict"]
        (path / manifest.TREE).write_text(json.dumps({"dict": [p for p in pairs if p[0] != key]}))

    return spoil


def tensors_are(name_in, change):
    """Change the tensors or the header of the files whose names begin so; one that is not there is left."""

    def spoil(path):
        for file in path.glob(f"{name_in}*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata()
            tensors, header = change(load_file(file), dict(header or {}))
            save_file(tensors, file, header or None)

    return spoil


SPOILT = {
    "no tree": tree_is("[]"),
    "an empty tree": tree_is("{}"),
    "no JSON": tree_is("{"),
    "nested": tree_is(NESTED),
    "pairs of one": tree_is('{"dict": [["epoch"]]}'),
    "pairs of pairs": tree_is('{"dict": 7}'),
    "no tensor of this name": tree_is('{"dict": [["x", {"tensor": "y"}]]}'),
    "two kinds": tree_is('{"dict": [["x", {"tensor": "y", "list": []}]]}'),
    "no optimizer": lambda path: (tree_without("optimizer_states")(path), tree_without("sharded")(path)),
    "no state": tensors_are("state", lambda tensors, header: ({"x": torch.ones(1)}, header)),
    "no header": lambda path: (
        tensors_are("model", lambda t, h: (t, {}))(path),
        tensors_are("shard", lambda t, h: (t, {}))(path),
    ),
    "a header of lists": lambda path: (
        tensors_are("model", lambda t, h: (t, {"aliases": "[1]"}))(path),
        tensors_are("shard", lambda t, h: (t, {"pieces": "[1]"}))(path),
    ),
    "a weight less": lambda path: (
        tensors_are("model", lambda t, h: (dict(list(t.items())[1:]), h))(path),
        tensors_are("shard", lambda t, h: (dict(list(t.items())[1:]), h))(path),
    ),
    "no weights": lambda path: [p.unlink() for p in path.glob("[ms][oh]*.safetensors")],
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_readers_word_what_is_consistent_and_wrong(newest, tmp_path, spoil):
    spoil(newest)
    if any(newest.glob("[ms][oh]*.safetensors")):
        renew(newest)
    raised = 0
    for read in (
        lambda: [open_state(newest).read(name, "weight") for name in SHAPES],
        lambda: load_weights(newest),
        lambda: FolderCheckpointIO({}, "").load_checkpoint(newest),
        lambda: in_one_file(newest, tmp_path / "export").__enter__(),
    ):
        try:
            read()
        except CheckpointError as error:
            raised += 1
            assert str(newest) in str(error) and "Fix: " in str(error)
    assert raised


def test_any_run_id_of_a_run_finds_its_folder(tmp_path):
    run_dir = tmp_path / "runs" / "run"
    for step in (3, 7):
        save_single(run_dir, step, WEIGHTS)
    edit(run_dir / manifest.FOLDER / manifest.checkpoint_name(3), run_id="fedcba9876543210")
    for run_id in ("fedcba98", "01234567"):
        assert manifest.locate(run_id, tmp_path)[0].name == "step-00000007"


@pytest.mark.parametrize("resume", ["x" * 300, "a/" * 3000, "step-\0", "run\0", "x" * 5000 + "/step-1"], ids=range(5))
def test_a_name_that_can_be_no_path_is_worded(tmp_path, resume):
    save_single(tmp_path / "runs" / "run", 3, WEIGHTS)
    with pytest.raises(CheckpointError, match=r"(cannot be read|matches no single run|has no readable)"):
        manifest.locate(resume, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step-00000003"])
def test_a_folder_that_one_may_not_read_is_worded(tmp_path, part):
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    run_dir = tmp_path / "runs" / "run"
    save_single(run_dir, 3, WEIGHTS)
    (run_dir / part).chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied|has no readable manifest|no whole checkpoint"):
            manifest.locate(str(run_dir), tmp_path)
    finally:
        os.seteuid(0)


def test_the_newest_that_was_found_finite_stays(tmp_path):
    for step in (1, 3, 7):
        save_single(tmp_path, step, WEIGHTS)
    first, *later = manifest.list_checkpoints(tmp_path)
    edit(first, finite=True, val_loss=None)
    for path in later:
        edit(path, val_loss=None)
    manifest.prune(tmp_path, 1)
    assert manifest.list_checkpoints(tmp_path) == [first, later[-1]]
