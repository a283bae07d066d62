"""Rules of the section `data`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from deepseek_exp.config import text_files
from deepseek_exp.config.enums import Order, Source
from deepseek_exp.config.rules.bounds import range_problems
from deepseek_exp.config.rules.values import is_file, path_problems
from deepseek_exp.config.schema import ExperimentConfig, MixturePart
from deepseek_exp.disk import expand
from deepseek_exp.errors import Problem

# The files that a source reads, by path.
ROWS = ".jsonl .jsonl.gz"
KINDS = {
    Source.text: ".txt .md .jsonl .jsonl.gz .parquet",
    Source.chat: ROWS,
    Source.preference: ROWS,
    Source.prompts: ROWS,
}


def vocabulary_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem if the tokenizer has more entries than the embedding has rows."""
    if exp.data.vocab_size > exp.model.vocab_size:
        rule = f"is more than model.vocab_size={exp.model.vocab_size}"
        yield Problem(
            "data.vocab_size", exp.data.vocab_size, rule, f"set data.vocab_size={exp.model.vocab_size} or less"
        )


def data_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems for texts that do not exist or that `data.source` does not read."""
    d = exp.data
    reads = d.source in KINDS and not (d.source is Source.chat and d.mixture)
    if reads and d.path is None:
        rule = f"is needed for data.source='{d.source.value}'"
        yield Problem("data.path", None, rule, f"set data.path to a file, folder or glob of {KINDS[d.source]}")
    for name in ("path", "valid_path"):
        value = getattr(d, name)
        if value is not None and not reads:
            rule = f"is not read by data.source='{d.source.value}'"
            fix = "add data=text"
            if d.mixture or d.source is Source.mixture:
                fix = f"set data.{name}=null and set it for each part, as in +data.mixture.<name>.{name}={value}"
            yield Problem(f"data.{name}", value, rule, fix)
        elif value is not None:
            yield from _exists(f"data.{name}", value)
    if d.tokenizer is not None and not is_file(expand(d.tokenizer)):
        fix = "name a tokenizer.json or SentencePiece .model, or set data.tokenizer=null to train one"
        yield Problem("data.tokenizer", d.tokenizer, f"is no file (looked in {Path.cwd()})", fix)
    if d.source is Source.synthetic and d.max_bytes is None:
        yield Problem("data.max_bytes", None, "is needed for data.source='synthetic'", "set data.max_bytes=300000")


def mixture_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield the problems of the parts of a mixture."""
    d = exp.data
    if d.source is not Source.mixture and not (d.source is Source.chat and d.mixture):
        if d.mixture:
            rule = f"has parts, and data.source='{d.source.value}' reads none"
            yield Problem("data.mixture", ", ".join(d.mixture), rule, "add data=mixture, or leave the parts out")
        return
    if not d.mixture:
        fix = "add +data.mixture.<name>.path=<file, folder or glob> +data.mixture.<name>.weight=1 for each part"
        yield Problem("data.mixture", {}, "has no part, and data.source='mixture' needs one at least", fix)
    if d.source is Source.mixture and d.order is not Order.shuffled:
        rule = "cannot be used with data.source='mixture', whose neighbours in a lane are of different texts"
        yield Problem("data.order", d.order.value, rule, "set data.order=shuffled, or train on one text")
    for name, part in d.mixture.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            rule = "is not a name of letters, digits, _ and -, which metrics and keys are named with"
            yield Problem("data.mixture", name, rule, "rename the part")
        yield from _part(f"data.mixture.{name}", part)


def _part(key: str, part: Any) -> Iterator[Problem]:
    names = ", ".join(f.name for f in dataclasses.fields(MixturePart))
    if not isinstance(part, MixturePart):
        rule, fix = f"is not a part, which has the keys {names}", f"write +{key}.path=<file, folder or glob>"
        if isinstance(part, dict):
            unknown = next(k for k in part if k not in names.split(", "))
            key, part, rule = f"{key}.{unknown}", part[unknown], f"is not a key of a part ({names})"
            fix = "correct the name or remove it"
        yield Problem(key, part, rule, fix)
        return
    if isinstance(part.weight, bool) or not isinstance(part.weight, int | float):
        yield Problem(f"{key}.weight", part.weight, "is not a number", f"use a number, for example {key}.weight=1")
    else:
        yield from range_problems(dataclasses.replace(part, path="", valid_path=""), f"{key}.")
    for name in ("path", "valid_path"):
        value = getattr(part, name)
        if value == MISSING or (name == "path" and value is None):
            yield Problem(f"{key}.path", None, "has no value", f"add +{key}.path=<file, folder or glob>")
        elif value is not None and not isinstance(value, str):
            yield Problem(f"{key}.{name}", value, "is not a text", "name a file, folder or glob")
        elif value is not None:
            yield from _exists(f"{key}.{name}", value)


def _exists(key: str, path: str) -> Iterator[Problem]:
    flaws = list(path_problems(key, path))
    if flaws:  # the general check does not reach the parts of a mixture
        yield from flaws if key.startswith("data.mixture.") else ()
        return
    fix = "name a file, folder or glob that does"
    try:
        if not text_files.exists(path):
            yield Problem(key, path, f"does not exist (looked in {Path.cwd()})", fix)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        yield Problem(key, path, f"cannot be read ({reason})", "name a file, folder or glob that can be")
