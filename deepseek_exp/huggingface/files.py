"""Read the files of a Hugging Face checkpoint: its JSON files and the headers of its safetensors files.

A safetensors file starts with the length of the header as 8 little-endian bytes, followed by the header as JSON.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from deepseek_exp.errors import CheckpointError, ConfigError, Problem

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
# Files that hold a tokenizer, in the order in which they are looked for. The others are SentencePiece models.
TOKENIZERS = (TOKENIZER, "tokenizer.model", "spiece.model")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Bytes per element. Elements of other types have a fractional number of bytes or are unknown here.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
}
# The longest header that the safetensors library reads.
MOST_HEADER_BYTES = 100_000_000
HUB = "init_from takes a folder of this machine, not a name on the hub: download one first, for example with "
HUB += "hf download Qwen/Qwen3-0.6B --local-dir qwen3-0.6b"


class Stored(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        file: the safetensors file that holds it.
        shape: its shape.
        dtype: its type in safetensors' notation, such as BF16.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def tokenizer_file(folder: Path) -> Path:
    """Return the tokenizer's file in a folder; the path of tokenizer.json if there is none."""
    found = (folder / name for name in TOKENIZERS if (folder / name).is_file())
    return next(found, folder / TOKENIZER)


def read_json(path: Path, key: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        key: the configuration key that led to it, for the message.

    Raises:
        ConfigError: the file is missing or does not hold a JSON object.
    """
    again = "fix the file, or download it again"
    try:
        if not path.parent.exists():
            fix = HUB if key == "init_from" else "name a folder of this machine; one from the hub is downloaded first"
            raise ConfigError(Problem(key, str(path.parent), "is a folder that does not exist", fix))
        _check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError as error:
        fix = "name the folder of a Hugging Face checkpoint, with config.json and safetensors files"
        raise ConfigError(Problem(key, str(path.parent), f"has no {path.name}", fix)) from error
    except (OSError, ValueError, RecursionError) as error:
        rule = f"has a {path.name} that cannot be read ({error})"
        raise ConfigError(Problem(key, str(path.parent), rule, again)) from error
    if not isinstance(content, dict):
        raise ConfigError(Problem(key, str(path.parent), f"has a {path.name} that is no JSON object", again))
    return content


def stored_weights(folder: Path, key: str = "init_from") -> dict[str, Stored]:
    """Return every tensor of a checkpoint by name, reading only the headers of its files.

    Args:
        folder: contains model.safetensors, or model.safetensors.index.json and the files that it names.
        key: the configuration key that led here, for the message.

    Raises:
        CheckpointError: the files are missing, damaged, or pickled.
    """
    found: dict[str, Stored] = {}
    for path in _files(folder, key):
        try:
            header = _header(path)
            found |= {n: Stored(path, tuple(e["shape"]), e["dtype"]) for n, e in header.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            rule = f"has a file {path.name} that is missing or damaged ({type(error).__name__}: {error})"
            raise CheckpointError(Problem(key, str(folder), rule, "fetch the file again")) from error
    return found


def _header(path: Path) -> dict[str, Any]:
    """Return the entries of a safetensors header, which must describe every byte of the file exactly once."""
    _check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, MOST_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        entries: dict[str, Any] = json.loads(file.read(length), parse_constant=_no_number)
    entries.pop("__metadata__", None)
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if not _are_counts(start, stop, *entry["shape"]) or not isinstance(entry["dtype"], str):
            raise ValueError(f"{name} has no shape, type and place")
        n_bytes = math.prod(entry["shape"]) * ITEM_BYTES.get(entry["dtype"], 0)
        if start != end or stop < start or (n_bytes != stop - start and entry["dtype"] in ITEM_BYTES):
            raise ValueError(f"{name} of shape {entry['shape']} and type {entry['dtype']} lies at {start} to {stop}")
        end = stop
    if size != 8 + length + end:
        raise ValueError(f"{size} of {8 + length + end} bytes")
    return entries


def _are_counts(*numbers: Any) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers)


def _check_regular(path: Path) -> None:
    """Raise an error if the path exists but is not a regular file; opening a pipe would block."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


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
