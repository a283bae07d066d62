"""The classes that a `_target_` may name, and the arguments they accept.

The arguments are listed here so that mistakes are found before PyTorch and Lightning are imported.
`tests/config/test_class_rules.py` compares the lists with the signatures of the classes.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deepseek_exp.config import ROOT, ExperimentConfig
from deepseek_exp.config.parameter_groups import MUON
from deepseek_exp.errors import Problem

OPTIMIZER_MODULE, CALLBACK_MODULE, OWN_MODULE = (
    "torch.optim",
    "pytorch_lightning.callbacks",
    "deepseek_exp.train.callbacks",
)
MUON_MODULE = MUON.rpartition(".")[0]
# A YAML file can only import classes of these modules.
ALLOWED_MODULES = (OPTIMIZER_MODULE, MUON_MODULE, CALLBACK_MODULE, OWN_MODULE)
# Optimizer arguments that are set by keys of `optim`.
SET_ELSEWHERE = {"lr": "optim.lr", "weight_decay": "optim.weight_decay"}
# Our callbacks that are part of every run.
BUILT_IN = ("Metrics", "Progress", "Checkpoints")


@dataclass(frozen=True)
class Kind:
    """Accepted values of an argument: a description, an example for the fix, and the predicate."""

    words: str
    example: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any, first: Callable[[Any], bool], second: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and first(value[0]) and second(value[1])


def _in_unit(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _not_negative(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_duration(value: Any) -> bool:
    if isinstance(value, dict):
        return (
            bool(value)
            and value.keys() <= {"days", "hours", "minutes", "seconds"}
            and all(map(_is_number, value.values()))
        )
    return isinstance(value, str) and re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value) is not None


def _one_of(*options: str | None) -> Kind:
    shown = ["null" if o is None else o for o in options]
    return Kind(f"one of {', '.join(shown)}", shown[0], lambda v: v in options)


FLAG = Kind("true or false", "false", lambda v: isinstance(v, bool))
SWITCH = Kind("true, false or null", "null", lambda v: v is None or isinstance(v, bool))
NUMBER = Kind("a number", "0", _is_number)
OPTIONAL = Kind("a number or null", "null", lambda v: v is None or _is_number(v))
NOT_NEGATIVE = Kind("a number of at least 0", "0", _not_negative)
POSITIVE = Kind("a number above 0", "1", lambda v: _is_number(v) and v > 0)
UNIT = Kind("a number from 0 up to 1, 1 left out", "0.9", _in_unit)
COUNT = Kind("a whole number of at least 1", "1", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1)
BETAS = Kind("two numbers from 0 up to 1, 1 left out", "[0.9,0.95]", lambda v: _is_pair(v, _in_unit, _in_unit))
ETAS = Kind(
    "a number between 0 and 1 and one above 1",
    "[0.5,1.2]",
    lambda v: _is_pair(v, lambda a: _is_number(a) and 0 < a < 1, lambda b: _is_number(b) and b > 1),
)
STEPS = Kind(
    "the smallest and the largest step, two numbers above 0",
    "[1e-6,50]",
    lambda v: _is_pair(v, POSITIVE.holds, POSITIVE.holds) and v[0] < v[1],
)
EPSILONS = Kind(
    "null or a number of at least 0, and a number of at least 0",
    "[null,1e-3]",
    lambda v: _is_pair(v, lambda a: a is None or _not_negative(a), _not_negative),
)
DECAY = Kind("a number of at most 0", "-0.8", lambda v: _is_number(v) and v <= 0)
METRIC = Kind("a metric of a validation", "val/loss", lambda v: isinstance(v, str) and v.startswith("val/"))
DURATION = Kind("days:hours:minutes:seconds", "00:12:00:00", _is_duration)

_ADAM = {"betas": BETAS, "eps": NOT_NEGATIVE, "foreach": SWITCH}
OPTIMIZERS: dict[str, dict[str, Kind]] = {
    "AdamW": {**_ADAM, "amsgrad": FLAG, "fused": SWITCH},
    "Adam": {**_ADAM, "amsgrad": FLAG, "fused": SWITCH, "decoupled_weight_decay": FLAG},
    "SGD": {"momentum": NOT_NEGATIVE, "dampening": NUMBER, "nesterov": FLAG, "foreach": SWITCH, "fused": SWITCH},
    "RMSprop": {"alpha": UNIT, "eps": NOT_NEGATIVE, "momentum": NOT_NEGATIVE, "centered": FLAG, "foreach": SWITCH},
    "NAdam": {**_ADAM, "momentum_decay": NOT_NEGATIVE, "decoupled_weight_decay": FLAG},
    "RAdam": {**_ADAM, "decoupled_weight_decay": FLAG},
    "Adamax": _ADAM,
    "Adafactor": {
        "beta2_decay": DECAY,
        "eps": EPSILONS,
        "d": Kind("a number of at least 1", "1", lambda v: _is_number(v) and v >= 1),
        "foreach": SWITCH,
    },
    "Adagrad": {
        "lr_decay": NOT_NEGATIVE,
        "initial_accumulator_value": NOT_NEGATIVE,
        "eps": NOT_NEGATIVE,
        "foreach": SWITCH,
        "fused": SWITCH,
    },
    "Adadelta": {"rho": UNIT, "eps": Kind("a number above 0", "1e-6", POSITIVE.holds), "foreach": SWITCH},
    "Rprop": {"etas": ETAS, "step_sizes": STEPS, "foreach": SWITCH},
    "ASGD": {"lambd": NOT_NEGATIVE, "alpha": NOT_NEGATIVE, "t0": NOT_NEGATIVE, "foreach": SWITCH},
}
OWN_OPTIMIZERS: dict[str, dict[str, Kind]] = {
    "Muon": {"momentum": UNIT, "nesterov": FLAG, "ns_steps": COUNT, "betas": BETAS, "eps": NOT_NEGATIVE},
}
CALLBACKS: dict[str, dict[str, Kind]] = {
    "EarlyStopping": {
        "monitor": METRIC, "min_delta": NUMBER, "patience": COUNT, "verbose": FLAG, "mode": _one_of("min", "max"),
        "strict": FLAG, "check_finite": FLAG, "stopping_threshold": OPTIONAL, "divergence_threshold": OPTIONAL,
        "log_rank_zero_only": FLAG,
    },
    "LearningRateMonitor": {
        "logging_interval": _one_of("step", "epoch", None), "log_momentum": FLAG, "log_weight_decay": FLAG,
    },
    "Timer": {"duration": DURATION, "interval": _one_of("step", "epoch"), "verbose": FLAG},
    "DeviceStatsMonitor": {"cpu_stats": SWITCH},
    "ModelSummary": {"max_depth": NUMBER},
}  # fmt: skip
REQUIRED = {"EarlyStopping": "monitor", "Timer": "duration"}


def class_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems for classes that are not supported, and for arguments that they do not accept."""
    optimizers = {OPTIMIZER_MODULE: OPTIMIZERS, MUON_MODULE: OWN_OPTIMIZERS}
    yield from _node_problems("optim.optimizer", exp.optim.optimizer, optimizers)
    for name, node in exp.trainer.callbacks.items():
        known = {CALLBACK_MODULE: CALLBACKS, OWN_MODULE: own_callbacks()}
        yield from _node_problems(f"trainer.callbacks.{name}", node, known)


def _node_problems(path: str, node: Any, known: dict[str, dict[str, dict[str, Kind]]]) -> Iterator[Problem]:
    target = node.get("_target_") if isinstance(node, dict) else None
    if target is None:
        yield Problem(path, node, "has no _target_", f"set {path}._target_ to a class")
        return
    if not re.fullmatch(rf"({'|'.join(map(re.escape, ALLOWED_MODULES))})\.[A-Z]\w*", str(target)):
        rule = f"is not a class of the modules that a configuration may name ({', '.join(ALLOWED_MODULES)})"
        yield Problem(f"{path}._target_", target, rule, "use a class of those modules")
        return
    module, _, name = str(target).rpartition(".")
    classes = known.get(module, {})
    if name not in classes:
        named = [f"{m}.{n}" for m, those in known.items() for n in those]
        near = difflib.get_close_matches(str(target), named, n=1)
        some = f"use {near[0]}, or another" if near else "use one"
        yield Problem(f"{path}._target_", target, "is not a class that can work here", f"{some} of {', '.join(named)}")
        return
    yield from _argument_problems(path, str(target), {k: v for k, v in node.items() if k != "_target_"}, classes[name])


def _argument_problems(path: str, target: str, given: dict[str, Any], takes: dict[str, Kind]) -> Iterator[Problem]:
    required = REQUIRED.get(target.rpartition(".")[2])
    if required is not None and required not in given:
        fix = f"add +{path}.{required}={takes[required].example}"
        yield Problem(f"{path}.{required}", None, f"is needed by {target}", fix)
    for name, value in given.items():
        key = f"{path}.{name}"
        if name in SET_ELSEWHERE and path == "optim.optimizer":
            fix = f"leave it out, and set {SET_ELSEWHERE[name]}={value}"
            yield Problem(key, value, f"has no effect next to {SET_ELSEWHERE[name]}", fix)
        elif name not in takes:
            rule = f"is not an argument of {target} that may be set ({', '.join(takes) or 'it has none'})"
            yield Problem(key, value, rule, f"remove it: ~{key}")
        elif not takes[name].holds(value):
            yield Problem(key, value, f"is not {takes[name].words}", f"use {key}={takes[name].example}")
    if given.get("fused") is True and given.get("foreach") is True:
        rule = "cannot be used with fused=true, which is another way to compute the same"
        yield Problem(f"{path}.foreach", True, rule, f"remove it: ~{path}.foreach")
    if given.get("nesterov") is True and (not given.get("momentum") or given.get("dampening")):
        yield Problem(f"{path}.nesterov", True, "needs a momentum and no dampening", f"add +{path}.momentum=0.9")


ANY = Kind("anything", "null", lambda v: True)


def own_callbacks() -> dict[str, dict[str, Kind]]:
    """Return the callback classes in callbacks.py with their arguments, except those that are part of every run."""
    source = (ROOT / "deepseek_exp" / "train" / "callbacks.py").read_text(encoding="utf-8")
    return {name: arguments for name, arguments in callbacks_in(source).items() if name not in BUILT_IN}


def callbacks_in(source: str) -> dict[str, dict[str, Kind]]:
    """Return the subclasses of Callback in a module's source, with the arguments of each."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Callback") for base in node.bases):
            made = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
            names = [a.arg for f in made for a in [*f.args.args[1:], *f.args.kwonlyargs]]
            found[node.name] = dict.fromkeys(names, ANY)
    return found
