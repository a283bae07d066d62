"""What lies in the folder of a Hugging Face checkpoint: JSON files, and the headers of its safetensors files.

Format of a safetensors file: eight bytes with the length of the header, little endian, then the header as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_exp.errors import CheckpointError, ConfigError, Problem

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        file: the safetensors file that holds it.
        shape: its shape.
        dtype: its type in safetensors' words, such as BF16.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path, key: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        key: the configuration key that led to it, for the message.

    Raises:
        ConfigError: it is not there, or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = "name the folder of a Hugging Face checkpoint, with config.json and safetensors files"
        raise ConfigError(Problem(key, str(path.parent), f"has no {path.name}", fix)) from error
    except (OSError, ValueError) as error:
        rule = f"has a {path.name} that cannot be read ({error})"
        raise ConfigError(Problem(key, str(path.parent), rule, "mend or fetch the file again")) from error
    if not isinstance(content, dict):
        rule = f"has a {path.name} that is no JSON object"
        raise ConfigError(Problem(key, str(path.parent), rule, "mend or fetch the file again"))
    return content


def stored_weights(folder: Path, key: str = "init_from") -> dict[str, Stored]:
    """List every tensor of a checkpoint by name, from the files' headers alone.

    Args:
        folder: with model.safetensors, or with model.safetensors.index.json and the files that it names.
        key: the configuration key that led here, for the message.

    Raises:
        CheckpointError: the files are missing, damaged, or pickled.
    """
    found: dict[str, Stored] = {}
    for path in _files(folder, key):
        try:
            header = _header(path)
            found |= {n: Stored(path, tuple(e["shape"]), e["dtype"]) for n, e in header.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            rule = f"has a file {path.name} that is missing or damaged ({type(error).__name__}: {error})"
            raise CheckpointError(Problem(key, str(folder), rule, "fetch the file again")) from error
    return found


def _header(path: Path) -> dict[str, Any]:
    """Read the entries of a safetensors file's header; the file must be as long as they say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        entries: dict[str, Any] = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != whole:
        raise ValueError(f"{size} of {whole} bytes")
    return entries


def _files(folder: Path, key: str) -> list[Path]:
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX, key).get("weight_map")
        if not isinstance(names, dict) or not names or not all(_is_plain(name) for name in names.values()):
            rule = f"has a {INDEX} whose weight_map does not name files of that folder"
            raise CheckpointError(Problem(key, str(folder), rule, "fetch the file again"))
        return [folder / name for name in sorted(set(names.values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    if pickled:
        rule = f"holds its weights as {pickled[0]}, a pickle, which can run code when it is read"
        fix = "convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)"
        raise CheckpointError(Problem(key, str(folder), rule, fix))
    rule = f"has neither {SINGLE} nor {INDEX}"
    raise CheckpointError(Problem(key, str(folder), rule, "name the folder of a Hugging Face checkpoint"))


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
