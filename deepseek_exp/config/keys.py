"""The keys of the schema as a flat list, with their types and documentation."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from functools import cache
from typing import Any

from deepseek_exp.config import ExperimentConfig

# Groups that write into another section of the tree.
SECTION_OF = {"size": "model"}
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclasses.dataclass(frozen=True)
class KeyInfo:
    """One leaf of the schema."""

    type: Any
    optional: bool
    metadata: dict[str, Any]


@cache
def schema_keys(cls: type = ExperimentConfig, prefix: str = "") -> dict[str, KeyInfo]:
    """Return the type and documentation of every dotted key, in the schema's order. Don't change the dictionary."""
    found: dict[str, KeyInfo] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, optional = hints[field.name], False
        if isinstance(kind, types.UnionType):
            kind, optional = next(t for t in typing.get_args(kind) if t is not type(None)), True
        if dataclasses.is_dataclass(kind):
            found |= schema_keys(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = KeyInfo(kind, optional, dict(field.metadata))
    return found


def is_enum(kind: Any) -> bool:
    """Return whether a type is an enumeration."""
    return isinstance(kind, type) and issubclass(kind, Enum)


def is_mapping(kind: Any) -> bool:
    """Return whether a type is a mapping with user-defined keys."""
    return typing.get_origin(kind) is dict
