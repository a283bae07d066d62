"""Check numbers against the ranges declared in the schema."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from deepseek_exp.errors import Problem


def range_problems(section: Any, prefix: str) -> Iterator[Problem]:
    """Yield a problem for each out-of-range number in a section and its subsections."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from range_problems(value, f"{prefix}{field.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield Problem(prefix + field.name, value, "is not a finite number", "use a number")
        elif value is not None:
            for name, bound in field.metadata.get("bounds", {}).items():
                holds, words, fix = BOUNDS[name]
                if not holds(value, bound):
                    shown = f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
                    yield Problem(prefix + field.name, value, f"must be {words} {shown}", fix.format(shown))


BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str, str]] = {
    "ge": (lambda v, b: v >= b, "at least", "use {} or more"),
    "gt": (lambda v, b: v > b, "greater than", "use more than {}"),
    "le": (lambda v, b: v <= b, "at most", "use {} or less"),
    "lt": (lambda v, b: v < b, "less than", "use less than {}"),
}
