"""Adapters in the file format of the peft library, for models that Hugging Face's transformers knows.

A folder has adapter_config.json and adapter_model.safetensors. A layer's A and B are named after its module there,
base_model.model.<module>.lora_A.weight and .lora_B.weight; those of the embedding, lora_embedding_A and _B, are stored
transposed. B follows the rows of its weight, of which some are in another order there (`weights.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_exp.config import ModelConfig
from deepseek_exp.errors import CheckpointError, ConfigError, Problem
from deepseek_exp.huggingface.files import read_json
from deepseek_exp.huggingface.weights import EMBEDDING, Entry, table, to_ours, to_theirs
from deepseek_exp.huggingface.write import family_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields that change what an adapter computes, with the only values that ours can express.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    # the other initializations subtract the first adapter from the weights, or replace them
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "mica"),
    **dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"), (None, False)),
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "use_qalora", "fan_in_fan_out"), (None, False)),
}


class Pair(NamedTuple):
    """The matrices of one adapter: A, (rank, d_in), and B, (d_out, rank)."""

    a: Tensor
    b: Tensor


def write_peft(
    m: ModelConfig, adapters: Mapping[str, Pair], rank: int, alpha: float, folder: Path, base: str | None
) -> None:
    """Write adapters as peft's files.

    Args:
        m: the model.
        adapters: parameter name -> its adapter.
        rank: of all adapters.
        alpha: their product is multiplied by alpha / rank.
        folder: existing, for the two files.
        base: folder of the model that they belong to, if it is a Hugging Face checkpoint.

    Raises:
        ConfigError: transformers has no linear layer or embedding for one of the matrices.
    """
    entries = _entries(m, interleaved=True)
    # of a model with experts, transformers 5.23 takes the names of all feed-forward layers for those of its stacks
    is_moe = m.moe.n_routed_experts > 0
    lost = [name for name in adapters if name not in entries or (is_moe and ".feed_forward." in name)]
    if lost:
        rule = f"has no place for adapters of {lost[0]}, one of {len(lost)} matrices that peft cannot load adapters for"
        excluded = "'embedding'" if lost == [EMBEDDING] else "'*.feed_forward.*','mtp.*'"
        fix = f"train with lora.exclude=[{excluded}], or use export.format=hf or adapter"
        raise ConfigError(Problem("export.format", "peft", rule, fix))
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapters.items():
        entry = entries[name]
        module = PREFIX + entry.theirs[0].removesuffix(".weight")
        if name == EMBEDDING:
            tensors |= {f"{module}.lora_embedding_A": b.T, f"{module}.lora_embedding_B": a.T}
        else:
            b = b if entry.order is None else to_theirs(b, entry.order)
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(entries[name].theirs[0].removesuffix(".weight") for name in adapters),
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_peft(
    m: ModelConfig, folder: Path, key: str, *, interleaved: bool = True
) -> tuple[dict[str, Pair], int, float]:
    """Read peft's files.

    Args:
        m: the model that the adapters are for.
        folder: with the two files.
        key: the configuration key that led here, for messages.
        interleaved: whether MLA's rotary pairs are adjacent in the weights of the model that they were trained with.

    Returns:
        Adapter by parameter name, their rank and alpha.

    Raises:
        ConfigError: the configuration asks for more than low-rank adapters of equal rank.
        CheckpointError: a file is missing or damaged, or an adapter is for a matrix that the model does not have.
    """
    values = read_json(folder / CONFIG, key)
    wrong = [name for name, plain in PLAIN.items() if values.get(name) not in plain]
    if wrong:
        rule = f"in {folder / CONFIG} asks for more than low-rank adapters of equal rank"
        fix = "merge that adapter into its model with peft, and start from the merged model"
        raise ConfigError(*(Problem(f"{CONFIG} {name}", values.get(name), rule, fix) for name in wrong))
    try:
        rank, alpha, tensors = int(values["r"]), float(values["lora_alpha"]), load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        rule = f"holds no adapter that can be read ({type(error).__name__}: {error})"
        raise CheckpointError(Problem(key, str(folder), rule, "fetch its files again")) from error
    found, used = {}, set()
    for name, entry in _entries(m, interleaved=interleaved).items():
        module = PREFIX + entry.theirs[0].removesuffix(".weight")
        parts = [f"{module}.lora_A.weight", f"{module}.lora_B.weight"]
        if name == EMBEDDING:
            parts = [f"{module}.lora_embedding_B", f"{module}.lora_embedding_A"]
        if not any(part in tensors for part in parts):
            continue
        if not all(part in tensors for part in parts):
            raise _unfit(folder, key, f"has only one of {parts[0]} and {parts[1]}")
        a, b = (tensors[part].T.contiguous() if name == EMBEDDING else tensors[part] for part in parts)
        found[name] = Pair(a, b if entry.order is None else to_ours(b, entry.order))
        used |= set(parts)
    # next to the adapter of a table, peft stores a copy of the frozen table, which is the model's
    left = sorted(name for name in tensors.keys() - used if not name.endswith(".base_layer.weight"))
    if left:
        raise _unfit(folder, key, f"has {left[0]}, one of {len(left)} tensors for which {m.version} has no matrix")
    return found, rank, alpha


def _entries(m: ModelConfig, *, interleaved: bool) -> dict[str, Entry]:
    """Return the matrices that are linear layers or the embedding in transformers, by our names.

    A matrix that is a part of a layer there has none, since the layer has one adapter for all its parts. Nor has a tied
    embedding: ours adapts the one table in both places, peft the embedding alone.

    Raises:
        ConfigError: no Hugging Face family can express the model.
    """
    every = table(m, family_of(m), interleaved=interleaved)
    modules = [e for e in every if not (e.copy or e.stacked or e.fused or ".router." in e.ours)]
    modules = [e for e in modules if not (m.tie_embeddings and e.ours == EMBEDDING)]
    return {e.ours: e for e in modules if not e.ours.startswith("mtp.") and not e.ours.endswith("norm.weight")}


def _unfit(folder: Path, key: str, rule: str) -> CheckpointError:
    return CheckpointError(Problem(key, str(folder), rule, "name an adapter of this model"))
