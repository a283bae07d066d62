"""Rules of the section `optim`: the schedule, and factors on the learning rate of parameters."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase

from deepseek_exp.config.enums import Do, Schedule
from deepseek_exp.config.matrices import adapted
from deepseek_exp.config.parameter_groups import parameter_names
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.errors import Problem

KEY = "optim.lr_multipliers"


def lr_multiplier_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems for factors that are no numbers, and for patterns that match no parameter of the model."""
    if not isinstance(exp.optim.lr_multipliers, dict):
        return  # reported with the other mappings
    names = _trained(exp) if exp.optim.lr_multipliers else []
    if exp.optim.lr_multipliers and not names:
        return  # lora.targets matches nothing, which is reported
    for pattern, factor in exp.optim.lr_multipliers.items():
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not is_number or not math.isfinite(factor) or factor < 0:
            rule = f"is not a number of at least 0, as the factor of {pattern}"
            yield Problem(KEY, factor, rule, "use a factor such as 0.1; 0 leaves the weights as they are")
        if not any(fnmatchcase(name, str(pattern)) for name in names):
            near = difflib.get_close_matches(str(pattern), names, n=1, cutoff=0.5)
            fix = f"use a pattern of the {len(names)} names, such as {(near or names)[0]}, blocks.0.* or *.wo.*"
            yield Problem(KEY, pattern, "matches no parameter that is trained", fix)


def _trained(exp: ExperimentConfig) -> list[str]:
    """Return the names of the parameters that are trained: the adapters, or without any all parameters."""
    if not exp.lora.rank:
        return parameter_names(exp.model)
    return [f"{name}.{part}" for name in adapted(exp.model, exp.lora) for part in ("lora_a", "lora_b")]


def unread_optim_problems(exp: ExperimentConfig, named: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each key of a decay that the command line sets and the schedule does not read."""
    if exp.optim.schedule is Schedule.wsd or exp.do is Do.plan:
        return
    for name in ("decay_fraction", "decay_shape"):
        path = f"optim.{name}"
        if path in named:
            value = getattr(exp.optim, name)
            rule = f"has no effect while optim.schedule='{exp.optim.schedule.value}'"
            yield Problem(path, value, rule, f"leave {path} out, or set optim.schedule=wsd")
