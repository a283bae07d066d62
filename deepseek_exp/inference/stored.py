"""Read stored weights tensor by tensor, from a domain pack or from a checkpoint saved by any layout."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from deepseek_exp.adapt.lora import A, B, low_rank_sum
from deepseek_exp.adapt.stored import is_adapter, saved_scale
from deepseek_exp.checkpoint.shards import WEIGHT, Cut, State, open_state
from deepseek_exp.checkpoint.tensors import MODEL, open_tensors


class StoredWeights(Protocol):
    """Weights by name, of which parts can be read separately.

    Attributes:
        names: names of the tensors; tied ones occur once.
        aliases: other name of a tied parameter -> the name that it is stored under.
    """

    names: Collection[str]
    aliases: Mapping[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""

    def read(self, name: str, ways: int = 1, index: int = 0) -> Tensor:
        """Return part `index` of `ways` equal parts of a tensor's first dimension, on the CPU."""


class OneFile:
    """A safetensors file: a domain pack, or the model of a checkpoint that one process saved."""

    def __init__(self, file: Any, aliases: Mapping[str, str]) -> None:
        """Use an open file."""
        self.file, self.aliases = file, aliases
        self.names: Collection[str] = set(file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self.file.get_slice(name).get_shape())

    def read(self, name: str, ways: int = 1, index: int = 0) -> Tensor:
        """Read one of `ways` equal parts."""
        stack = self.file.get_slice(name)
        if ways == 1:
            whole: Tensor = stack[...]
            return whole
        n = stack.get_shape()[0] // ways
        part: Tensor = stack[index * n : (index + 1) * n]
        return part


class Shards:
    """A checkpoint saved by several ranks."""

    def __init__(self, state: State) -> None:
        """Use an open checkpoint."""
        self.state, self.aliases = state, state.aliases
        self.buffers = frozenset(state.buffers)
        self.names: Collection[str] = {*state.names, *self.buffers}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self.state.buffer(name).shape) if name in self.buffers else self.state.shape(name)

    def read(self, name: str, ways: int = 1, index: int = 0) -> Tensor:
        """Read one of `ways` equal parts, in the type that the model computes with."""
        if name in self.buffers:
            whole = self.state.buffer(name)
            return whole if ways == 1 else whole.chunk(ways)[index]
        cuts = [Cut(0, ways, index)] if ways > 1 else []
        return self.state.read(name, WEIGHT, cuts).to(self.state.dtype)


class WithAdapters:
    """A checkpoint of a run with adapters, which are added to the weights as they are read."""

    def __init__(self, stored: StoredWeights, scale: float) -> None:
        """Use an open checkpoint; `scale` is alpha / rank."""
        self.stored, self.scale = stored, scale
        self.names: Collection[str] = {name for name in stored.names if not is_adapter(name)}
        self.aliases = {alias: name for alias, name in stored.aliases.items() if not is_adapter(alias)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self.stored.shape(name)

    def read(self, name: str, ways: int = 1, index: int = 0) -> Tensor:
        """Read one of `ways` equal parts."""
        w = self.stored.read(name, ways, index)
        if f"{name}.{A}" not in self.stored.names:
            return w
        part = (ways, index) if w.ndim == 3 else (1, 0)  # of a matrix, a part of its rows needs all of A
        a, b = self.stored.read(f"{name}.{A}", *part), self.stored.read(f"{name}.{B}", ways, index)
        return low_rank_sum(w, a, b, self.scale)


def open_weights(checkpoint: Path) -> StoredWeights:
    """Open the weights of a checkpoint folder saved by any layout, reading only the headers of its tensors.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if not (checkpoint / MODEL).is_file():
        stored: StoredWeights = Shards(open_state(checkpoint))
    else:
        file = open_tensors(checkpoint / MODEL)
        stored = OneFile(file, json.loads((file.metadata() or {}).get("aliases", "{}")))
    scale = saved_scale(checkpoint)
    return WithAdapters(stored, scale) if scale else stored
