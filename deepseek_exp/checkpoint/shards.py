"""Checkpoints of many ranks that any layout can load.

Each rank writes its part of each parameter, and where in the whole parameter that part is. A reader asks for the part
that its own layout needs, which is assembled from the stored pieces. A checkpoint of one process is read through the
same interface. Nothing here communicates.

Terms: a box is the range of indices in each dimension that a part of a parameter covers.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_exp.checkpoint import saved_config
from deepseek_exp.checkpoint.manifest import MODEL, STATE
from deepseek_exp.checkpoint.tensors import DTYPES, damaged, decode, open_tensors, read_tree, readable, write_tensors
from deepseek_exp.errors import CheckpointError, Problem

Box = tuple[tuple[int, int], ...]
SHARDED = "sharded"  # the key in state.json
FROZEN = "frozen"  # the key in state.json of one process: names of the parameters that are not trained, if any
WEIGHT = "weight"
AVERAGE = "ema"  # the optimizer's state that is a moving average of the weights
BUFFER = "buffer."


@dataclass(frozen=True)
class Cut:
    """A dimension is split into `ways` equal parts, and this is part `index`."""

    dim: int
    ways: int
    index: int


@dataclass(frozen=True)
class Piece:
    """One rank's part of one parameter.

    Attributes:
        name: of the parameter in the whole model.
        shape: of the whole parameter.
        cuts: how the rank's local tensor is sliced from it, in order; () means the whole.
        start: the first element of the flattened local tensor that `values` hold.
        values: kind -> (n,), equally long: "weight", in fp32 if there is a master, and the optimizer's elementwise
            states under their names.
        others: kind -> optimizer state of another shape, such as a factor of the second moment. It covers the whole
            parameter, so only a rank that holds all of it can save one.
    """

    name: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    start: int
    values: Mapping[str, Tensor]
    others: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    """Metadata common to all pieces.

    Attributes:
        dtype: the model's compute type, such as bfloat16; masters are rounded to it.
        param_groups: the optimizer's, with the whole model's names in "param_names" instead of "params".
        scalars: the optimizer's states that are one number for all parameters, such as {"step": 10.0}.
        aliases: alias of a tied parameter -> the name that it is stored under.
    """

    dtype: torch.dtype
    param_groups: Sequence[Mapping[str, Any]]
    scalars: Mapping[str, float]
    aliases: Mapping[str, str]


def shard_name(rank: int) -> str:
    """Return the file name of a rank's shard."""
    return f"shard-{rank:05d}.safetensors"


def save_shard(
    folder: Path, rank: int, pieces: Iterable[Piece], buffers: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Write one rank's pieces durably.

    Args:
        folder: shared by all ranks.
        rank: unique number of the writer.
        pieces: of parameters; they may be empty.
        buffers: persistent buffers, whole, under their names in the whole model.

    Returns:
        The file's name and its entry in the manifest.
    """
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for piece in pieces:
        (size,) = {value.shape for value in piece.values.values()}  # (n,)
        everything = {**piece.values, **piece.others}
        tensors |= {f"{len(described)}.{kind}": value for kind, value in everything.items()}
        cuts = [(cut.dim, cut.ways, cut.index) for cut in piece.cuts]
        stop = piece.start + size.numel()
        entry = {"name": piece.name, "shape": piece.shape, "cuts": cuts, "range": (piece.start, stop)}
        described.append({**entry, "kinds": list(piece.values), "others": list(piece.others)})
    tensors |= {BUFFER + name: tensor for name, tensor in buffers.items()}
    path = folder / shard_name(rank)
    record = write_tensors(path, tensors, {"pieces": json.dumps(described)}, tensors.__getitem__)
    return {path.name: record}


def box_of(shape: Sequence[int], cuts: Iterable[Cut]) -> Box:
    """Return the box that the cuts leave of a tensor of this shape."""
    box = [(0, n) for n in shape]
    for cut in cuts:
        low, high = box[cut.dim]
        size, left = divmod(high - low, cut.ways)
        if left or not 0 <= cut.index < cut.ways:
            raise ValueError(f"{cut} does not cut {high - low} elements of {tuple(shape)} into equal parts")
        box[cut.dim] = (low + cut.index * size, low + (cut.index + 1) * size)
    return tuple(box)


@dataclass(frozen=True)
class _Stored:
    """A part of a parameter as stored in a file.

    Attributes:
        file: yields slices of the tensor when indexed.
        box: the part of the parameter that is covered.
        range: the first and the last + 1 element of the flattened box that are stored, as one row; None if it is stored
            in the parameter's own shape.
    """

    file: Any
    box: Box
    range: tuple[int, int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.file.get_dtype()]

    def read(self, wanted: Box) -> Iterator[tuple[Box, Tensor]]:
        """Yield what is stored of the wanted box, as boxes within it and their elements."""
        if self.range is None:
            yield wanted, self.file[tuple(slice(*ends) for ends in wanted)]
            return
        sizes = _sizes(self.box)
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        for block in _blocks(sizes, *self.range):
            box = _overlap(_shifted(block, self.box, 1), wanted)
            if all(low < high for low, high in box):
                inner = _shifted(box, self.box, -1)
                first = sum(low * n for (low, _), n in zip(inner, strides, strict=True)) - self.range[0]
                last = sum((high - 1) * n for (_, high), n in zip(inner, strides, strict=True)) - self.range[0]
                yield box, self.file[first : last + 1].as_strided(_sizes(box), strides)


@dataclass
class State:
    """A checkpoint of any layout, whose tensors are read on demand.

    Attributes:
        folder: the checkpoint.
        rest: what Lightning saved in addition to the model and its optimizer.
        dtype: the model's compute type.
        param_groups: the optimizer's, with "param_names" instead of "params".
        aliases: alias of a tied parameter -> its name here; both are accepted.
    """

    folder: Path
    rest: dict[str, Any]
    dtype: torch.dtype
    param_groups: list[dict[str, Any]]
    aliases: dict[str, str]
    scalars: dict[str, float]
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _stored: dict[str, dict[str, list[_Stored]]] = field(default_factory=dict)
    _buffers: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Return the names of the parameters, tied ones once."""
        return list(self._stored)

    @property
    def buffers(self) -> list[str]:
        """Return the names of the persistent buffers."""
        return list(self._buffers)

    @property
    def optimizer_step(self) -> int | None:
        """Return the number of steps that the optimizer has done, if it counts them."""
        return int(self.scalars["step"]) if "step" in self.scalars else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole parameter."""
        return self._shapes[self.aliases.get(name, name)]

    def kinds(self, name: str) -> list[str]:
        """List the stored kinds of a parameter: "weight", and the optimizer's states."""
        return list(self._stored[self.aliases.get(name, name)])

    def is_elementwise(self, name: str, kind: str) -> bool:
        """Return whether a state has one element per element of its parameter, so that it can be sliced with it."""
        name = self.aliases.get(name, name)
        first = self._stored[name][kind][0]
        return first.range is not None or tuple(first.file.get_shape()) == self._shapes[name]

    def read(self, name: str, kind: str, cuts: Sequence[Cut] = ()) -> Tensor:
        """Assemble the part of a parameter, or of its optimizer's state, that these cuts leave, on the CPU.

        Raises:
            CheckpointError: it is missing, or is a state that cannot be sliced as the parameter is.
        """
        name = self.aliases.get(name, name)
        parts = self._stored.get(name, {}).get(kind)
        if parts is None:
            raise damaged(self.folder, f"holds no {kind} of {name}")
        if not self.is_elementwise(name, kind):
            return self._odd(parts[0], name, kind, cuts)
        wanted = box_of(self._shapes[name], cuts)
        with readable(self.folder):
            whole = torch.empty(_sizes(wanted), dtype=parts[0].dtype)
            for part in parts:
                for box, elements in part.read(wanted):
                    whole[tuple(slice(*ends) for ends in _shifted(box, wanted, -1))] = elements
        return whole

    def buffer(self, name: str) -> Tensor:
        """Read a persistent buffer."""
        with readable(self.folder):
            tensor: Tensor = self._buffers[name][...]
        return tensor

    def whole(self, name: str) -> Tensor:
        """Read a parameter in the model's compute type, or a buffer."""
        return self.buffer(name) if name in self._buffers else self.read(name, WEIGHT).to(self.dtype)

    def _odd(self, stored: _Stored, name: str, kind: str, cuts: Sequence[Cut]) -> Tensor:
        """Read a state that is not elementwise, which can only be read whole."""
        if not cuts:
            with readable(self.folder):
                whole_state: Tensor = stored.file[...]
            return whole_state
        shape, whole = list(stored.file.get_shape()), list(self._shapes[name])
        rule = f"keeps a {kind} of shape {shape} for {name} of shape {whole}, which cannot be cut with it"
        fix = "continue in one process, or start a new run with an elementwise optimizer such as optim=adamw"
        raise CheckpointError(Problem("optim.optimizer", _optimizer_of(self.folder), rule, fix))


def open_state(folder: Path) -> State:
    """Open a checkpoint of any layout; of its tensors, only the headers are read.

    Raises:
        CheckpointError: a file is missing or damaged, a part of a parameter is missing or stored twice, or the
            checkpoint is of a version that did not save the parameters' names with the optimizer.
    """
    with readable(folder):
        tree = read_tree(folder)
        return _open_shards(folder, tree) if SHARDED in tree else _open_single(folder, tree)


def averaged(state: State) -> State:
    """Return a checkpoint whose weights are the moving average that it holds of them; frozen ones are as they are.

    Raises:
        CheckpointError: it holds none.
    """
    if not any(AVERAGE in stored for stored in state._stored.values()):
        rule = "holds no moving average of its weights, which use_ema=true asks for"
        fix = "set use_ema=false, or name a run that was trained with optim.ema_decay"
        raise CheckpointError(Problem("resume", str(state.folder), rule, fix))
    stored = {name: {**kinds, WEIGHT: kinds.get(AVERAGE, kinds[WEIGHT])} for name, kinds in state._stored.items()}
    return replace(state, _stored=stored)


class _Tensors(dict[str, Any]):
    """The entries of a file by name, fetched on look-up."""

    def __init__(self, get: Callable[[str], Any]) -> None:
        super().__init__()
        self.get_one = get

    def __missing__(self, name: str) -> Any:
        return self.get_one(name)


@dataclass(frozen=True)
class _Held:
    """A piece as described by its file."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    range: tuple[int, int]
    files: dict[str, Any]  # kind -> its row
    others: dict[str, Any]  # kind -> a state of another shape

    def stored(self, kind: str) -> _Stored:
        box = box_of(self.shape, self.cuts)
        return _Stored(self.others[kind], box) if kind in self.others else _Stored(self.files[kind], box, self.range)


def _open_shards(folder: Path, tree: dict[str, Any]) -> State:
    rest = _rest(tree, open_tensors(folder / STATE))
    said = rest.pop(SHARDED)
    said |= {key: dict(said[key]) for key in ("aliases", "scalars")}
    files = [open_tensors(folder / shard_name(rank)) for rank in range(said.pop("n_shards"))]
    state = State(folder, rest, DTYPES[said.pop("dtype")], **said)
    held: dict[str, list[_Held]] = defaultdict(list)
    for file in files:
        for name, piece in _pieces(file):
            held[name].append(piece)
        names = [key for key in file.keys() if key.startswith(BUFFER)]  # noqa: SIM118 - not a dict
        state._buffers |= {key.removeprefix(BUFFER): file.get_slice(key) for key in names}
    trained = [name for group in state.param_groups for name in group["param_names"]]
    for name in dict.fromkeys([*trained, *held]):
        wrong = _what_is_wrong(held[name])
        if wrong:
            raise damaged(folder, f"{wrong} {name}")
        state._shapes[name] = held[name][0].shape
        first = held[name][0]
        state._stored[name] = {kind: [piece.stored(kind) for piece in held[name]] for kind in first.files}
        state._stored[name] |= {kind: [first.stored(kind)] for kind in first.others}
    return state


def _pieces(file: Any) -> Iterator[tuple[str, _Held]]:
    for i, entry in enumerate(json.loads(file.metadata()["pieces"])):
        rows = {kind: file.get_slice(f"{i}.{kind}") for kind in entry["kinds"]}
        others = {kind: file.get_slice(f"{i}.{kind}") for kind in entry.get("others", [])}
        cuts = tuple(Cut(*cut) for cut in entry["cuts"])
        yield entry["name"], _Held(tuple(entry["shape"]), cuts, tuple(entry["range"]), rows, others)


def _what_is_wrong(pieces: Sequence[_Held]) -> str | None:
    """Return why the pieces are not exactly one whole parameter, to follow its name; None if they are."""
    if not pieces:
        return "lacks"
    alike = {
        (p.shape, tuple((c.dim, c.ways) for c in p.cuts), tuple((k, f.get_dtype()) for k, f in p.files.items()))
        for p in pieces
    }
    if len(alike) > 1:
        return "has pieces that do not belong together of"
    ranges = defaultdict(list)
    for piece in pieces:
        ranges[box_of(piece.shape, piece.cuts)].append(piece.range)
    if sum(map(_volume, ranges)) < math.prod(pieces[0].shape):
        return "lacks a part of"
    for box, held in ranges.items():
        reached = 0
        for start, stop in sorted(held):
            if start != reached:
                return "lacks a part of" if start > reached else "has twice a part of"
            reached = stop
        if reached != _volume(box):
            return "lacks a part of"
    return None


def _open_single(folder: Path, tree: dict[str, Any]) -> State:
    model, extra = open_tensors(folder / MODEL), open_tensors(folder / STATE)
    (optimizer,) = decode(tree.pop("optimizer_states"), _Tensors(extra.get_slice))
    inner = optimizer.get("inner", optimizer)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in inner["param_groups"]]
    if any("param_names" not in group for group in groups):
        rule = "was saved by a version that did not name the optimizer's parameters, so only one process can load it"
        fix = "train one step in one process; any layout can load the checkpoint that it saves"
        raise CheckpointError(Problem("resume", str(folder), rule, fix))
    aliases = dict(json.loads(model.metadata()["aliases"]))
    names = [name for group in groups for name in group["param_names"]]
    frozen = decode(tree.pop(FROZEN, {"list": []}), {})
    weights = {name: model.get_slice(name) for name in model.keys()}  # noqa: SIM118 - not a dict
    masters = dict(zip(names, optimizer.get("masters", []), strict=False))
    dtype = DTYPES[weights[names[0]].get_dtype()]
    states = {name: inner["state"].get(i, {}) for i, name in enumerate(names)}
    state = State(folder, _rest(tree, extra), dtype, groups, aliases, _scalars(folder, states))
    for name in [*names, *frozen]:
        state._shapes[name] = tuple(weights[name].get_shape())
        moments = {k: v for k, v in states.get(name, {}).items() if _is_tensor(v)}
        rows = {WEIGHT: masters.get(name, weights[name])} | moments
        box = box_of(state._shapes[name], ())
        state._stored[name] = {kind: [_Stored(file, box)] for kind, file in rows.items()}
    state._buffers = {name: file for name, file in weights.items() if name not in state._stored}
    return state


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "get_shape") and value.get_shape() != []


def _scalars(folder: Path, states: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the states that are one number, which has to be the same for all parameters."""
    found: dict[str, float] = {}
    for name, state in states.items():
        for kind, value in state.items():
            if value is None or _is_tensor(value):
                continue
            number = float(value[...] if hasattr(value, "get_shape") else value)
            if found.setdefault(kind, number) != number:
                rule = (
                    f"has {kind}={number:g} for {name} and {found[kind]:g} for others, so only one process can load it"
                )
                raise damaged(folder, rule)
    return found


def _rest(tree: Mapping[str, Any], file: Any) -> dict[str, Any]:
    tensors = _Tensors(file.get_tensor)
    return {key: decode(value, tensors) for key, value in tree.items()}


def _blocks(sizes: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Split a range of the flattened tensor into boxes: part of a row, whole rows, part of a row, in each dimension."""
    if start >= stop:
        return
    if len(sizes) < 2:
        yield ((start, stop),) * len(sizes)
        return
    row = math.prod(sizes[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _within(last, sizes, start, stop)
        return
    yield from _within(first - 1, sizes, start, first * row)
    if first < last:
        yield ((first, last), *((0, n) for n in sizes[1:]))
    yield from _within(last, sizes, last * row, stop)


def _within(index: int, sizes: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    shift = index * math.prod(sizes[1:])
    for block in _blocks(sizes[1:], start - shift, stop - shift):
        yield ((index, index + 1), *block)


def _overlap(a: Box, b: Box) -> Box:
    return tuple((max(low, other), min(high, end)) for (low, high), (other, end) in zip(a, b, strict=True))


def _shifted(box: Box, origin: Box, sign: int) -> Box:
    """Move a box by the origin of another one: sign 1 out of its coordinates, -1 into them."""
    return tuple((low + sign * start, high + sign * start) for (low, high), (start, _) in zip(box, origin, strict=True))


def _sizes(box: Box) -> list[int]:
    return [high - low for low, high in box]


def _volume(box: Box) -> int:
    return math.prod(_sizes(box))


def _optimizer_of(folder: Path) -> str:
    return str(saved_config.read(folder)["optim"]["optimizer"]["_target_"])
