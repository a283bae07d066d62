"""Express the remaining jobs of an interrupted sweep as overrides of new sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

# Sweeps that choose different values each time.
RANDOM = ("shuffle(", "interval(")


def grid(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides for each key of a sweep, in Hydra's order: the last key changes fastest.

    Args:
        overrides: overrides of the complete sweep.
    """
    found = {}
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        key = override.get_key_element()
        swept = override.is_sweep_override()
        found[key] = [f"{key}={value}" for value in override.sweep_string_iterator()] if swept else [text]
    return found


def n_jobs(overrides: Sequence[str]) -> int:
    """Return the number of jobs of a sweep."""
    return math.prod(len(values) for values in grid(overrides).values())


def rest(overrides: Sequence[str], n_done: int) -> list[list[str]]:
    """Return the overrides of sweeps that together run the jobs after the first `n_done`, each once and in order.

    Example: if a, b and c have 3, 2 and 2 values and 5 jobs are done, these are the rest of c for this a and b, then
    the rest of b for this a, then the rest of a.

    Args:
        overrides: overrides of the complete sweep.
        n_done: number of jobs that need not be run again.
    """
    keys = grid(overrides)
    sizes = [len(values) for values in keys.values()]
    digits, left = [], n_done
    for size in reversed(sizes):
        digits.insert(0, left % size)
        left //= size
    if left:
        return []
    found = []
    for level in reversed(range(len(sizes))):
        first = digits[level] + (level < len(sizes) - 1)
        if first < sizes[level]:
            of_level = [values[d : d + 1] for values, d in zip(keys.values(), digits[:level], strict=False)]
            of_level += [list(keys.values())[level][first:], *list(keys.values())[level + 1 :]]
            found.append([_joined(values) for values in of_level])
    return found


def _joined(values: Sequence[str]) -> str:
    """Return one override that sweeps over the values of several."""
    key = values[0].partition("=")[0]
    return values[0] if len(values) == 1 else f"{key}={','.join(value.partition('=')[2] for value in values)}"
