"""Rules of preference training and reinforcement learning: sections `dpo` and `grpo`, and what they need of others."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_exp.config.enums import Do, Order, PreferenceLoss, Source
from deepseek_exp.config.rules.chat import template_problems
from deepseek_exp.config.rules.values import is_file
from deepseek_exp.config.schema import ROOT, ExperimentConfig
from deepseek_exp.config.topology import Degrees, degrees, n_gpus
from deepseek_exp.errors import Problem

OWN_REWARDS = "deepseek_exp.finetune.rewards"
# The modules whose functions a reward may name: ours, and one that you may write.
REWARD_FILES = {
    OWN_REWARDS: ROOT / "deepseek_exp" / "finetune" / "rewards.py",
    "recipes.rewards": ROOT / "recipes" / "rewards.py",
}
ONE_RANK = Degrees(dp=1, tp=1, pp=1, ep=1)
SOURCE_OF = {Do.dpo: Source.preference, Do.grpo: Source.prompts}


def finetune_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems of the data that a verb reads, and of verbs that do not train on text."""
    d, source = exp.data, SOURCE_OF.get(exp.do)
    if source is not None and d.source is not source:
        rule = f"is not what do={exp.do.value} trains on"
        yield Problem("data.source", d.source.value, rule, f"add data={source.value} data.path=<rows>")
    reads_any = exp.do in (Do.sample, Do.export, Do.plan) or (exp.do is Do.eval and d.source is Source.preference)
    if source is None and exp.do is not Do.sft and not reads_any and d.source in SOURCE_OF.values():
        verb = next(do.value for do, of in SOURCE_OF.items() if of is d.source)
        rule = f"is not what do={exp.do.value} reads"
        yield Problem("data.source", d.source.value, rule, f"set do={verb}, or use other data")
    if d.source in SOURCE_OF.values():
        yield from _rows(exp)
    if source is not None:
        yield from _training(exp)


def _rows(exp: ExperimentConfig) -> Iterator[Problem]:
    d = exp.data
    if d.tokenizer is None and exp.init_from is None and exp.resume is None:
        rule = f"is needed for data.source='{d.source.value}', whose rows are too few to train one on"
        fix = "start from a model with init_from=<run or folder>, or name a tokenizer.json"
        yield Problem("data.tokenizer", None, rule, fix)
    if d.order is not Order.shuffled:
        rule = f"cannot be used with data.source='{d.source.value}', whose rows do not continue each other"
        yield Problem("data.order", d.order.value, rule, "set data.order=shuffled")
    yield from template_problems(exp)
    if d.isolate_documents:
        rule = f"has no effect on data.source='{d.source.value}', whose rows are separate sequences"
        yield Problem("data.isolate_documents", True, rule, "set data.isolate_documents=false")
    if d.max_bytes is not None:
        rule = f"is not read by data.source='{d.source.value}'"
        yield Problem("data.max_bytes", d.max_bytes, rule, "set data.max_bytes=null")


def _training(exp: ExperimentConfig) -> Iterator[Problem]:
    verb, m = f"do={exp.do.value}", exp.model
    if m.memory_len:
        rule = f"carries a memory from sequence to sequence, and the rows of {verb} do not continue each other"
        yield Problem("model.memory_len", m.memory_len, rule, "set model.memory_len=0")
    yield from _preferences(exp) if exp.do is Do.dpo else _reinforcement(exp)
    if m.n_mtp_layers and _layout(exp).world_size > 1:
        rule = f"has modules that {verb} does not train, and with several ranks every parameter needs a gradient"
        yield Problem("model.n_mtp_layers", m.n_mtp_layers, rule, "use parallel=single")


def _preferences(exp: ExperimentConfig) -> Iterator[Problem]:
    t, dpo = exp.trainer, exp.dpo
    for name in ("global_batch_seqs", "micro_batch_seqs"):
        n = getattr(t, name)
        if n % 2:
            rule = "is odd, and the two completions of a pair stay together"
            yield Problem(f"trainer.{name}", n, rule, f"use trainer.{name}={n + 1}")
    if t.eval_seqs % 2:
        rule = "is odd, and the two completions of a pair stay together"
        yield Problem("trainer.eval_seqs", t.eval_seqs, rule, f"use trainer.eval_seqs={t.eval_seqs + 1}")
    if dpo.loss is not PreferenceLoss.dpo and dpo.label_smoothing:
        rule = f"is not read by dpo.loss={dpo.loss.value}"
        yield Problem("dpo.label_smoothing", dpo.label_smoothing, rule, "set dpo.label_smoothing=0, or dpo.loss=dpo")
    if dpo.loss is PreferenceLoss.orpo and dpo.reference is not None:
        yield Problem(
            "dpo.reference", dpo.reference, "is not read by dpo.loss=orpo", "leave it out, or set dpo.loss=dpo"
        )


def _reinforcement(exp: ExperimentConfig) -> Iterator[Problem]:
    t, g, d = exp.trainer, exp.grpo, _layout(exp)
    if g.max_new_tokens >= exp.data.seq_len:
        rule = f"leaves no room for a prompt in data.seq_len={exp.data.seq_len}"
        yield Problem("grpo.max_new_tokens", g.max_new_tokens, rule, f"use {exp.data.seq_len - 1} or less")
    unit = g.group_size * max(1, d.dp)
    if t.global_batch_seqs % unit:
        of = f" * {d.dp} data-parallel ranks" if d.dp > 1 else ""
        rule = f"is no multiple of grpo.group_size={g.group_size}{of}"
        yield Problem(
            "trainer.global_batch_seqs", t.global_batch_seqs, rule, f"use {max(1, t.global_batch_seqs // unit) * unit}"
        )
    if t.max_epochs is not None:
        rule = "counts passes over sequences, and do=grpo samples its own"
        yield Problem("trainer.max_epochs", t.max_epochs, rule, "set trainer.max_epochs=null and trainer.max_steps")
    for axis in ("tp", "pp", "ep"):
        if getattr(d, axis) > 1:
            rule = "divides the model, and do=grpo samples with the whole one on each rank"
            yield Problem(f"parallel.{axis}", getattr(d, axis), rule, f"set parallel.{axis}=1; parallel.dp may be more")
    if exp.parallel.zero_stage == 3:
        rule = "shards the weights, and do=grpo samples with all of them on each rank"
        yield Problem("parallel.zero_stage", 3, rule, "use parallel.zero_stage=2 or less")
    if t.precision.computes_in_fp8:
        rule = "rounds products by the largest number of a batch, so that sampler and trainer would differ"
        yield Problem("trainer.precision", t.precision.value, rule, "set trainer.precision=bf16")
    if t.compile:
        rule = "has no effect on do=grpo, whose lengths change"
        yield Problem("trainer.compile", True, rule, "set trainer.compile=false")
    if exp.model.moe.capacity_factor:
        rule = "drops tokens in training only, so that sampler and trainer would differ"
        yield Problem("model.moe.capacity_factor", exp.model.moe.capacity_factor, rule, "set it to 0")
    yield from _rewards(g.rewards)


def _layout(exp: ExperimentConfig) -> Degrees:
    """Return the layout, or one rank if it is not known yet or wrong, which other rules report."""
    p = exp.parallel
    if p.auto or min(p.dp, p.tp, p.pp, p.ep) < 0 or n_gpus(exp.cluster) < 1:
        return ONE_RANK
    try:
        return degrees(exp)
    except ValueError:
        return ONE_RANK


def _rewards(rewards: dict[str, Any]) -> Iterator[Problem]:
    if not rewards:
        yield Problem(
            "grpo.rewards", {}, "has no function", f"add +grpo.rewards.answer._target_={OWN_REWARDS}.exact_match"
        )
    for name, node in rewards.items():
        yield from _reward(f"grpo.rewards.{name}", node)


def _reward(path: str, node: Any) -> Iterator[Problem]:
    target = node.get("_target_") if isinstance(node, dict) else None
    if target is None:
        yield Problem(path, node, "has no _target_", f"set {path}._target_ to a function")
        return
    module, _, name = str(target).rpartition(".")
    if module not in REWARD_FILES:
        rule = f"is not a function of the modules that a reward may name ({', '.join(REWARD_FILES)})"
        yield Problem(f"{path}._target_", target, rule, "use a function of those, or write one in recipes/rewards.py")
        return
    if not is_file(REWARD_FILES[module]):
        rule = f"is in {REWARD_FILES[module].relative_to(ROOT)}, which does not exist"
        yield Problem(f"{path}._target_", target, rule, "write the function there")
        return
    try:
        functions = functions_in(REWARD_FILES[module])
    except (SyntaxError, UnicodeDecodeError) as error:
        rule = f"is in {REWARD_FILES[module].relative_to(ROOT)}, which is not Python ({error})"
        yield Problem(f"{path}._target_", target, rule, "correct the file")
        return
    if name not in functions:
        near = difflib.get_close_matches(name, functions, n=1)
        some = f"use {module}.{near[0]}, or another" if near else "use one"
        yield Problem(f"{path}._target_", target, "does not exist", f"{some} of {', '.join(functions)}")
        return
    yield from _arguments(path, str(target), node, functions[name])


def _arguments(path: str, target: str, node: dict[str, Any], takes: dict[str, bool]) -> Iterator[Problem]:
    weight = node.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        yield Problem(f"{path}.weight", weight, "is not a number", f"use a number, for example {path}.weight=1")
    given = [key for key in node if key not in ("_target_", "weight")]
    for key in given:
        if key not in takes:
            rule = f"is not an argument of {target} ({', '.join(takes) or 'it has none'})"
            yield Problem(f"{path}.{key}", node[key], rule, f"remove it: ~{path}.{key}")
    for key, needed in takes.items():
        if needed and key not in given:
            yield Problem(f"{path}.{key}", None, f"is needed by {target}", f"add +{path}.{key}=<value>")
    if target == f"{OWN_REWARDS}.regex_match" and "pattern" in given:
        try:
            re.compile(str(node["pattern"]))
        except re.error as error:
            yield Problem(f"{path}.pattern", node["pattern"], f"is not a regular expression ({error})", "correct it")


def functions_in(path: Path) -> dict[str, dict[str, bool]]:
    """Return the reward functions of a file without importing it.

    They have at least two positional parameters, the completion and its row.

    Returns:
        Name -> further parameters, each with whether it needs a value.
    """
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef) or len(node.args.args) < 2 or node.name.startswith("_"):
            continue
        plain = node.args.args
        optional = {a.arg for a in plain[len(plain) - len(node.args.defaults) :]}
        needs = {a.arg: a.arg not in optional for a in plain[2:]}
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            needs[argument.arg] = default is None
        found[node.name] = needs
    return found
