"""What an answer says: numbers in text, and text up to where an answer ends."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# A sign counts unless it stands behind a word or number, as in 2018-2019.
NUMBER = r"(?:(?<!\w)[-+])?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?:(?<!\w)[-+])?\$?\.\d+"
SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "%": 0.01, "percent": 0.01}
_MARKED = re.compile(rf"####\s*({NUMBER})")
_SCALED = re.compile(rf"(\()?\s?({NUMBER})\s?(\))?\s*({'|'.join(map(re.escape, SCALES))})?", re.IGNORECASE)


def marked_number(text: str) -> float | None:
    """Return the number after the first `####`, the way GSM8K marks answers; None if there is none."""
    found = _MARKED.search(text)
    return None if found is None else _number(found[1])


def scaled_numbers(text: str) -> list[float]:
    """Return the numbers of a text in order, with their scale: `$1.2 million` is 1.2e6, `5%` 0.05, `(3)` -3."""
    numbers = []
    for opening, number, closing, scale in _SCALED.findall(text):
        sign = -1.0 if opening and closing else 1.0
        numbers.append(sign * _number(number) * SCALES.get(scale.lower(), 1.0))
    return numbers


def is_close(found: float | None, wanted: float, tolerance: float) -> bool:
    """Return whether a number is within a relative tolerance of the wanted one."""
    return found is not None and math.isclose(found, wanted, rel_tol=tolerance, abs_tol=1e-12)


def until(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first occurrence of any stop."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _number(text: str) -> float:
    return float(re.sub(r"[$,\s]", "", text))
