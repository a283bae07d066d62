"""Save and load the state of a run as plain files: safetensors for tensors, JSON for the rest.

Nothing is pickled, so loading executes no code from the file. Layout of a checkpoint folder:
    model.safetensors   the model's parameters under their own names
    state.safetensors   every other tensor (optimizer, random number generators)
    state.json          the rest of the tree, with a reference in place of each tensor
    manifest.json       see manifest.py
and the texts of the run (config.yaml, tokenizer.json). If many ranks save, the model and its optimizer are in
shard-00000.safetensors and so on, one per rank; see shards.py. They save in this order:
    rank 0              folder = begin(target), and sends it to the others
    every rank          save_shard(folder, ...); the results are gathered on rank 0
    rank 0              FolderCheckpointIO.finish(folder, target, ...)
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.manifest import MODEL, STATE, TREE, Lineage
from deepseek_exp.checkpoint.shards import SHARDED, WEIGHT, State, Whole, averaged, open_state, shard_name
from deepseek_exp.checkpoint.tensors import NAMES, decode, encode, read_tree, readable, write_tensors

PREFIX = "model."


class FolderCheckpointIO(CheckpointIO):
    """Lightning's interface to checkpoint folders."""

    def __init__(self, texts: Mapping[str, str], run_id: str, lineage: Lineage | None = None) -> None:
        """Store what goes into every checkpoint in addition to Lightning's own state.

        Args:
            texts: file name -> content, such as the resolved configuration.
            run_id: the MLflow run that the checkpoints belong to.
            lineage: where they come from; None if nothing is known.
        """
        self.texts, self.run_id, self.lineage = dict(texts), run_id, lineage

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the folder `path` atomically."""
        folder = begin(Path(path))
        rest = {k: v for k, v in checkpoint.items() if k != "state_dict"}
        weights = {k.removeprefix(PREFIX): v for k, v in checkpoint["state_dict"].items()}
        unique, aliases = _without_aliases(weights)
        save_file(unique, folder / MODEL, metadata={"aliases": json.dumps(aliases)})
        self._finish(folder, Path(path), rest, {})

    def finish(
        self,
        folder: Path,
        target: Path,
        checkpoint: Mapping[str, Any],
        whole: Whole,
        shards: Mapping[str, dict[str, Any]],
    ) -> None:
        """Complete the folder that all ranks have written their shards to, and move it to its place.

        Args:
            folder: from `begin`.
            target: the final path of the checkpoint.
            checkpoint: Lightning's; its `state_dict` and `optimizer_states` are in the shards.
            whole: metadata common to all shards.
            shards: the results of `save_shard` on all ranks, merged.

        Raises:
            ValueError: the folder does not hold these shards.
        """
        there = sorted(path.name for path in folder.iterdir())
        if there != [shard_name(rank) for rank in range(len(shards))]:
            raise ValueError(f"{folder} holds {there}, and the ranks wrote {sorted(shards)}")
        rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        said = {**dataclasses.asdict(whole), "dtype": NAMES[whole.dtype], "n_shards": len(shards)}
        self._finish(folder, target, {**rest, SHARDED: said}, shards)

    def _finish(
        self, folder: Path, target: Path, rest: Mapping[str, Any], digests: Mapping[str, dict[str, Any]]
    ) -> None:
        tree, tensors = encode(rest)
        save_file(tensors, folder / STATE)
        (folder / TREE).write_text(json.dumps(tree), encoding="utf-8")
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        step, val_loss = rest["global_step"], rest.get("val_loss")
        said = {"val_loss": val_loss, "finite": rest.get("finite"), "lineage": self.lineage}
        manifest.seal(folder, target, step=step, run_id=self.run_id, digests=digests, **said)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder back into the tree that one process saves; `manifest.locate` checks its digests first."""
        folder = Path(path)
        if not (folder / MODEL).is_file():
            return _of_one_process(open_state(folder))
        with readable(folder):
            tensors = load_file(folder / STATE)
            tree = {key: decode(value, tensors) for key, value in read_tree(folder).items()}
        return {**tree, "state_dict": {PREFIX + k: v for k, v in load_weights(folder).items()}}

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint folder."""
        shutil.rmtree(path, ignore_errors=True)


def begin(target: Path) -> Path:
    """Create the empty folder that the checkpoint `target` is written to until it is complete."""
    folder = part_folder(target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def remove_unfinished(target: Path) -> None:
    """Remove an incomplete checkpoint `target`."""
    shutil.rmtree(part_folder(target), ignore_errors=True)


def part_folder(target: Path) -> Path:
    """Return the folder that the checkpoint `target` is written to until it is complete."""
    return target.with_name(f".{target.name}.part")


def load_weights(folder: Path, *, use_ema: bool = False) -> dict[str, Tensor]:
    """Read the model's parameters and buffers of a checkpoint, tied ones under each of their names.

    Args:
        folder: the checkpoint.
        use_ema: read the moving average of the parameters instead.

    Raises:
        CheckpointError: it holds no moving average.
    """
    if use_ema:
        return _weights(averaged(open_state(folder)))
    if not (folder / MODEL).is_file():
        return _weights(open_state(folder))
    with readable(folder), safe_open(folder / MODEL, framework="pt") as file:
        aliases = json.loads(file.metadata()["aliases"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return weights | {alias: weights[name] for alias, name in aliases.items()}


@contextmanager
def in_one_file(checkpoint: Path, target: Path, *, use_ema: bool = False) -> Iterator[Path]:
    """Yield a checkpoint whose weights are in one model.safetensors; it exists only inside the context.

    Args:
        checkpoint: of any layout; a checkpoint of one process is yielded unchanged.
        target: a temporary folder next to this path holds the merged shards.
        use_ema: take the moving average of the weights instead.
    """
    if (checkpoint / MODEL).is_file() and not use_ema:
        yield checkpoint
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.merged.", dir=target.parent) as name:
        state = averaged(open_state(checkpoint)) if use_ema else open_state(checkpoint)
        like = {n: torch.empty(state.shape(n), dtype=state.dtype, device="meta") for n in state.names}
        like |= {n: state.buffer(n) for n in state.buffers}
        write_tensors(Path(name) / MODEL, like, {"aliases": json.dumps(state.aliases)}, state.whole)
        for path in checkpoint.iterdir():
            if path.name not in (MODEL, STATE, TREE, manifest.MANIFEST) and not path.name.startswith("shard-"):
                shutil.copy(path, name)
        yield Path(name)


def _weights(state: State) -> dict[str, Tensor]:
    weights = {name: state.whole(name) for name in [*state.names, *state.buffers]}
    return weights | {alias: weights[name] for alias, name in state.aliases.items()}


def _of_one_process(state: State) -> dict[str, Any]:
    """Return what one process would have saved: Lightning's tree with the state of build_optimizer's optimizer."""
    names = [name for group in state.param_groups for name in group["param_names"]]
    index, groups, states = {name: i for i, name in enumerate(names)}, [], {}
    for group in state.param_groups:
        groups.append({**group, "params": [index[name] for name in group["param_names"]]})
    for i, name in enumerate(names):
        moments = {kind: state.read(name, kind) for kind in state.kinds(name) if kind != WEIGHT}
        if moments:
            states[i] = {kind: torch.tensor(value) for kind, value in state.scalars.items()} | moments
    optimizer: dict[str, Any] = {"state": states, "param_groups": groups}
    if state.dtype is torch.bfloat16:
        optimizer = {"inner": optimizer, "masters": [state.read(name, WEIGHT) for name in names]}
    weights = {PREFIX + name: tensor for name, tensor in _weights(state).items()}
    return {**state.rest, "state_dict": weights, "optimizer_states": [optimizer]}


def _without_aliases(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep one name per storage: safetensors stores tied parameters once."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in weights.items():
        owner = first.setdefault(tensor.data_ptr(), name)
        if owner != name:
            aliases[name] = owner
    return {k: v.detach().contiguous() for k, v in weights.items() if k not in aliases}, aliases
