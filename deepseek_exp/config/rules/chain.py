"""Rules of the section `chain`: what its stages are called, what they do and what they start from."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator
from typing import Any

from deepseek_exp.config.chain_section import ChainConfig, StageConfig
from deepseek_exp.config.enums import Do, Launcher
from deepseek_exp.config.rules.bounds import range_problems
from deepseek_exp.config.rules.branches import MERGING
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.errors import Problem

SCRATCH = "scratch"
# Sections and keys that belong to the chain as a whole.
SHARED = ("chain", "hydra", "branches", "init_from", "launch", "output_dir", "recipes", "resume", "tracking")
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}"
# Names that mean something else: a start, or an alias that MLflow's registry keeps for itself.
TAKEN = rf"{SCRATCH}|last|latest|v\d+"


def saves(stage: StageConfig) -> bool:
    """Return whether a stage leaves a checkpoint that others can start from."""
    return stage.do.is_training


def starts(chain: ChainConfig) -> dict[str, str | None]:
    """Return what each stage starts from: a stage, a run, a folder or `SCRATCH`; None if nothing is named."""
    found: dict[str, str | None] = {}
    above = None
    for name, stage in chain.stages.items():
        found[name] = above if stage.start is None else stage.start
        above = name if saves(stage) else above
    return found


def in_order(chain: ChainConfig) -> list[str]:
    """Return the stages so that each comes after those whose weights it reads; those of a cycle are left out."""
    start, done = starts(chain), list[str]()
    reads = {
        name: {start[name], stage.reference, *stage.branches.values()} & chain.stages.keys()
        for name, stage in chain.stages.items()
    }
    while True:
        ready = [n for n in chain.stages if n not in done and reads[n] <= set(done)]
        if not ready:
            return done
        done.append(ready[0])


def chain_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield what is wrong with a chain, apart from what its stages set."""
    chain = exp.chain
    yield from range_problems(chain, "chain.")
    if exp.do not in (Do.train, Do.plan):
        rule = "is not what a chain does, whose stages each have a verb"
        yield Problem("do", exp.do.value, rule, "leave do out, use do=plan, or remove the stages of chain.stages")
    if exp.resume is not None:
        rule = "cannot be used with a chain, which continues where it was"
        yield Problem("resume", exp.resume, rule, "leave resume out and start the same command again")
    if exp.launch.launcher is not Launcher.local:
        rule = "cannot be used with a chain, which starts one stage after the other on this machine"
        yield Problem("launch.launcher", exp.launch.launcher.value, rule, "use launch=local")
    if exp.chain.stop_if.loss_rise_percent is not None and not chain.yardstick.tokens:
        rule = "needs a yardstick, and chain.yardstick.tokens=0"
        fix = "set chain.yardstick.tokens=100000"
        yield Problem("chain.stop_if.loss_rise_percent", chain.stop_if.loss_rise_percent, rule, fix)
    for name in chain.only:
        if name not in chain.stages:
            yield Problem("chain.only", name, f"is not a stage ({_names(chain)})", _near(name, chain))
    malformed = {name: stage for name, stage in chain.stages.items() if not isinstance(stage, StageConfig)}
    for name, value in malformed.items():
        yield from _form_problems(f"chain.stages.{name}", value)
    if malformed:
        return
    for name, stage in chain.stages.items():
        yield from _stage_problems(name, stage)
    yield from _start_problems(chain, exp.init_from)


def unchained_problems(exp: ExperimentConfig, named: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each key of `chain` that the command line sets although there are no stages."""
    for path in sorted(named):
        if path.startswith("chain."):
            fix = f"leave {path} out, or take a recipe with stages; +chain.stages.<name>.do=train adds one"
            value: Any = exp
            for name in path.split("."):
                value = getattr(value, name, None)
            yield Problem(path, value, "has no effect without stages in chain.stages", fix)


def _form_problems(key: str, value: Any) -> Iterator[Problem]:
    """Yield what keeps the value of a stage from being one."""
    names = [f.name for f in dataclasses.fields(StageConfig)]
    if not isinstance(value, dict):
        yield Problem(key, value, f"is not a mapping of {', '.join(names)}", f"set {key}.do, as in +{key}.do=train")
        return
    for name in value.keys() - set(names):
        fix = f"put what the stage changes into {key}.set"
        yield Problem(f"{key}.{name}", value[name], f"is not one of {', '.join(names)}", fix)
    if value.get("do") not in list(Do):
        yield Problem(f"{key}.do", value.get("do"), "is not a verb", f"use one of {_verbs()}")
    for role in ("start", "reference"):
        if value.get(role) is not None and not isinstance(value[role], str):
            fix = "name a stage, a run or a folder; quote a run id of digits"
            yield Problem(f"{key}.{role}", value[role], "is not a text", fix)
    branches = value.get("branches", {})
    if not isinstance(branches, dict) or not all(isinstance(stage, str) for stage in branches.values()):
        fix = f"name a stage per domain, as in +{key}.branches.law=<stage>"
        yield Problem(f"{key}.branches", branches, "is not a mapping of domains to stages", fix)
    if not isinstance(value.get("set", {}), dict):
        yield Problem(f"{key}.set", value["set"], "is not a mapping", f"set its keys, as in +{key}.set.optim.lr=1e-4")


def _verbs() -> str:
    """Return the verbs of which a stage does one."""
    return ", ".join(do.value for do in Do if do.is_training or do is Do.eval)


def _stage_problems(name: str, stage: StageConfig) -> Iterator[Problem]:
    key = f"chain.stages.{name}"
    if not re.fullmatch(NAME, name) or re.fullmatch(TAKEN, name):
        rule = "is not a name of a stage: letters, digits, _ and - within 60 characters, and not scratch, last, v1"
        yield Problem("chain.stages", name, rule, "rename the stage")
    if not saves(stage) and stage.do is not Do.eval:
        yield Problem(f"{key}.do", stage.do.value, "is not what a stage does", f"use one of {_verbs()}")
    for path in map(str, stage.set):
        if path.split(".")[0] in SHARED:
            rule = "is shared by all stages of a chain"
            fix = f"set {path} outside of the stages"
            if path.split(".")[0] in ("branches", "init_from", "resume"):
                fix = f"use {key}.{'branches' if path.startswith('branches') else 'start'}"
            yield Problem(f"{key}.set.{path}", stage.set[path], rule, fix)
    if stage.reference is not None and stage.do is not Do.dpo:
        fix = f"leave {key}.reference out"
        yield Problem(f"{key}.reference", stage.reference, f"is not read by do={stage.do.value}", fix)
    if "do" in stage.set:
        yield Problem(f"{key}.set.do", stage.set["do"], "is set outside of `set`", f"set {key}.do instead")


def _start_problems(chain: ChainConfig, init_from: str | None) -> Iterator[Problem]:
    start = starts(chain)
    cyclic = [name for name in chain.stages if name not in in_order(chain)]
    for name in chain.stages:
        key, source = f"chain.stages.{name}.start", start[name]
        reference = chain.stages[name].reference
        if name in cyclic and source not in cyclic and reference in cyclic:
            rule = f"is not trained before it ({', '.join(cyclic)})"
            yield Problem(f"chain.stages.{name}.reference", reference, rule, "name a stage that does not start from it")
        elif name in cyclic:
            rule = f"leads back to a stage that starts from it ({', '.join(cyclic)})"
            yield Problem(key, source, rule, "have one of them start from another stage, or from scratch")
        elif source in chain.stages and not saves(chain.stages[source]):
            rule = f"is a stage that does {chain.stages[source].do.value}, which saves no weights"
            yield Problem(key, source, rule, "name a stage that trains")
        elif chain.stages[name].do is Do.eval and (source == SCRATCH or (source is None and init_from is None)):
            rule = "leaves do=eval without a checkpoint"
            yield Problem(key, source, rule, "name a stage that trains, a run or a folder")
        elif reference in chain.stages and not saves(chain.stages[reference]):
            rule = f"is a stage that does {chain.stages[reference].do.value}, which saves no weights"
            yield Problem(f"chain.stages.{name}.reference", reference, rule, "name a stage that trains")
        else:
            yield from _branch_problems(name, chain)


def _branch_problems(name: str, chain: ChainConfig) -> Iterator[Problem]:
    """Yield a problem for each branch of a stage that is no training from the same start."""
    start, stage = starts(chain), chain.stages[name]
    if stage.branches and stage.do not in MERGING:
        rule, fix = f"are not merged by do={stage.do.value}", "merge them in a stage of do=train that it starts from"
        yield Problem(f"chain.stages.{name}.branches", ", ".join(stage.branches), rule, fix)
    for domain, branch in stage.branches.items():
        key = f"chain.stages.{name}.branches.{domain}"
        if branch not in chain.stages:
            yield Problem(key, branch, f"is not a stage ({_names(chain)})", _near(branch, chain))
        elif not saves(chain.stages[branch]):
            rule = f"is a stage that does {chain.stages[branch].do.value}, which saves no weights"
            yield Problem(key, branch, rule, "name a stage that trains")
        elif start[name] not in chain.stages:
            rule = "is merged into a model that is not a stage"
            yield Problem(key, branch, rule, f"set chain.stages.{name}.start to the stage that its branches start from")
        elif start[name] not in (branch, start[branch]):
            rule = f"starts from {start[branch] or SCRATCH}, and {name} from {start[name]}: branches share their start"
            yield Problem(key, branch, rule, f"set chain.stages.{name}.start to the stage that all of them start from")


def _names(chain: ChainConfig) -> str:
    return f"stages: {', '.join(chain.stages)}"


def _near(name: str, chain: ChainConfig) -> str:
    near = difflib.get_close_matches(name, list(chain.stages), n=1)
    return f"use {near[0]}" if near else f"use one of {', '.join(chain.stages)}"
