"""How a configuration key is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from omegaconf import MISSING


def key(
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    default: Any = MISSING,
    default_factory: Any = None,
) -> Any:
    """Declare a configuration key: its meaning (with its unit) and the range of its value.

    A default is for entries of a mapping, which no YAML file lists, and for keys that checkpoints of earlier versions
    lack; all other values are in conf/.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"doc": doc, "bounds": {k: v for k, v in bounds.items() if v is not None}}
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)
