"""Save and load the state of a run as plain files: safetensors for tensors, JSON for the rest.

Nothing is pickled, so loading runs no code of the file's. Layout of a checkpoint folder:
    model.safetensors   the model's parameters under their own names
    state.safetensors   every other tensor (optimizer, random number generators)
    state.json          the rest of the tree, with a reference where a tensor stood
    manifest.json       see manifest.py
and the texts handed over by the run (config.yaml, tokenizer.json).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_exp.parallel import manifest

MODEL, STATE, TREE = "model.safetensors", "state.safetensors", "state.json"
PREFIX = "model."


class FolderCheckpointIO(CheckpointIO):
    """Lightning's door to checkpoint folders."""

    def __init__(self, texts: Mapping[str, str], run_id: str) -> None:
        """Remember what goes into every checkpoint beside Lightning's own state.

        Args:
            texts: file name -> content, such as the resolved configuration.
            run_id: the MLflow run that the checkpoints belong to.
        """
        self.texts, self.run_id = dict(texts), run_id

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the folder `path` so that it is either whole or not there."""
        target = Path(path)
        folder = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rest = {k: v for k, v in checkpoint.items() if k != "state_dict"}
        weights = {k.removeprefix(PREFIX): v for k, v in checkpoint["state_dict"].items()}
        unique, aliases = _without_aliases(weights)
        tree, tensors = encode(rest)
        save_file(unique, folder / MODEL, metadata={"aliases": json.dumps(aliases)})
        save_file(tensors, folder / STATE)
        (folder / TREE).write_text(json.dumps(tree))
        for name, text in self.texts.items():
            (folder / name).write_text(text)
        val_loss = rest.get("val_loss")
        manifest.seal(folder, target, step=rest["global_step"], run_id=self.run_id, val_loss=val_loss)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder back into the tree that was saved; its digests are checked by `manifest.locate` before."""
        folder = Path(path)
        tree = decode(json.loads((folder / TREE).read_text()), load_file(folder / STATE))
        return {**tree, "state_dict": {PREFIX + k: v for k, v in load_weights(folder).items()}}

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint folder."""
        shutil.rmtree(path, ignore_errors=True)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the model's parameters of a checkpoint, tied ones under each of their names."""
    with safe_open(folder / MODEL, framework="pt") as file:
        aliases = json.loads(file.metadata()["aliases"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return weights | {alias: weights[name] for alias, name in aliases.items()}


def encode(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree of dicts, lists, tuples, numbers, texts and tensors into JSON and named tensors.

    Returns:
        What json.dumps takes, with {"tensor": name} where a tensor stood, and the tensors by name.

    Raises:
        TypeError: the tree holds something else; nothing is pickled.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node.detach().contiguous().clone()
            return {"tensor": path}
        if isinstance(node, Mapping):
            return {"dict": [[walk(k, f"{path}.key"), walk(v, f"{path}.{k}")] for k, v in node.items()]}
        if isinstance(node, (list, tuple)):
            return {type(node).__name__: [walk(v, f"{path}.{i}") for i, v in enumerate(node)]}
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"a checkpoint cannot hold {type(node).__name__} at {path}")

    return walk(tree, "state"), tensors


def decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `encode`."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {decode(k, tensors): decode(v, tensors) for k, v in content}
    items = [decode(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def rng_state() -> dict[str, Any]:
    """Give the state of PyTorch's random number generators, that of the CPU and of the GPU in use."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": gpu}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put PyTorch's random number generators where `rng_state` found them."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _without_aliases(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keep one name for each storage: safetensors stores tied parameters once."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in weights.items():
        owner = first.setdefault(tensor.data_ptr(), name)
        if owner != name:
            aliases[name] = owner
    return {k: v.detach().contiguous() for k, v in weights.items() if k not in aliases}, aliases
