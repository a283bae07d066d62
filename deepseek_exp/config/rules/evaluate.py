"""Rules of the section `evaluate`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from deepseek_exp.config import text_files
from deepseek_exp.config.enums import Do, TaskKind
from deepseek_exp.config.evaluate_section import EvaluateConfig, TaskConfig
from deepseek_exp.config.rules.bounds import range_problems
from deepseek_exp.config.rules.values import is_file, is_folder, path_problems
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.config.topology import degrees
from deepseek_exp.errors import Problem

# What each kind needs, and reads, in addition to path and limit.
NEEDS: dict[TaskKind, tuple[str, ...]] = {
    TaskKind.text: (),
    TaskKind.gsm8k: ("prompt", "answer"),
    TaskKind.numeric: ("prompt", "answer"),
    TaskKind.choice: ("prompt", "answer", "choices"),
    TaskKind.code: (),
    TaskKind.lm_eval: ("tasks",),
}
READS: dict[TaskKind, tuple[str, ...]] = {
    TaskKind.gsm8k: ("max_new_tokens", "stops"),
    TaskKind.numeric: ("max_new_tokens", "stops", "tolerance"),
    TaskKind.code: ("max_new_tokens",),
    TaskKind.lm_eval: ("max_new_tokens", "n_shot"),
}
TYPES: dict[str, tuple[type, ...]] = {
    "path": (str,), "limit": (int,), "prompt": (str,), "answer": (str,), "choices": (list,), "max_new_tokens": (int,),
    "stops": (list,), "tolerance": (int, float), "tasks": (list,), "n_shot": (int,),
}  # fmt: skip


def evaluate_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield the problems of an evaluation; its files need to exist for do=eval only."""
    e = exp.evaluate
    if not isinstance(e.tasks, dict):
        return  # reported with the other mappings
    for name, task in e.tasks.items():
        yield from _task_name(str(name))
        yield from _task(f"evaluate.tasks.{name}", task, e)
    if e.agree_with is not None and not (e.texts or any(_kind(t) is TaskKind.text for t in e.tasks.values())):
        rule = "has no text to compare on"
        yield Problem("evaluate.agree_with", e.agree_with, rule, "set evaluate.texts to a file, folder or glob")
    if exp.do is Do.eval:
        yield from _files(e)
        yield from _layout(exp)


def _task_name(name: str) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        rule = "is not a name of letters, digits, _ and -, which metrics and keys are named with"
        yield Problem("evaluate.tasks", name, rule, "rename the task")


def _files(e: EvaluateConfig) -> Iterator[Problem]:
    """Yield problems for files that do not exist."""
    if e.texts is not None and e.texts.strip() and not list(path_problems("evaluate.texts", e.texts)):
        yield from _exists(e.texts)
    for name, task in e.tasks.items():
        kind = _kind(task)
        if kind is not None and isinstance(task.path, str):
            yield from _file(f"evaluate.tasks.{name}.path", task.path, kind, e)


def _exists(texts: str) -> Iterator[Problem]:
    try:
        if not text_files.exists(texts):
            rule = f"does not exist (looked in {Path.cwd()})"
            yield Problem("evaluate.texts", texts, rule, "name a file, folder or glob that does")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        yield Problem("evaluate.texts", texts, f"cannot be read ({reason})", "name a file, folder or glob that can be")


def _layout(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem for tasks on several ranks."""
    try:
        n_ranks = degrees(exp).world_size
    except ValueError:
        return  # reported by layout_problems
    if n_ranks > 1 and (exp.evaluate.tasks or exp.evaluate.texts):
        key = "evaluate.tasks" if exp.evaluate.tasks else "evaluate.texts"
        value = ", ".join(map(str, exp.evaluate.tasks)) or exp.evaluate.texts
        rule = f"needs the whole model in one process, and this layout has {n_ranks:,} ranks"
        yield Problem(key, value, rule, "add parallel=single, which loads a checkpoint of any layout")


def _kind(task: Any) -> TaskKind | None:
    kind = getattr(task, "kind", None)
    return TaskKind(kind) if kind in list(TaskKind) else None


def _task(key: str, task: Any, e: EvaluateConfig) -> Iterator[Problem]:
    names = [f.name for f in dataclasses.fields(TaskConfig)]
    if not isinstance(task, TaskConfig):
        rule, fix = f"is not a task, which has the keys {', '.join(names)}", f"write +{key}.kind=text +{key}.path=..."
        if isinstance(task, dict):
            unknown = next(k for k in task if k not in names)
            key, task, rule = f"{key}.{unknown}", task[unknown], f"is not a key of a task ({', '.join(names)})"
            fix = "correct the name or remove it"
        yield Problem(key, task, rule, fix)
        return
    kind = _kind(task)
    if kind is None:
        kinds = ", ".join(TaskKind)
        value = None if task.kind == MISSING else task.kind
        yield Problem(f"{key}.kind", value, f"is not one of {kinds}", f"set {key}.kind to one of them")
        return
    wrong = [name for name, types in TYPES.items() if not _fits(getattr(task, name), types)]
    for name in wrong:
        words = {str: "a text", int: "a whole number", list: "a list"}.get(TYPES[name][0], "a number")
        yield Problem(f"{key}.{name}", getattr(task, name), f"is not {words}", f"correct {key}.{name}")
    if wrong:
        return
    yield from range_problems(task, f"{key}.")
    yield from _read_keys(key, task, kind)
    if task.path is None and kind is not TaskKind.lm_eval:
        yield Problem(f"{key}.path", None, f"is needed by kind={kind.value}", f"set {key}.path to a .jsonl file")
    if kind is TaskKind.code and not e.allow_code_execution:
        rule = "runs programs that the model writes, which evaluate.allow_code_execution=false forbids"
        yield Problem(f"{key}.kind", kind.value, rule, "set evaluate.allow_code_execution=true, or leave the task out")


def _fits(value: Any, types: tuple[type, ...]) -> bool:
    return value is None or (isinstance(value, types) and not isinstance(value, bool))


def _read_keys(key: str, task: TaskConfig, kind: TaskKind) -> Iterator[Problem]:
    """Yield problems for keys that a kind needs and has not, and for those that it does not read."""
    defaults = TaskConfig(kind=kind.value)
    for name in NEEDS[kind]:
        if not getattr(task, name):
            yield Problem(f"{key}.{name}", getattr(task, name), f"is needed by kind={kind.value}", f"set {key}.{name}")
    reads = ("kind", "path", "limit", *NEEDS[kind], *READS.get(kind, ()))
    for name in TYPES:
        if name not in reads and getattr(task, name) != getattr(defaults, name):
            rule = f"is not read by kind={kind.value}"
            yield Problem(f"{key}.{name}", getattr(task, name), rule, f"leave {key}.{name} out")


def _file(key: str, path: str, kind: TaskKind, e: EvaluateConfig) -> Iterator[Problem]:
    found = Path(e.folder, path).expanduser()
    if is_folder(found) if kind is TaskKind.lm_eval else is_file(found):
        return
    what = "folder of lm-eval's YAML files" if kind is TaskKind.lm_eval else "file"
    rule = f"is no {what} in evaluate.folder={e.folder} (looked for {found.absolute()})"
    yield Problem(key, path, rule, "set evaluate.folder to the folder that has it")
