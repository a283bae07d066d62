"""Shards that are damaged, incomplete, or saved by processes that are killed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO, begin
from deepseek_exp.checkpoint.shards import Cut, Piece, open_state, save_shard, shard_name
from deepseek_exp.errors import CheckpointError
from tests.checkpoint.test_shards import CHECKPOINT, WHOLE, Layout, pieces_of, place, save


class TestDamage:
    def checkpoint(self, tmp_path):
        parameters = {"w": ({"weight": torch.randn(8, 4)}, (None, 0))}
        return save(place(tmp_path), pieces_of(parameters, Layout(1, 1, 1, 4), random.Random(0)))

    def test_a_missing_shard_is_named(self, tmp_path):
        path = self.checkpoint(tmp_path)
        (path / shard_name(2)).unlink()
        with pytest.raises(CheckpointError, match=r"is not whole \(shard-00002.safetensors is missing\)"):
            open_state(path)
        with pytest.raises(CheckpointError, match=r"shard-00002.safetensors is missing"):
            manifest.verify(path)

    @pytest.mark.parametrize("left", [-1, 20, 0])
    def test_a_truncated_shard_is_named(self, tmp_path, left):
        path = self.checkpoint(tmp_path)
        file = path / shard_name(1)
        os.truncate(file, left if left >= 0 else file.stat().st_size + left)
        with pytest.raises(CheckpointError, match=r"is not whole \(shard-00001.safetensors is damaged: "):
            open_state(path)
        with pytest.raises(CheckpointError, match=r"shard-00001.safetensors is truncated"):
            manifest.verify(path)

    def test_a_changed_shard_is_found(self, tmp_path):
        path = self.checkpoint(tmp_path)
        file = path / shard_name(1)
        file.write_bytes(file.read_bytes()[:-1] + b"\x99")
        with pytest.raises(CheckpointError, match=r"shard-00001.safetensors is corrupted"):
            manifest.verify(path)

    def piece(self, index, start, values, ways=2, name="w"):
        return Piece(name, (4, 3), (Cut(0, ways, index),), start, values)

    @pytest.mark.parametrize(
        ("held", "words"),
        [
            ([(0, 0, 6), (1, 0, 5)], "lacks a part of w"),
            ([(0, 0, 6), (1, 1, 6)], "lacks a part of w"),
            ([(0, 0, 2), (0, 3, 6), (1, 0, 6)], "lacks a part of w"),
            ([(0, 0, 6)], "lacks a part of w"),
            ([(0, 0, 6), (0, 0, 6)], "lacks a part of w"),
            ([(0, 0, 4), (0, 3, 6), (1, 0, 6)], "has twice a part of w"),
            ([(0, 0, 6), (1, 0, 6), (1, 0, 6)], "has twice a part of w"),
            ([], "lacks w"),
        ],
    )
    def test_gaps_and_overlaps(self, tmp_path, held, words):
        pieces = [self.piece(i, start, {"weight": torch.ones(stop - start)}) for i, start, stop in held]
        whole = dataclasses.replace(WHOLE, param_groups=[{"param_names": ["w"]}])
        with pytest.raises(CheckpointError, match=rf"^resume='.*' {words}\. Fix: "):
            open_state(save(place(tmp_path), {0: pieces}, whole))

    @pytest.mark.parametrize(
        "other", [{"weight": torch.ones(6).bfloat16()}, {"weight": torch.ones(6), "exp_avg": torch.ones(6)}]
    )
    def test_pieces_that_do_not_belong_together(self, tmp_path, other):
        pieces = [self.piece(0, 0, {"weight": torch.ones(6)}), self.piece(1, 0, other)]
        with pytest.raises(CheckpointError, match="has pieces that do not belong together of w"):
            open_state(save(place(tmp_path), {0: pieces}))

    def test_pieces_of_two_layouts(self, tmp_path):
        pieces = [self.piece(0, 0, {"weight": torch.ones(6)}), self.piece(2, 0, {"weight": torch.ones(3)}, ways=4)]
        with pytest.raises(CheckpointError, match="has pieces that do not belong together of w"):
            open_state(save(place(tmp_path), {0: pieces}))

    def test_values_of_different_lengths_are_refused(self, tmp_path):
        values = {"weight": torch.ones(6), "exp_avg": torch.ones(5)}
        with pytest.raises(ValueError, match="too many values"):
            save_shard(tmp_path, 0, [Piece("w", (6,), (), 0, values)], {})


class TestSaving:
    def pieces(self, value, n_ranks):
        return {r: [Piece("w", (n_ranks,), (), r, {"weight": torch.full((1,), value)})] for r in range(n_ranks)}

    def test_shards_of_another_save_are_not_mixed_in(self, tmp_path):
        target = place(tmp_path)
        for rank, pieces in self.pieces(1.0, 4).items():  # killed before the end
            save_shard(begin(target) if rank == 0 else target.with_name(f".{target.name}.part"), rank, pieces, {})
        path = save(target, self.pieces(2.0, 2))
        assert sorted(p.name for p in path.glob("shard-*")) == [shard_name(0), shard_name(1)]
        assert open_state(path).read("w", "weight").tolist() == [2.0, 2.0]

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_folder_with_other_shards_than_told_is_refused(self, tmp_path, lost):
        folder, records = begin(place(tmp_path)), {}
        for rank, pieces in self.pieces(1.0, 2).items():
            records |= save_shard(folder, rank, pieces, {})
        del records[shard_name(lost)]
        with pytest.raises(ValueError, match="and the ranks wrote"):
            FolderCheckpointIO({}, "abcdef").finish(folder, place(tmp_path), CHECKPOINT, WHOLE, records)
        assert not place(tmp_path).exists()

    def test_digests_of_the_ranks_are_taken_over(self, tmp_path, monkeypatch):
        digested = []
        monkeypatch.setattr(manifest, "_sha256", lambda path: digested.append(path.name) or "")
        save(place(tmp_path), self.pieces(1.0, 2))
        assert digested == ["state.json", "state.safetensors"]

    def test_killed_between_two_names(self, tmp_path):
        save(place(tmp_path, 6), self.pieces(1.0, 2), checkpoint={**CHECKPOINT, "global_step": 6})
        path = save(place(tmp_path), self.pieces(2.0, 2))
        moved = path.rename(path.with_name(f".{path.name}.replaced"))
        assert manifest.locate(str(tmp_path), tmp_path) == (moved, [])
        manifest.prune(tmp_path, 1)
        assert manifest.locate(str(tmp_path), tmp_path) == (moved, [])
        save(place(tmp_path), self.pieces(3.0, 2))
        assert manifest.list_checkpoints(tmp_path) == [place(tmp_path)] and not moved.exists()

    def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(self, tmp_path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        rng, reached = random.Random(0), 0
        for _ in range(6):
            ready = context.Event()
            process = context.Process(target=save_forever, args=(tmp_path, reached + 1, ready))
            process.start()
            assert ready.wait(60)
            time.sleep(rng.random() * 0.3)
            process.kill()
            process.join()
            path, passed_over = manifest.locate(str(tmp_path), tmp_path)
            assert passed_over == []
            state = open_state(path)
            assert set(state.read("w", "weight").tolist()) == {float(state.rest["global_step"])}
            assert state.rest["global_step"] > reached
            reached = state.rest["global_step"]


def save_forever(run_dir: Path, step: int, ready) -> None:
    """Save step after step, each twice, from changing numbers of ranks; `ready` once the first is there."""
    while True:
        for _ in range(2):
            save(
                place(run_dir, step), TestSaving().pieces(float(step), 1 + step % 4), WHOLE, None, {"global_step": step}
            )
            ready.set()
        manifest.prune(run_dir, 1)
        step += 1
