r"""Verifiable rewards: functions of a completion and of the row that its prompt came from.

A reward is any function `(completion: str, row: Mapping[str, Any], ...) -> float` of a module that a configuration may
name; arguments after the first two are set in the configuration:

    grpo.rewards.answer = {_target_: deepseek_exp.finetune.rewards.numeric_match, tolerance: 0.01, weight: 1.0}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# A number: digits with optional separators of thousands, an optional fraction and exponent.
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|-?\.\d+(?:[eE][-+]?\d+)?")


def exact_match(completion: str, row: Mapping[str, Any]) -> float:
    """Return 1 if the completion is the row's answer, except for white space around both; else 0."""
    return float(completion.strip() == str(row["answer"]).strip())


def numeric_match(completion: str, row: Mapping[str, Any], tolerance: float = 0.0) -> float:
    """Return 1 if the last number of the completion equals the last number of the row's answer; else 0.

    So an answer may explain itself first, as those of GSM8K do ("... #### 72"). Thousands may be separated by commas.

    Args:
        completion: the sampled text.
        row: holds `answer`, a number or a text with one.
        tolerance: largest relative difference that counts as equal.
    """
    found, wanted = last_number(completion), last_number(str(row["answer"]))
    return float(found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=tolerance))


def regex_match(completion: str, row: Mapping[str, Any], pattern: str) -> float:
    """Return 1 if a regular expression occurs in the completion; else 0.

    If it has a group named `answer`, the group of the first occurrence must also be the row's answer, except for white
    space around both.
    """
    found = re.search(pattern, completion)
    if found is None:
        return 0.0
    said = found.groupdict().get("answer")
    return float("answer" not in found.groupdict() or (said or "").strip() == str(row["answer"]).strip())


def last_number(text: str) -> float | None:
    """Return the last number in a text, or None."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
