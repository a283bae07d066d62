"""The section `evaluate` of the schema."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from deepseek_exp.config.key import key


@dataclass
class TaskConfig:
    """One task of an evaluation."""

    kind: str = key(
        "text: loss on documents; gsm8k: the number after ####; numeric: a number; choice: the most likely answer; "
        "code: pass@1 of completed functions; lm_eval: tasks of the package lm-eval"
    )
    path: str | None = key("file in evaluate.folder; lm_eval: folder of YAML files, null: lm-eval's own", default=None)
    limit: int = key("maximum number of rows; 0: all", ge=0, le=10**9, default=0)
    prompt: str | None = key("text before the answer, with {field} for the fields of a row", default=None)
    answer: str | None = key("field of a row that holds the right answer", default=None)
    choices: list[str] | None = key("choice: all answers; a space is put before each", default=None)
    max_new_tokens: int = key("maximum number of tokens of a generated answer", ge=1, le=10**6, default=256)
    stops: list[str] | None = key("gsm8k, numeric: texts that end a generated answer", default=None)
    tolerance: float = key("numeric: relative error of a right number", ge=0, le=1, default=0.01)
    tasks: list[str] | None = key("lm_eval: names of its tasks", default=None)
    n_shot: int | None = key("lm_eval: examples before each question; null: as the task says", ge=0, default=None)


@dataclass
class EvaluateConfig:
    """What do=eval measures in addition to the validation loss."""

    tasks: dict[str, Any] = key(
        "name -> kind, path and more, as in +evaluate.tasks.law.kind=text +evaluate.tasks.law.path=law.jsonl"
    )
    folder: str = key("folder that the paths of tasks are in")
    texts: str | None = key("file, folder or glob of texts; each file is a domain whose loss is measured")
    text_key: str = key("field of a .jsonl row that holds the text")
    agree_with: str | None = key(
        "run or checkpoint to compare with on the texts, token by token: agreement of the most likely tokens, and "
        "loss_change (forgetting, if positive)"
    )
    batch_seqs: int = key("sequences at once", ge=1, le=10**6)
    allow_code_execution: bool = key("run programs that the model writes (tasks of kind=code), with limits")
    code_seconds: float = key("time limit of a program, in seconds", gt=0, le=86_400)
    code_memory_bytes: float = key("memory limit of a program, in bytes", ge=1e8, le=1e15)

    def __post_init__(self) -> None:
        """Turn the entries of `tasks` into TaskConfigs; rules/evaluate.py rejects others."""
        names = {f.name for f in fields(TaskConfig)}
        if isinstance(self.tasks, dict):
            self.tasks = {
                str(name): TaskConfig(**task) if isinstance(task, dict) and task.keys() <= names else task
                for name, task in self.tasks.items()
            }
