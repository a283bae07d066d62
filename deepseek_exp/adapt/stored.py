"""Checkpoints of runs with adapters: they hold the frozen weights and the adapters, under the weights' names."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from deepseek_exp.adapt.lora import A, B, low_rank_sum
from deepseek_exp.checkpoint import saved_config
from deepseek_exp.checkpoint.lightning_io import in_one_file, load_weights
from deepseek_exp.checkpoint.manifest import MANIFEST, MODEL, STATE, TREE
from deepseek_exp.checkpoint.tensors import DTYPES, damaged, open_tensors, write_tensors


def saved_scale(checkpoint: Path) -> float:
    """Return alpha / rank of the adapters in a checkpoint, 0 if its configuration has none or is missing.

    Raises:
        CheckpointError: its configuration holds no such numbers.
    """
    if not (checkpoint / saved_config.FILE).exists():
        return 0.0
    lora = saved_config.read(checkpoint).get("lora", {"rank": 0})
    try:
        return float(lora["alpha"]) / int(lora["rank"]) if lora["rank"] else 0.0
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise damaged(
            checkpoint, f"has a section lora that cannot be read ({type(error).__name__}: {error})"
        ) from error


def is_adapter(name: str) -> bool:
    """Return whether a stored tensor is a matrix of an adapter."""
    return name.endswith((f".{A}", f".{B}"))


def check_adapters(checkpoint: Path, names: Iterable[str], scale: float) -> None:
    """Raise if adapters in a checkpoint would be left out of its weights.

    Args:
        checkpoint: its folder.
        names: of its stored tensors.
        scale: from `saved_scale`.

    Raises:
        CheckpointError: one of A and B is missing, or the configuration has no rank and alpha for them.
    """
    stored = set(names)
    adapted = sorted({name.rpartition(".")[0] for name in stored if is_adapter(name)})
    if adapted and not scale:
        raise damaged(checkpoint, f"holds an adapter of {adapted[0]}, and its configuration has no lora.rank")
    for name in adapted:
        if not {f"{name}.{A}", f"{name}.{B}"} <= stored:
            raise damaged(checkpoint, f"holds only one of the two matrices of the adapter of {name}")


@torch.no_grad()
def fold(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return weights with their adapters added and left out, equal bit for bit to what a model with them computes with.

    Args:
        weights: under the names of a checkpoint. Without adapters, they are returned as they are.
        scale: alpha / rank.
    """
    found = {}
    for name, w in weights.items():
        if is_adapter(name):
            continue
        a, b = weights.get(f"{name}.{A}"), weights.get(f"{name}.{B}")
        found[name] = w if a is None or b is None else low_rank_sum(w, a, b, scale)
    return found


def load_merged(checkpoint: Path, *, use_ema: bool = False) -> dict[str, Tensor]:
    """Return the parameters and buffers of a checkpoint of any layout, with its adapters added if it has some.

    Args:
        checkpoint: its folder.
        use_ema: read the moving average of what was trained instead.
    """
    weights, scale = load_weights(checkpoint, use_ema=use_ema), saved_scale(checkpoint)
    check_adapters(checkpoint, weights, scale)
    return fold(weights, scale)


@contextmanager
def merged(checkpoint: Path, target: Path, *, use_ema: bool = False) -> Iterator[Path]:
    """Yield a checkpoint whose weights are in one model.safetensors and include its adapters, if it has some.

    Args:
        checkpoint: of any layout.
        target: a temporary folder next to this path holds what has to be written.
        use_ema: take the moving average of what was trained instead.
    """
    scale = saved_scale(checkpoint)
    with in_one_file(checkpoint, target, use_ema=use_ema) as single:
        file = open_tensors(single / MODEL)
        stored = set(file.keys())
        check_adapters(checkpoint, stored, scale)
        if not scale:
            yield single
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.adapted.", dir=target.parent) as name:
            aliases = json.loads(file.metadata()["aliases"])
            kept = {n: o for n, o in aliases.items() if not is_adapter(n)}

            def read(weight: str) -> Tensor:
                parts = [weight, f"{weight}.{A}", f"{weight}.{B}"]
                return fold({n: file.get_tensor(n) for n in parts if n in stored}, scale)[weight]

            slices = {n: file.get_slice(n) for n in stored if not is_adapter(n)}
            like = {
                n: torch.empty(s.get_shape(), dtype=DTYPES[s.get_dtype()], device="meta") for n, s in slices.items()
            }
            write_tensors(Path(name) / MODEL, like, {"aliases": json.dumps(kept)}, read)
            for path in single.iterdir():
                if path.name not in (MODEL, STATE, TREE, MANIFEST):
                    shutil.copy(path, name)
            yield Path(name)
