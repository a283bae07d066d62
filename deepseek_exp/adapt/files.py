"""An adapter alone as files: adapter.safetensors, under our names, and adapter.json with its rank and alpha."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deepseek_exp.adapt.lora import A, Adapter, B
from deepseek_exp.errors import CheckpointError, Problem

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


def write_adapter(folder: Path, adapters: Mapping[str, Adapter], rank: int, alpha: float, version: str) -> None:
    """Write adapters.

    Args:
        folder: existing, for the two files.
        adapters: parameter name -> its adapter.
        rank: of all adapters.
        alpha: their product is multiplied by alpha / rank.
        version: name of the model version, for people.
    """
    pairs = {name: {A: a, B: b} for name, (a, b) in adapters.items()}
    tensors = {f"{name}.{part}": t.contiguous() for name, pair in pairs.items() for part, t in pair.items()}
    save_file(tensors, folder / WEIGHTS)
    values = {"version": version, "rank": rank, "alpha": alpha}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path, key: str) -> tuple[dict[str, Adapter], int, float]:
    """Read what `write_adapter` wrote.

    Args:
        folder: with the two files.
        key: the configuration key that led here, for the message.

    Returns:
        Adapter by parameter name, their rank and alpha.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        rank, alpha, tensors = int(values["rank"]), float(values["alpha"]), load_file(folder / WEIGHTS)
        names = [name.removesuffix(f".{A}") for name in tensors if name.endswith(f".{A}")]
        found = {name: Adapter(tensors[f"{name}.{A}"], tensors[f"{name}.{B}"]) for name in names}
    except (OSError, SafetensorError, LookupError, RecursionError, TypeError, ValueError) as error:
        rule = f"holds no adapter that can be read ({type(error).__name__}: {error})"
        raise CheckpointError(Problem(key, str(folder), rule, "name a folder of do=export")) from error
    return found, rank, alpha
