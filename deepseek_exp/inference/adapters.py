"""Read the adapter in a folder, in any form: ours, peft's, or a checkpoint of a run with adapters."""

from __future__ import annotations

from pathlib import Path

from deepseek_exp.adapt import Adapter, files, saved_scale
from deepseek_exp.adapt.lora import A, B
from deepseek_exp.checkpoint import saved_config
from deepseek_exp.checkpoint.lightning_io import load_weights
from deepseek_exp.config import ModelConfig
from deepseek_exp.errors import CheckpointError, Problem
from deepseek_exp.huggingface import adapters as peft
from deepseek_exp.huggingface import read_release
from deepseek_exp.huggingface.files import CONFIG


def read_adapter(
    m: ModelConfig, folder: Path, key: str, base: Path | None = None
) -> tuple[dict[str, Adapter], int, float]:
    """Return the adapters in a folder by parameter name, their rank and alpha.

    Args:
        m: the model that they are for.
        folder: of do=export with export.format=adapter or peft, of peft itself, or a checkpoint.
        key: the configuration key that led here, for messages.
        base: the checkpoint that the model comes from; peft's adapters have its order of rows.

    Raises:
        UserError: there is none, or it is damaged or of another model.
    """
    if (folder / files.CONFIG).is_file():
        return files.read_adapter(folder, key)
    if (folder / peft.CONFIG).is_file():
        is_release = base is not None and (base / CONFIG).is_file()
        pairs, rank, alpha = peft.read_peft(
            m, folder, key, interleaved=read_release(base, key).interleaved if is_release else True
        )
        return {name: Adapter(*pair) for name, pair in pairs.items()}, rank, alpha
    if (folder / saved_config.FILE).is_file() and saved_scale(folder):
        lora = saved_config.read(folder)["lora"]
        return stored_adapters(folder), int(lora["rank"]), float(lora["alpha"])
    rule = f"has neither {files.CONFIG} nor {peft.CONFIG}, and is no checkpoint with adapters"
    raise CheckpointError(Problem(key, str(folder), rule, "name a folder with an adapter"))


def stored_adapters(checkpoint: Path, *, use_ema: bool = False) -> dict[str, Adapter]:
    """Return the adapters in a checkpoint of any layout, or with `use_ema` their moving average."""
    weights = load_weights(checkpoint, use_ema=use_ema)
    names = [name.removesuffix(f".{A}") for name in weights if name.endswith(f".{A}")]
    return {name: Adapter(weights[f"{name}.{A}"], weights[f"{name}.{B}"]) for name in names}
