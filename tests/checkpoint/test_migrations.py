"""Checkpoints of every format are read: stored ones through the chain of migrations, newer ones by their version.

`tests/golden/formats` has what two matrices were saved as in format 1 and in 3.0; `tests/golden/checkpoint_0_1`, of
format 2, was saved by version 0.1.0.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deepseek_exp.checkpoint import manifest, migrations
from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO, load_weights
from deepseek_exp.checkpoint.manifest import Contract, Lineage
from deepseek_exp.errors import CheckpointError
from tests.fuzz.flips import SHAPES
from tests.golden.curves import HERE

FORMATS = {
    "1": HERE / "formats" / "1" / "step-00000003",
    "2": HERE / "checkpoint_0_1" / "step-00000002",
    "3.0": HERE / "formats" / "3.0" / "step-00000003",
}
NEW = {"inputs": {}, "contract": None, "kind": "full", "coverage": 1.0, "stage_key": None, "format": 3, "minor": 1}


def fields_of(folder: Path) -> dict:
    return json.loads((folder / manifest.MANIFEST).read_text())


@pytest.fixture
def saved(tmp_path):
    """Save a checkpoint of today's format with all that a manifest can say."""
    weights = {f"model.{name}": torch.ones(shape) for name, shape in SHAPES.items()}
    lineage = Lineage({"start": "ab" * 32}, Contract("cd" * 32, None, 16), stage_key="ef" * 32)
    io = FolderCheckpointIO({}, "0123456789abcdef", lineage)
    io.save_checkpoint({"state_dict": weights, "global_step": 7}, tmp_path / "run" / manifest.FOLDER / "step-00000007")
    return tmp_path / "run" / manifest.FOLDER / "step-00000007"


@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_checkpoint_is_read_in_todays_form(name):
    before, found = fields_of(FORMATS[name]), manifest.verify(FORMATS[name])
    kept = {key: value for key, value in before.items() if key not in ("format", "sha256", "finite")}
    fields = migrations.read_fields((FORMATS[name] / manifest.MANIFEST).read_text())
    assert fields == {**kept, "finite": None, **NEW}
    assert (found.step, found.lineage, found.finite) == (before["step"], Lineage(), None)


@pytest.mark.parametrize("name", ["1", "3.0"])
def test_its_state_is_loaded(name):
    assert {n: tuple(w.shape) for n, w in load_weights(FORMATS[name]).items()} == SHAPES
    tree = FolderCheckpointIO({}, "").load_checkpoint(FORMATS[name])
    assert tree["global_step"] == 3 and tree["optimizer_states"][0]["state"][0]["step"] == 7


def test_each_migration_does_one_step():
    steps = [{"run_id": "a"}]
    for version in ((1, 0), (2, 0), (3, 0)):
        steps.append(migrations.MIGRATIONS[version](steps[-1]))
    assert [(s.get("format", 1), s.get("minor", 0)) for s in steps] == [(1, 0), (2, 0), (3, 0), (3, 1)]
    assert steps[-1] == {"run_id": "a", "finite": None, **NEW}


def test_old_ones_are_found_and_pruned_as_new_ones(tmp_path):
    for name, step in (("1", 3), ("2", 2)):
        folder = tmp_path / "runs" / "run" / manifest.FOLDER / manifest.checkpoint_name(step)
        shutil.copytree(FORMATS[name], folder)
    found, passed_over = manifest.locate("last", tmp_path)
    assert (found.name, passed_over) == ("step-00000003", [])
    manifest.prune(tmp_path / "runs" / "run", 1)
    assert len(manifest.list_checkpoints(tmp_path / "runs" / "run")) == 1  # the newest is also the best


def test_what_a_manifest_says_is_read_back(saved):
    found = manifest.verify(saved)
    assert found.lineage == Lineage({"start": "ab" * 32}, Contract("cd" * 32, None, 16), stage_key="ef" * 32)
    assert manifest.Manifest.of_text(found.text()) == found
    assert (saved / manifest.MANIFEST).read_text() == found.text()


def test_a_checkpoint_is_named_by_its_manifest(saved):
    before = manifest.digest(saved)
    (saved / manifest.MANIFEST).write_text(migrations.with_digest({**without_digest(saved), "step": 8}))
    assert manifest.digest(saved) != before


def without_digest(folder: Path) -> dict:
    return {key: value for key, value in fields_of(folder).items() if key != "sha256"}


def test_a_newer_minor_version_is_read_without_what_it_adds(saved):
    newer = {**without_digest(saved), "minor": 7, "beam": {"width": 3}}
    (saved / manifest.MANIFEST).write_text(migrations.with_digest(newer))
    assert manifest.verify(saved).step == 7
    changed = migrations.with_digest(newer).replace('"width": 3', '"width": 4')
    (saved / manifest.MANIFEST).write_text(changed)
    with pytest.raises(CheckpointError, match=r"its SHA-256 is not the one recorded in it"):
        manifest.verify(saved)


def test_a_newer_major_version_is_refused(saved):
    (saved / manifest.MANIFEST).write_text(json.dumps({"format": 4, "minor": 2}))
    with pytest.raises(CheckpointError, match=r"has format 4\.2, and this version reads 3\.1\. Fix: use the version"):
        manifest.verify(saved)


def test_weights_of_an_unknown_kind_are_refused(saved):
    (saved / manifest.MANIFEST).write_text(migrations.with_digest({**without_digest(saved), "kind": "folded"}))
    with pytest.raises(CheckpointError, match=r"is of kind 'folded', and this version reads full\. Fix: use"):
        manifest.verify(saved)
