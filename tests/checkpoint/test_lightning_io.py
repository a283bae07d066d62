"""Checkpoint folders: whole or not there, checked by digest, found by name, pruned, and free of pickles."""

from __future__ import annotations

import json
import os

import pytest
import torch

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO, load_weights
from deepseek_exp.checkpoint.tensors import decode, encode
from deepseek_exp.errors import CheckpointError


def state(step: int, val_loss: float | None = None) -> dict:
    shared = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
    return {
        "state_dict": {
            "model.embedding.weight": shared,
            "model.head.weight": shared,
            "model.norm": torch.ones(4).bfloat16(),
        },
        "global_step": step,
        "val_loss": val_loss,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.95)}}, "none": None}],
        "rng": torch.get_rng_state(),
    }


def save(run_dir, step, val_loss=None, run_id="abcdef0123456789"):
    path = run_dir / manifest.FOLDER / manifest.checkpoint_name(step)
    FolderCheckpointIO({"config.yaml": "seed: 1\n"}, run_id).save_checkpoint(state(step, val_loss), path)
    return path


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_state_round_trips(tmp_path):
    path = save(tmp_path, 5, 1.5)
    loaded = FolderCheckpointIO({}, "").load_checkpoint(path)
    want = state(5, 1.5)
    assert_equal(
        {k: loaded[k] for k in want if k not in ("state_dict", "rng")},
        {k: want[k] for k in want if k not in ("state_dict", "rng")},
    )
    assert {k: v.tolist() for k, v in loaded["state_dict"].items()} == {
        k: v.tolist() for k, v in want["state_dict"].items()
    }
    assert set(load_weights(path)) == {"embedding.weight", "head.weight", "norm"}


def test_keys_keep_their_type():
    tree = {0: {"a": (1, [2.5, None, True])}, "0": "text", (1, 2): 3}
    encoded, tensors = encode(tree)
    assert_equal(decode(json.loads(json.dumps(encoded)), tensors), tree)


def test_nothing_is_pickled(tmp_path):
    with pytest.raises(TypeError, match=r"cannot hold object at state\.x"):
        encode({"x": object()})
    path = save(tmp_path, 1)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json", ".yaml"}


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json", "config.yaml"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: os.truncate(p, p.stat().st_size - 1), "is truncated: {} of {} bytes"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
            "is corrupted: its SHA-256 is not",
        ),
    ],
    ids=["missing", "truncated", "corrupted"],
)
def test_damage_is_found(tmp_path, name, damage, words):
    path = save(tmp_path, 3)
    size = (path / name).stat().st_size
    manifest.verify(path)
    damage(path / name)
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(path)
    assert f"({name} {words.format(size - 1, size)}" in str(caught.value)
    assert str(caught.value).startswith(f"resume='{path}' is damaged")


def test_saving_again_replaces(tmp_path):
    first = manifest.read_manifest(save(tmp_path, 3, 2.0))
    second = manifest.read_manifest(save(tmp_path, 3, 1.0))
    assert (first.val_loss, second.val_loss) == (2.0, 1.0)
    assert [p.name for p in (tmp_path / manifest.FOLDER).iterdir()] == ["step-00000003"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 2.5)):
        save(tmp_path, step, loss)
    (tmp_path / manifest.FOLDER / ".step-00000009.77").mkdir()
    manifest.prune(tmp_path, 2)
    left = sorted(p.name for p in (tmp_path / manifest.FOLDER).iterdir())
    assert left == ["step-00000002", "step-00000004", "step-00000005"]


def test_pruning_goes_by_the_time_of_saving(tmp_path):
    """A run that went on from an earlier checkpoint saves lower steps later; those are its newest."""
    for step in (5, 10, 6):
        save(tmp_path, step)
    manifest.prune(tmp_path, 1)
    assert [p.name for p in manifest.list_checkpoints(tmp_path)] == ["step-00000006"]


def test_pruning_goes_by_the_order_of_saving_where_the_clock_was_set_back(tmp_path, monkeypatch):
    for step, clock in ((1, 1000.0), (2, 1001.0), (3, 950.0), (4, 951.0)):
        monkeypatch.setattr(manifest.time, "time", lambda clock=clock: clock)
        save(tmp_path, step)
        manifest.prune(tmp_path, 2)
    assert [p.name for p in manifest.list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    for step, loss in ((1, float("nan")), (2, 2.0), (3, 3.0)):
        save(tmp_path, step, loss)
    manifest.prune(tmp_path, 1)
    assert [p.name for p in manifest.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_checkpoint_outside_of_a_run_has_no_run_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not lie in the folder 'checkpoints' of a run"):
        manifest.run_dir_of(tmp_path / "step-00000001")


class TestLocate:
    def two_runs(self, tmp_path):
        for name, run_id, steps in (("a", "aaaa1111", (1, 2)), ("b", "bbbb2222", (1, 2, 3))):
            for step in steps:
                save(tmp_path / "runs" / name, step, run_id=run_id)
        return tmp_path / "runs"

    def test_last_is_the_newest_of_all_runs(self, tmp_path):
        runs = self.two_runs(tmp_path)
        assert manifest.locate("last", tmp_path) == (runs / "b" / "checkpoints" / "step-00000003", [])

    def test_a_run_id_or_its_beginning(self, tmp_path):
        runs = self.two_runs(tmp_path)
        for name in ("aaaa1111", "aaaa"):
            assert manifest.locate(name, tmp_path)[0] == runs / "a" / "checkpoints" / "step-00000002"

    def test_a_path_of_a_run_or_of_a_checkpoint(self, tmp_path):
        run = self.two_runs(tmp_path) / "b"
        assert manifest.locate(str(run), tmp_path)[0] == run / "checkpoints" / "step-00000003"
        exact = run / "checkpoints" / "step-00000001"
        assert manifest.locate(str(exact), tmp_path)[0] == exact

    def test_jobs_of_a_sweep_are_found(self, tmp_path):
        path = save(tmp_path / "multiruns" / "2026" / "0", 4, run_id="cccc3333")
        assert manifest.locate("cccc3333", tmp_path)[0] == path

    def test_a_damaged_one_is_told_and_passed_over(self, tmp_path):
        run = self.two_runs(tmp_path) / "b"
        newest = run / "checkpoints" / "step-00000003"
        os.truncate(newest / "model.safetensors", 10)
        found, told = manifest.locate("last", tmp_path)
        assert found.name == "step-00000002"
        (sentence,) = told
        assert sentence.startswith(f"{newest} is damaged (model.safetensors is truncated: 10 of")
        assert sentence.endswith("; taking the one before")

    def test_one_that_its_run_removes_meanwhile_gives_way_to_a_newer_one(self, tmp_path, monkeypatch):
        run, verify = self.two_runs(tmp_path) / "b", manifest.verify

        def removed_meanwhile(path):
            if path.name == "step-00000003":
                save(run, 4, run_id="bbbb2222")
                manifest.prune(run, 1)
            return verify(path)

        monkeypatch.setattr(manifest, "verify", removed_meanwhile)
        assert manifest.locate("last", tmp_path) == (run / "checkpoints" / "step-00000004", [])

    def test_one_that_is_saved_again_meanwhile_gives_way_to_its_successor(self, tmp_path, monkeypatch):
        """It was listed under the name that it has while its successor takes its place."""
        run, verify = self.two_runs(tmp_path) / "b", manifest.verify
        place = run / "checkpoints" / "step-00000003"
        moved, halves = place.with_name(f".{place.name}{manifest.REPLACED}"), []

        def removed_half(path, ignore_errors=False):
            (path / "config.yaml").unlink(missing_ok=True)
            halves.append(path)

        def saved_again(path):
            if path == moved and not halves:
                moved.rename(place)
                monkeypatch.setattr(manifest.shutil, "rmtree", removed_half)
                save(run, 3, run_id="bbbb2222")
                monkeypatch.undo()
                monkeypatch.setattr(manifest, "verify", saved_again)
            return verify(path)

        place.rename(moved)
        monkeypatch.setattr(manifest, "verify", saved_again)
        assert manifest.locate("last", tmp_path) == (place, [])
        assert halves

    def test_all_damaged_is_an_error(self, tmp_path):
        run = self.two_runs(tmp_path) / "b"
        for path in (run / "checkpoints").iterdir():
            (path / "state.json").unlink()
        with pytest.raises(CheckpointError, match="has no whole checkpoint in"):
            manifest.locate("last", tmp_path)

    def test_an_exact_path_is_not_replaced_by_another(self, tmp_path):
        exact = self.two_runs(tmp_path) / "b" / "checkpoints" / "step-00000002"
        (exact / "manifest.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no readable manifest\.json"):
            manifest.locate(str(exact), tmp_path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(CheckpointError) as caught:
            manifest.locate("last", tmp_path)
        assert str(caught.value) == (
            f"resume='last' matches no single run with a checkpoint in {tmp_path}. Fix: train first: python run.py."
        )

    def test_unknown_id_lists_the_known(self, tmp_path):
        self.two_runs(tmp_path)
        with pytest.raises(CheckpointError, match=r"Fix: use last, a path, or one of bbbb2222, aaaa1111\."):
            manifest.locate("dddd", tmp_path)
