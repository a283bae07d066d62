"""Conversion of configuration values to MLflow parameters: dotted names and strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from deepseek_exp.redact import redact, redact_tree


def flatten(values: Mapping[str, Any]) -> dict[str, str]:
    """Flatten a tree of values: dotted names, values as strings.

    Strings are unchanged, enums become their value, all else is JSON (`null`, `true`, `0.001`, `[1, 2]`). Secrets are
    hidden.
    """
    return {name: redact(text) for name, text in _flat(redact_tree(values)).items()}


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{name}.{inner}": text for inner, text in _flat(value).items()})
        else:
            flat[name] = _as_text(value)
    return flat


def cut(text: str, limit: int) -> str:
    """Truncate a text to at most `limit` characters; a truncated text ends with its original length."""
    if len(text) <= limit:
        return text
    note = f" ... [cut, {len(text)} characters in all]"
    return text[: limit - len(note)] + note


def _as_text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return value if isinstance(value, str) else json.dumps(value, default=str)
