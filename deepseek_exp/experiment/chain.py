"""Compose the stages of a chain: each is the shared tree with what the stage sets, and its start's model."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from deepseek_exp import huggingface, planner
from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.saved_config import literal
from deepseek_exp.config.chain_section import ChainConfig, StageConfig
from deepseek_exp.config.compose import (
    check_tree,
    compose_run,
    compose_tree,
    leaves,
    option_groups,
    override_key,
    select,
    structure_problems,
    usable,
)
from deepseek_exp.config.enums import Do, Source
from deepseek_exp.config.explain import parse_one
from deepseek_exp.config.keys import SECTION_OF, schema_keys
from deepseek_exp.config.machine import Machine
from deepseek_exp.config.rules.branches import domain_problems
from deepseek_exp.config.rules.chain import SCRATCH, chain_problems, in_order, saves, starts
from deepseek_exp.config.rules.chat import unread_chat_problems
from deepseek_exp.config.rules.model import unread_problems
from deepseek_exp.config.rules.values import path_problems, untracked_problems
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.disk import expand
from deepseek_exp.errors import ConfigError, Problem, UserError, show
from deepseek_exp.experiment.init_from import FREE, is_release, names_a_run, start_from
from deepseek_exp.experiment.reference import other_model, with_reference

# Sources of separate rows, which are no running text.
WITHOUT_TEXT = (Source.preference, Source.prompts)
OPTION = r"[\w./-]+"  # a group's option that needs no quotes
ENTRY = r"[\w-]+"  # a name in a free mapping that can be part of a path


@dataclass(frozen=True)
class Stage:
    """One stage of a chain, composed and checked.

    Attributes:
        name: its name.
        do: its verb.
        start: the stage whose weights it starts from; None if they come from elsewhere.
        reference: the stage whose weights are its reference policy; None if it has none or it comes from elsewhere.
        branches: domain -> the stage whose weights are merged into it.
        tree: the tree of its job. Without the path of a start that is a stage, which is known once that has run.
        exp: the same as dataclasses.
        overrides: the command line that composes it.
        size: the option of the group `size`.
        own_tokenizer: whether data.tokenizer is set by hand, and not taken from the start.
    """

    name: str
    do: Do
    start: str | None
    reference: str | None
    branches: Mapping[str, str]
    tree: DictConfig
    exp: ExperimentConfig
    overrides: tuple[str, ...]
    size: str
    own_tokenizer: bool

    @property
    def reads(self) -> tuple[str, ...]:
        """The stages whose weights it reads."""
        return tuple(dict.fromkeys(name for name in (self.start, self.reference, *self.branches.values()) if name))


def compose_stages(root: DictConfig, overrides: Sequence[str], machine: Machine) -> tuple[list[Stage], list[Problem]]:
    """Compose and validate all stages of a chain.

    Args:
        root: the tree of the command line, of the schema's structure.
        overrides: the command line's overrides, each usable.
        machine: where the stages are to run.

    Returns:
        The stages, each after the one it starts from, and the problems of all of them; those of a stage begin with its
        name. If there are any, not all stages may be there.
    """
    exp = typing.cast(ExperimentConfig, OmegaConf.to_object(root))
    problems = list(chain_problems(exp))
    path = exp.chain.yardstick.path
    problems += path_problems("chain.yardstick.path", path) if path is not None else ()
    if problems:
        return [], problems
    shared = [o for o in overrides if not re.match(r"(do|chain|hydra)(\.|/|$)", override_key(o))]
    trees: dict[str, DictConfig] = {}
    found: list[Stage] = []
    said: dict[str, tuple[Problem, list[str]]] = {}
    for name in in_order(exp.chain):
        source = starts(exp.chain)[name]
        read = source, exp.chain.stages[name].reference
        if any(other in exp.chain.stages and other not in trees for other in read):
            continue  # what is wrong with its start or reference is reported
        tree, stage, flaws = _composed(name, exp.chain.stages[name], source, trees, shared, machine)
        for problem in flaws:
            said.setdefault(str(problem), (problem, []))[1].append(name)
        trees |= {} if tree is None else {name: tree}
        found += [] if stage is None else [stage]
    problems = [dataclasses.replace(p, key=f"{', '.join(names)}: {p.key}") for p, names in said.values()]
    problems += [*_keeping_problems(exp.chain, found), *_branch_problems(found)]
    return found, [*problems, *_yardstick_problems(exp.chain, found)]


def _branch_problems(stages: Sequence[Stage]) -> Iterator[Problem]:
    """Yield a problem for each branch that is not of the model that it is merged into."""
    moes = {stage.name: stage.exp.model.moe for stage in stages}
    for stage in stages:
        yield from domain_problems(f"chain.stages.{stage.name}.branches", stage.branches, moes[stage.name].domains)
        for name in stage.branches.values():
            if stage.start in moes and name in moes and moes[name].balance is not moes[stage.start].balance:
                rule = f"differs from the {moes[stage.start].balance.value} of {stage.start}, of which it is a branch"
                fix = f"leave it out of chain.stages.{name}.set"
                yield Problem(f"{name}: model.moe.balance", moes[name].balance.value, rule, fix)


def _keeping_problems(chain: ChainConfig, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Yield a problem for each stage that trains and saves nothing: a chain finds what is done by its checkpoint."""
    for stage in stages:
        if saves(chain.stages[stage.name]) and not stage.exp.trainer.keep_checkpoints:
            rule = "saves nothing, and the chain needs the weights of the stage"
            yield Problem(f"{stage.name}: trainer.keep_checkpoints", 0, rule, "use trainer.keep_checkpoints=1")


def _yardstick_problems(chain: ChainConfig, stages: Sequence[Stage]) -> Iterator[Problem]:
    """Yield a problem if the stages are to be compared on their texts, and none trains on text."""
    trained = [stage for stage in stages if saves(chain.stages[stage.name])]
    asked = chain.yardstick.tokens and chain.yardstick.path is None
    if asked and trained and all(stage.exp.data.source in WITHOUT_TEXT for stage in trained):
        rule = "is the text that each stage trains on, and none trains on text"
        fix = "set chain.yardstick.path to a text, or chain.yardstick.tokens=0"
        yield Problem("chain.yardstick.path", None, rule, fix)


def _composed(
    name: str,
    stage: StageConfig,
    source: str | None,
    before: Mapping[str, DictConfig],
    shared: Sequence[str],
    machine: Machine,
) -> tuple[DictConfig | None, Stage | None, list[Problem]]:
    """Compose one stage; return its tree, None if it has none; the stage, None if it has problems; and the problems."""
    words = list(set_words(stage.set))
    good, found = usable([*shared, *words])
    whole = compose_run(good)
    if whole is not None:
        cfg, size = whole[0], whole[1].hydra.runtime.choices["size"]
    else:
        (cfg, more), size = compose_tree(good), ""
        found += more
    cfg.do, cfg.chain.stages, cfg.chain.only = stage.do, {}, []
    flaws = structure_problems(cfg)
    if flaws:
        return None, None, found + flaws
    own_tokenizer = cfg.data.tokenizer is not None
    if source in before:
        found += _with_model_of(source, before[source], cfg, [o for o in map(parse_one, words) if o.input_line in good])
    else:
        cfg, more = _from_outside(cfg, source, good)
        found += more
    cfg, more = _with_reference(stage, cfg, before)
    found += more
    start, reference = (role if role in before else None for role in (source, stage.reference))
    if start is not None:
        cfg.init_from = start  # so that the rules know of weights to start from; their path is known later
    exp, more = check_tree(cfg, found, machine)
    found += more
    if exp is not None and start is not None:
        cfg.init_from, exp = None, dataclasses.replace(exp, init_from=None)
    if exp is not None and reference is not None:
        cfg.dpo.reference, exp = None, dataclasses.replace(exp, dpo=dataclasses.replace(exp.dpo, reference=None))
    if exp is not None and not found:
        named = {override_key(o) for o in good}
        found = [*unread_problems(exp, named), *unread_chat_problems(exp, named), *untracked_problems(exp, named)]
        found += _misfit(exp)
    if exp is None or found:
        return cfg, None, found
    branches = dict(stage.branches)
    return cfg, Stage(name, stage.do, start, reference, branches, cfg, exp, tuple(good), size, own_tokenizer), []


def _misfit(exp: ExperimentConfig) -> list[Problem]:
    """Return the problem of a layout that does not fit the machines, if any."""
    try:
        if exp.parallel.auto:
            planner.choose(exp)
            return []
    except ConfigError as error:
        return list(error.problems)
    problem = planner.misfit(exp)
    return [] if problem is None else [problem]


def _with_model_of(name: str, start: DictConfig, cfg: DictConfig, words: Sequence[Override]) -> Iterator[Problem]:
    """Set the model and tokenizer of a stage to those of its start; yield a problem for each value that is set apart.

    Args:
        name: the stage whose weights the stage starts from.
        start: its tree.
        cfg: the stage's tree.
        words: what the stage sets.
    """
    now, theirs = (OmegaConf.to_container(tree, resolve=True) for tree in (cfg, start))
    of_model = [path for path, _ in leaves(now) if path.startswith("model.")]
    rule = f"differs from {{}} of {name}, whose weights the stage starts from"
    fix = f"leave {{0}} out of the stage, or set chain.stages.{name}.set.{{0}}"
    asked = set[str]()
    for word in words:
        key = str(word.key_or_group)
        section = SECTION_OF.get(key, key)
        own = [path for path in of_model if path == section or path.startswith(f"{section}.")]
        apart = [path for path in own if path not in FREE and select(now, path) != select(theirs, path)]
        if apart and own != [key]:
            keys = ", ".join(path.removeprefix("model.") for path in apart[:5]) + ", ..." * (len(apart) > 5)
            yield Problem(key, word.value(), rule.format(f"the model ({keys})"), fix.format(key))
        elif apart:
            yield Problem(key, word.value(), rule.format(f"the {show(select(theirs, key))}"), fix.format(key))
        else:
            asked |= set(own)
    for path in of_model:
        if path not in asked & FREE:
            OmegaConf.update(cfg, path, literal(select(theirs, path)), merge=False)
    cfg.init_from, mine, given = None, cfg.data.tokenizer, start.data.tokenizer
    if mine is None:
        cfg.data.tokenizer = given
    elif given is None:
        rule = f"is not the tokenizer that {name} trains on its text, and the stage starts from its weights"
        yield Problem("data.tokenizer", mine, rule, f"leave it out, or set it for {name} too")
    elif mine != given:
        other = huggingface.other_tokenizer(expand(given), mine)
        if other is not None:
            yield other


def _from_outside(cfg: DictConfig, source: str | None, overrides: Sequence[str]) -> tuple[DictConfig, list[Problem]]:
    """Return the tree of a stage with the model of a run or folder, if it starts from one, and the problems."""
    if source == SCRATCH:
        cfg.init_from = None
    elif source is not None:
        cfg.init_from = literal(source)
    if cfg.init_from is None:
        return cfg, []
    named = str(cfg.init_from)
    if named == "last":
        rule, fix = "would be another run when the chain is started again", "name the run"
        return cfg, [Problem("start", named, rule, fix)]
    if is_release(named):
        return start_from(cfg, overrides)
    if not names_a_run(named):
        rule, fix = "is neither a stage nor a run nor a folder", "name a stage, a run id or an existing folder"
        return cfg, [Problem("start", named, rule, fix)]
    try:
        checkpoint, _ = manifest.locate(named, Path(cfg.output_dir), "start")
    except UserError as error:
        return cfg, list(error.problems)
    return start_from(cfg, overrides, checkpoint)


def _with_reference(
    stage: StageConfig, cfg: DictConfig, before: Mapping[str, DictConfig]
) -> tuple[DictConfig, list[Problem]]:
    """Return the tree of a stage with the checkpoint of its reference, or the name of the stage that is to train it."""
    if stage.do is not Do.dpo:
        return cfg, []
    named = cfg.dpo.reference if stage.reference is None else stage.reference
    if named is None:
        return cfg, []
    if stage.reference is not None and cfg.dpo.reference is not None:
        rule, fix = f"is named apart from dpo.reference={cfg.dpo.reference}", "leave one of the two out"
        return cfg, [Problem("reference", named, rule, fix)]
    if named == "last":
        rule, fix = "would be another run when the chain is started again", "name the run"
        return cfg, [Problem("reference", named, rule, fix)]
    cfg.dpo.reference = literal(named)
    try:
        if stage.reference not in before:
            return with_reference(cfg), []
        problem = other_model(named, OmegaConf.to_object(before[named].model), cfg)
        return cfg, [] if problem is None else [problem]
    except UserError as error:
        return cfg, list(error.problems)


def set_words(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the command-line overrides that do what a stage's `set` does in the words of a recipe."""
    known, groups = schema_keys(), option_groups()
    for name, value in values.items():
        path = f"{prefix}{name}"
        if not prefix and name in groups and isinstance(value, str):
            yield f"{name}={value if re.fullmatch(OPTION, value) else _text(value)}"
        elif isinstance(value, dict) and value and path not in known:
            yield from set_words(value, f"{path}.")
        elif path in known and isinstance(value, dict) and not all(re.fullmatch(ENTRY, str(key)) for key in value):
            yield f"++{path}={_text(value)}"  # patterns, such as those of optim.lr_multipliers, are no paths
        elif path in known and isinstance(value, dict) and value:
            yield from (f"++{path}.{entry}={_text(v)}" for entry, v in _entries(value))
        else:
            yield f"{path}={_text(value)}"


def _entries(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of an entry of a free mapping, with their paths."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{path}", leaf) for path, leaf in _entries(value))
        else:
            yield str(name), value


def _text(value: Any) -> str:
    """Return a plain value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_text(v)}' for key, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if not isinstance(value, str):
        return str(value)
    # A backslash is literal unless it precedes a quote, an interpolation or the end.
    escaped = re.sub(r"\\+(?='|\$\{|$)", lambda found: 2 * found[0], value)
    escaped = escaped.replace("'", "\\'").replace("${", "\\${")
    return f"'{escaped}'"
