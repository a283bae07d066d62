"""The files of a checkpoint: trees as JSON, tensors as safetensors. Nothing is pickled, so reading executes no code."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek_exp.checkpoint.manifest import MODEL as MODEL
from deepseek_exp.checkpoint.manifest import OTHER, TREE
from deepseek_exp.errors import CheckpointError, Problem

# The safetensors names of the types in checkpoints.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Errors raised while reading malformed content; PyTorch raises RuntimeError for a wrong shape.
WRONG_CONTENT = (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError)


def encode(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree of dicts, lists, tuples, numbers, texts and tensors into JSON and named tensors.

    Returns:
        A tree for json.dumps, with {"tensor": name} in place of each tensor, and the tensors by name.

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


def decode(node: Any, tensors: Mapping[str, Any]) -> Any:
    """Undo `encode`: replace each reference by the tensor of that name in `tensors`."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {decode(k, tensors): decode(v, tensors) for k, v in content}
    items = [decode(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def write_tensors(
    path: Path, like: Mapping[str, Tensor], metadata: Mapping[str, str], read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Write a safetensors file durably, tensor by tensor, so that only one of them need be in memory.

    Args:
        path: the file.
        like: tensors of the shapes and types to be written, possibly on the meta device.
        metadata: texts for the header.
        read: returns a tensor by its name; called once per tensor, in order.

    Returns:
        The file's entry in the manifest: its bytes and sha256.
    """
    names = sorted(like, key=lambda name: -like[name].itemsize)  # so that each starts at a multiple of its item size
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + like[name].nbytes
        header[name] = {"dtype": NAMES[like[name].dtype], "shape": list(like[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in itertools.chain([len(text).to_bytes(8, "little") + text], (_bytes_of(read(n)) for n in names)):
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def open_tensors(path: Path) -> Any:
    """Open a safetensors file; tensors and slices of them are read on demand.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        damage = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged: {error}"
        raise damaged(path.parent, f"is not whole ({path.name} {damage})") from error


def damaged(folder: Path, rule: str) -> CheckpointError:
    """Return the error for a damaged checkpoint."""
    return CheckpointError(Problem("resume", str(folder), rule, OTHER))


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Convert any error in reading a checkpoint: its files may be intact and yet hold what no version writes.

    Raises:
        CheckpointError: replaces what a parser, a look-up or a copy raised.
    """
    try:
        yield
    except (OSError, SafetensorError, *WRONG_CONTENT) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise damaged(folder, f"holds what this version cannot read ({what})") from error


def read_tree(folder: Path) -> dict[str, Any]:
    """Read state.json, with tensors still as references: key -> encoded value."""
    pairs = json.loads((folder / TREE).read_text(encoding="utf-8"))["dict"]
    return {key: value for key, value in pairs}


def _bytes_of(tensor: Tensor) -> Any:
    row = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))  # (n,); of one element: any stride
    return row.view(torch.uint8).numpy()
