"""Load the weights of Hugging Face checkpoints into our models, and write them from ours, tensor by tensor.

One table maps the names both ways. Our stacked experts are E tensors there, and in some families several matrices of
ours are one tensor there. Rotary pairs are half a head apart here, (x_i, x_i+D/2). In some families they are adjacent,
(x_2i, x_2i+1), or half of the coordinates that turn apart: these rows are permuted bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepseek_exp.config import AttentionKind, ModelConfig, Score
from deepseek_exp.errors import CheckpointError, Problem
from deepseek_exp.huggingface import read_release, stored_weights
from deepseek_exp.huggingface.files import Stored
from deepseek_exp.huggingface.write import family_of

SHARD_BYTES = 5 * 10**9
EMBEDDING, HEAD = "embedding.weight", "head.weight"
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
# Derived from the configuration; saved by old versions of transformers.
DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Entry:
    """One of our tensors and its counterparts.

    Attributes:
        ours: its name here.
        theirs: its names there: one, or for stacked experts one per expert along our first dimension.
        stacked: whether it is a stack of experts, even if there is only one.
        order: for each of our rows of a head, which row of the head it is there. None: not permuted.
        copy: whether it is a second copy that may be missing there.
        fused: whether it is a part of their tensor, which starts where the entry before it ends.
    """

    ours: str
    theirs: tuple[str, ...]
    stacked: bool = False
    order: tuple[int, ...] | None = None
    copy: bool = False
    fused: bool = False


def table(m: ModelConfig, family: str, *, interleaved: bool = True) -> list[Entry]:
    """Return our tensors with their names in Hugging Face's checkpoints, in the order of the layers.

    Args:
        m: the model.
        family: the Hugging Face family whose names are used.
        interleaved: whether MLA's rotary pairs are adjacent there.
    """
    entries = [Entry(EMBEDDING, ("model.embed_tokens.weight",))]
    for i in range(m.n_layers):
        entries += _block(m, f"blocks.{i}.", f"model.layers.{i}.", i, family, interleaved)
    entries.append(Entry("head.norm.weight", ("model.norm.weight",)))
    entries.append(Entry(EMBEDDING if m.tie_embeddings else HEAD, ("lm_head.weight",), copy=m.tie_embeddings))
    for k in range(m.n_mtp_layers):
        ours, theirs = f"mtp.{k}.", f"model.layers.{m.n_layers + k}."
        names = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "projection": "eh_proj"}
        entries += [Entry(f"{ours}{a}.weight", (f"{theirs}{b}.weight",)) for a, b in names.items()]
        entries += _block(m, f"{ours}block.", theirs, m.n_layers, family, interleaved)
        entries.append(Entry(f"{ours}head_norm.weight", (f"{theirs}shared_head.norm.weight",)))
        head = EMBEDDING if m.tie_embeddings else HEAD
        entries.append(Entry(EMBEDDING, (f"{theirs}embed_tokens.weight",), copy=True))
        entries.append(Entry(head, (f"{theirs}shared_head.head.weight",), copy=True))
    return entries


def _block(m: ModelConfig, ours: str, theirs: str, index: int, family: str, interleaved: bool) -> Iterator[Entry]:
    yield Entry(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",))
    yield Entry(f"{ours}feed_forward_norm.weight", (f"{theirs}post_attention_layernorm.weight",))
    for a, b in {"attention": "self_attn", "feed_forward": "mlp"}.items() if m.sandwich_norm else ():
        yield Entry(f"{ours}{a}_post_norm.weight", (f"{theirs}post_{b}_layernorm.weight",))
    attention = _mla(m, interleaved) if m.attention is AttentionKind.mla else _gqa(m, family)
    for a, b, order in attention:
        fused = b == "qkv_proj.weight"
        yield Entry(f"{ours}attention.{a}", (f"{theirs}self_attn.{b}",), order=order, fused=fused)
    if not m.moe.n_routed_experts or index < m.moe.n_dense_layers:
        yield from _swiglu(f"{ours}feed_forward.", f"{theirs}mlp.", fused=family in ("phi3", "glm4"))
        return
    mixtral, names = family == "mixtral", ("gate_proj", "up_proj", "down_proj")
    room = f"{theirs}block_sparse_moe." if mixtral else f"{theirs}mlp."
    yield Entry(f"{ours}feed_forward.router.weight", (f"{room}gate.weight",))
    if m.moe.score is Score.sigmoid:
        yield Entry(f"{ours}feed_forward.router.bias", (f"{room}gate.e_score_correction_bias",))
    for a, b in zip(("w_gate", "w_up", "w_down"), ("w1", "w3", "w2") if mixtral else names, strict=True):
        each = tuple(f"{room}experts.{e}.{b}.weight" for e in range(m.moe.n_routed_experts))
        yield Entry(f"{ours}feed_forward.experts.{a}", each, stacked=True)
    if m.moe.n_shared_experts:
        yield from _swiglu(f"{ours}feed_forward.shared.", f"{room}shared_experts.")


def _swiglu(ours: str, theirs: str, *, fused: bool = False) -> Iterator[Entry]:
    for name in ("gate", "up", "down"):
        one = fused and name != "down"
        yield Entry(f"{ours}w_{name}.weight", (f"{theirs}{'gate_up' if one else name}_proj.weight",), fused=one)


def _gqa(m: ModelConfig, family: str) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    order = _rotary_order(m.head_dim, m.rotary_dim or m.head_dim, adjacent=family == "glm4")
    for name in "qkvo":
        own = order if name in "qk" else None
        yield f"w{name}.weight", f"{'qkv' if family == 'phi3' and name != 'o' else name}_proj.weight", own
        if m.qkv_bias and name != "o":
            yield f"w{name}.bias", f"{name}_proj.bias", own
    for name in "qk" if m.qk_norm else "":
        yield f"{name}_norm.weight", f"{name}_norm.weight", None


def _rotary_order(whole: int, rotary: int, *, adjacent: bool) -> tuple[int, ...] | None:
    """Return the order of the rows of a head whose first `rotary` rows turn: our pairs are (i, i + whole / 2)."""
    if not adjacent and rotary == whole:
        return None
    first, second = range(rotary // 2), range(rotary // 2, rotary)
    if adjacent:
        first, second = range(0, rotary, 2), range(1, rotary, 2)
    middle = (whole + rotary) // 2
    return *first, *range(rotary, middle), *second, *range(middle, whole)


def _mla(m: ModelConfig, interleaved: bool) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    dim = m.qk_rope_head_dim
    of_q, of_kv = (
        (*range(still), *range(still, still + dim, 2), *range(still + 1, still + dim, 2)) if interleaved else None
        for still in (m.qk_nope_head_dim, m.kv_lora_rank)
    )
    if m.q_lora_rank:
        yield "wq_a.weight", "q_a_proj.weight", None
        yield "q_norm.weight", "q_a_layernorm.weight", None
        yield "wq_b.weight", "q_b_proj.weight", of_q
    else:
        yield "wq.weight", "q_proj.weight", of_q
    yield "wkv_a.weight", "kv_a_proj_with_mqa.weight", of_kv
    yield "kv_norm.weight", "kv_a_layernorm.weight", None
    yield "wkv_b.weight", "kv_b_proj.weight", None
    yield "wo.weight", "o_proj.weight", None


def to_ours(w: Tensor, order: tuple[int, ...]) -> Tensor:
    """Permute the rows of each head from their order to ours.

    Args:
        w: (heads * rows, ...).
        order: for each of our rows of a head, which row of the head it is there.
    """
    return w.unflatten(0, (-1, len(order)))[:, list(order)].flatten(0, 1)


def to_theirs(w: Tensor, order: tuple[int, ...]) -> Tensor:
    """Permute the rows of each head from our order to theirs, the inverse of `to_ours`."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return w.unflatten(0, (-1, len(order)))[:, back].flatten(0, 1)


@torch.no_grad()
def load_release(model: nn.Module, m: ModelConfig, folder: Path, key: str = "init_from") -> None:
    """Load the weights of a Hugging Face checkpoint into a model, one tensor at a time.

    Args:
        model: the model. Its parameters keep their types.
        m: the configuration it was built from.
        folder: the checkpoint.
        key: the configuration key that led here, for the messages.

    Raises:
        CheckpointError: weights are missing, left over or have another shape; all of them are named.
    """
    state = model.state_dict()
    release = read_release(folder, key)
    stored = layers_stored(m, folder, key)
    entries = []
    for entry in table(m, release.family, interleaved=release.interleaved):
        if entry.ours in state or not entry.ours.endswith("router.bias"):
            entries.append(entry)
        else:
            _leave_out(stored, entry.theirs[0], m)
    _check(entries, {name: tuple(t.shape) for name, t in state.items()}, stored, folder, key)
    filled: dict[str, int] = {}  # rows of a fused tensor that are already loaded
    with _Files(stored) as files:
        for entry in entries:
            target = state[entry.ours]
            for i, name in enumerate(entry.theirs):
                if name not in stored:
                    continue  # a copy
                tensor = files.get(name)
                if entry.fused:
                    start = filled.get(name, 0)
                    filled[name] = start + len(target)
                    tensor = tensor[start : filled[name]]
                if entry.order is not None:
                    tensor = to_ours(tensor, entry.order)
                place = target[i] if entry.stacked else target
                if not entry.copy:
                    place.copy_(tensor)
                elif not torch.equal(place, tensor.to(place.dtype)):
                    rule = f"has a copy {name} of {_main_name(entries, entry)} that differs from it, and ours are one"
                    raise CheckpointError(Problem(key, str(folder), rule, "use another checkpoint"))


def layers_stored(m: ModelConfig, folder: Path, key: str = "init_from") -> dict[str, Stored]:
    """Return `stored_weights` of a checkpoint after checking that it has enough layers, before the model is built.

    Raises:
        CheckpointError: it has fewer tensors than the model has layers.
    """
    stored = stored_weights(folder, key)
    if m.n_layers > len(stored):
        rule = f"says num_hidden_layers={m.n_layers} in its config.json and has {len(stored)} weights"
        raise CheckpointError(Problem(key, str(folder), rule, "use a whole checkpoint"))
    return stored


def _check(
    entries: Iterable[Entry],
    ours: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
    folder: Path,
    key: str,
) -> None:
    """Compare the stored tensors with the required ones."""
    wanted: dict[str, tuple[int, ...]] = {}
    for e in entries:
        shape = ours[e.ours][1:] if e.stacked else ours[e.ours]
        for name in e.theirs:
            if e.fused and name in wanted:
                wanted[name] = wanted[name][0] + shape[0], *shape[1:]
            elif not e.copy or name in stored:
                wanted[name] = shape
    missing = [f"{n} {list(shape)}" for n, shape in wanted.items() if n not in stored]
    extra = [f"{n} {list(s.shape)}" for n, s in stored.items() if n not in wanted and not n.endswith(DERIVED)]
    shapes = {n: (stored[n].shape, shape) for n, shape in wanted.items() if n in stored}
    wrong = [f"{n} {list(has)} instead of {list(need)}" for n, (has, need) in shapes.items() if has != need]
    odd = [f"{n} {s.dtype}" for n, s in stored.items() if s.dtype not in BYTES and n in wanted]
    kinds = {"lacks": missing, "has left over": extra, "has in another shape": wrong, "has in another type": odd}
    problems = [
        Problem(key, str(folder), f"{what} {len(names)} of its weights: {_listed(names)}", "use a whole checkpoint")
        for what, names in kinds.items()
        if names
    ]
    if problems:
        raise CheckpointError(*problems)


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names))


def _leave_out(stored: dict[str, Stored], name: str, m: ModelConfig) -> None:
    """Ignore a router's bias that this model does not have, if it is zero."""
    with _Files(stored) as files:
        if name in stored and files.get(name).any():
            rule = f"has no place for the router's bias, and {name} is not zero"
            raise CheckpointError(Problem("model.moe.balance", m.moe.balance.value, rule, "set model.moe.balance=bias"))
    stored.pop(name, None)


def _main_name(entries: Iterable[Entry], copy: Entry) -> str:
    return next(e.theirs[0] for e in entries if e.ours == copy.ours and not e.copy)


class _Files(contextlib.ExitStack):
    """A set of open safetensors files, each opened once."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        super().__init__()
        self.stored = stored
        self.open: dict[Path, Any] = {}

    def get(self, name: str, index: int | None = None) -> Tensor:
        """Return one tensor, or one matrix of a stack."""
        path = self.stored[name].file
        if path not in self.open:
            try:
                self.open[path] = self.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                rule = f"has a file {path.name} that cannot be read ({error})"
                raise CheckpointError(Problem("path", str(path.parent), rule, "download the file again")) from error
        part = self.open[path].get_slice(name)
        return part[:] if index is None else part[index]


def save(m: ModelConfig, checkpoint: Path, target: Path, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the weights of one of our checkpoints as Hugging Face's safetensors files.

    One shard is held in memory at a time. A router without a selection bias is written with zeros if the family has the
    bias.

    Args:
        m: the model.
        checkpoint: a folder with our model.safetensors.
        target: an empty folder.
        shard_bytes: maximum size of one file. A larger tensor is written to a separate file, never split.

    Returns:
        The files.
    """
    stored = stored_weights(checkpoint, "resume")
    zeros = torch.zeros(m.moe.n_routed_experts)
    shards: list[dict[str, list[tuple[Entry, int]]]] = [{}]
    filled = total = 0
    for entry in table(m, family_of(m)):
        if entry.copy and m.tie_embeddings and entry.theirs == ("lm_head.weight",):
            continue
        size = _bytes_of_one(entry, stored) if entry.ours in stored else zeros.nbytes
        for i, name in enumerate(entry.theirs):
            if shards[-1] and filled + size > shard_bytes and name not in shards[-1]:
                shards.append({})
                filled = 0
            shards[-1].setdefault(name, []).append((entry, i))
            filled, total = filled + size, total + size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    with _Files(stored) as files:
        for name, shard in zip(names, shards, strict=True):
            tensors = {n: _joined([_converted(files, e, i, zeros) for e, i in parts]) for n, parts in shard.items()}
            save_file(tensors, target / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return [target / name for name in names]


def _converted(files: _Files, entry: Entry, index: int, zeros: Tensor) -> Tensor:
    if entry.ours not in files.stored:
        return zeros
    tensor = files.get(entry.ours, index if entry.stacked else None)
    return (tensor if entry.order is None else to_theirs(tensor, entry.order)).contiguous().clone()


def _joined(parts: list[Tensor]) -> Tensor:
    """Return the only tensor, or a fused one of several."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bytes_of_one(entry: Entry, stored: Mapping[str, Stored]) -> int:
    _, shape, dtype = stored[entry.ours]
    return math.prod(shape) * BYTES[dtype] // (len(entry.theirs) if entry.stacked else 1)
