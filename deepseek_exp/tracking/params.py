"""How values of the configuration become MLflow parameters: dotted names and strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

from deepseek_exp.tracking.uri import hide_password


def flatten(values: Mapping[str, Any]) -> dict[str, str]:
    """Turn a tree of values into one level: dotted names, values as strings.

    Strings stay as they are, enums give their value, all else is JSON (`null`, `true`, `0.001`, `[1, 2]`). Passwords
    inside of URLs become `***`.
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{name}.{inner}": text for inner, text in flatten(value).items()})
        else:
            flat[name] = hide_password(_as_text(value))
    return flat


def cut(text: str, limit: int) -> str:
    """Shorten a text to at most `limit` characters; one that is cut says so and how long it was."""
    if len(text) <= limit:
        return text
    note = f" ... [cut, {len(text)} characters in all]"
    return text[: limit - len(note)] + note


def _as_text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return value if isinstance(value, str) else json.dumps(value, default=str)
