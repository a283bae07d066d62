"""Rules of the section `lora`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from deepseek_exp.config.enums import Do
from deepseek_exp.config.matrices import Shape, adapted, matches, matrix_shapes
from deepseek_exp.config.rules.values import is_file
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.disk import expand
from deepseek_exp.errors import Problem

# What patterns match, for messages.
EXAMPLES = "*.w*, blocks.*.attention.*, *.experts.*, head"


def lora_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems for patterns that match nothing, and for a rank that no matrix can have."""
    lora = exp.lora
    if not lora.rank:
        return
    shapes = matrix_shapes(exp.model)
    if not lora.targets:
        yield Problem("lora.targets", lora.targets, "selects no matrix", f"name some, such as {EXAMPLES}")
    for pattern in lora.targets:
        if not any(matches(name, pattern) for name in shapes):
            yield _no_match("lora.targets", pattern, exp, shapes)
    for pattern in lora.exclude:
        if not any(matches(name, pattern) for name in shapes):
            yield _no_match("lora.exclude", pattern, exp, shapes)
    found = adapted(exp.model, lora)
    if lora.targets and lora.exclude and not found:
        rule = f"leaves no matrix of lora.targets={lora.targets} to adapt"
        yield Problem("lora.exclude", lora.exclude, rule, "exclude fewer")
    yield from _rank(lora.rank, found)
    if lora.path is not None:
        yield from _file(exp, expand(lora.path))


def _file(exp: ExperimentConfig, folder: Path) -> Iterator[Problem]:
    """Yield a problem if there is no adapter in the folder, or one of another rank or alpha."""
    lora = exp.lora
    if exp.init_from is None and exp.do is not Do.plan:
        rule = "changes the weights that it was trained with, and these are drawn from the seed"
        yield Problem("lora.path", lora.path, rule, "set init_from to the model that it is for")
        return
    for name, keys in (("adapter.json", ("rank", "alpha")), ("adapter_config.json", ("r", "lora_alpha"))):
        if not is_file(folder / name):
            continue
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            rank, alpha = (float(values[key]) for key in keys)
        except (OSError, LookupError, RecursionError, TypeError, ValueError) as error:
            rule = f"has a {name} that cannot be read ({type(error).__name__}: {error})"
            yield Problem("lora.path", lora.path, rule, "fetch or export the adapter again")
            return
        for key, asked, there in (("rank", lora.rank, rank), ("alpha", lora.alpha, alpha)):
            if asked != there:
                rule = f"differs from the {there:g} of lora.path={lora.path}"
                yield Problem(f"lora.{key}", asked, rule, f"set lora.{key}={there:g}")
        return
    rule = "has neither adapter.json nor adapter_config.json"
    yield Problem("lora.path", lora.path, rule, "name a folder of do=export with export.format=adapter or peft")


def _no_match(key: str, pattern: str, exp: ExperimentConfig, shapes: Mapping[str, Shape]) -> Problem:
    rule = f"matches none of the {len(shapes)} matrices of {exp.model.version}"
    if exp.model.tie_embeddings and matches("head.weight", pattern):
        return Problem(key, pattern, f"{rule}, whose output head is its embedding", "name embedding instead")
    last = list(shapes)[-1].removesuffix(".weight")
    return Problem(key, pattern, rule, f"use patterns of names such as {last}: {EXAMPLES}")


def _rank(rank: int, found: Mapping[str, Shape]) -> Iterator[Problem]:
    """Yield a problem if an adapter would have more parameters than a full change of its matrix needs."""
    if not found:
        return
    name, shape = min(found.items(), key=lambda item: min(item[1][-2:]))
    if rank > min(shape[-2:]):
        rule = f"is more than {name} of shape {' x '.join(map(str, shape))} can have"
        yield Problem("lora.rank", rank, rule, f"use {min(shape[-2:])} or less, or exclude it with lora.exclude")
