"""The kinds of tasks: how each asks a model, and what it counts. A task reads and checks its rows when it is made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deepseek_exp.config import EvaluateConfig, OnBadLine, TaskConfig, TaskKind
from deepseek_exp.config.text_files import find_files
from deepseek_exp.data.readers import Reader
from deepseek_exp.errors import DataError, Problem
from deepseek_exp.evaluate.answers import is_close, marked_number, scaled_numbers, until
from deepseek_exp.evaluate.results import Measure, mean, ratio
from deepseek_exp.evaluate.rows import field, filled, read_rows
from deepseek_exp.evaluate.sandbox import Limits, run_program
from deepseek_exp.evaluate.scorer import Scorer, TokenScores

# Where generated code leaves the function it was to complete (Chen et al. 2021, "Evaluating Large Language Models
# Trained on Code", section 2.1).
CODE_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@")


class Task(Protocol):
    """Something that a model is measured on.

    Attributes:
        name: of the task, in the names of its metrics.
    """

    name: str

    def run(self, scorer: Scorer) -> list[Measure]:
        """Return what is measured of a model."""
        ...


@dataclass
class Texts:
    """The loss on documents.

    Attributes:
        name: of the domain.
        documents: texts.
        scores: those of the last model that was run, per document.
    """

    name: str
    documents: Sequence[str]
    scores: Sequence[TokenScores] = ()

    def run(self, scorer: Scorer) -> list[Measure]:
        """Return the loss, nats per token, and bits per byte of normalized text, both over all tokens."""
        self.scores = scorer.documents(self.documents)
        nats = [float(s.nll.double().sum()) for s in self.scores]
        tokens = [float(len(s.nll)) for s in self.scores]
        n_bytes = [float(len(scorer.tokenizer.normalize(text).encode())) for text in self.documents]
        bits = [x / math.log(2) for x in nats]
        n = int(sum(tokens))
        return [
            ratio(self.name, "loss", nats, tokens, n),
            ratio(self.name, "bits_per_byte", bits, n_bytes, n),
        ]

    def against(self, base: Scorer) -> list[Measure]:
        """Return how another model differs on the same tokens: what `run` measured minus what the other one does.

        Returns:
            agreement, the share of tokens at whose place both find the same token most likely; and loss_change, nats
            per token, positive where the base model is better. Paired: standard errors are those of the difference per
            document.
        """
        others = base.documents(self.documents)
        tokens = [float(len(s.nll)) for s in self.scores]
        pairs = list(zip(self.scores, others, strict=True))
        same = [float((a.top == b.top).sum()) for a, b in pairs]
        change = [float((a.nll.double() - b.nll.double()).sum()) for a, b in pairs]
        n = int(sum(tokens))
        return [
            ratio(self.name, "agreement", same, tokens, n),
            ratio(self.name, "loss_change", change, tokens, n),
        ]


@dataclass(frozen=True)
class Choices:
    """The most likely of several answers.

    Attributes:
        name: of the task.
        prompts: contexts.
        choices: the answers, the same for every prompt.
        labels: the right one of each prompt.
    """

    name: str
    prompts: Sequence[str]
    choices: Sequence[str]
    labels: Sequence[str]

    def run(self, scorer: Scorer) -> list[Measure]:
        """Return the accuracy, by log-likelihood of the answer and by that per byte, and the most frequent label's."""
        answers = [f" {choice}" for choice in self.choices]
        found = scorer.likelihoods([(prompt, answer) for prompt in self.prompts for answer in answers])
        whole, per_byte, k = [], [], len(answers)
        for i, label in enumerate(self.labels):
            mine = [x.log_prob for x in found[i * k : (i + 1) * k]]
            sizes = [len(answer.encode()) for answer in answers]
            best = max(range(k), key=mine.__getitem__)
            best_per_byte = max(range(k), key=lambda j: mine[j] / sizes[j])
            whole.append(float(self.choices[best] == label))
            per_byte.append(float(self.choices[best_per_byte] == label))
        frequent = Counter(self.labels).most_common(1)[0][0]
        return [
            mean(self.name, "accuracy", whole),
            mean(self.name, "accuracy_per_byte", per_byte),
            mean(self.name, "most_frequent_label", [float(label == frequent) for label in self.labels]),
        ]


@dataclass(frozen=True)
class Numbers:
    """A number in generated text.

    Attributes:
        name: of the task.
        prompts: what is continued.
        wanted: the right number of each.
        read: finds the number in a completion.
        tolerance: relative error that is right.
        max_new_tokens: of a completion.
        stops: texts that end a completion.
        n_skipped: rows whose answer is not one number, which are left out.
    """

    name: str
    prompts: Sequence[str]
    wanted: Sequence[float]
    read: Callable[[str], float | None]
    tolerance: float
    max_new_tokens: int
    stops: Sequence[str]
    n_skipped: int = 0

    def run(self, scorer: Scorer) -> list[Measure]:
        """Return the share of right numbers, and of completions that have a number at all."""
        texts = [until(text, self.stops) for text in scorer.complete(self.prompts, self.max_new_tokens)]
        found = [self.read(text) for text in texts]
        right = [float(is_close(x, y, self.tolerance)) for x, y in zip(found, self.wanted, strict=True)]
        return [
            mean(self.name, "exact_match", right),
            mean(self.name, "answered", [float(x is not None) for x in found]),
        ]


@dataclass(frozen=True)
class Programs:
    """Completions of functions, run against their tests.

    Attributes:
        name: of the task.
        prompts: a function's head, to be completed.
        tests: what follows the completion, and fails if it is wrong.
        limits: of each program.
        max_new_tokens: of a completion.
    """

    name: str
    prompts: Sequence[str]
    tests: Sequence[str]
    limits: Limits
    max_new_tokens: int

    def run(self, scorer: Scorer) -> list[Measure]:
        """Return pass@1 of the most likely completion (Chen et al. 2021, section 2.1)."""
        texts = [until(text, CODE_STOPS) for text in scorer.complete(self.prompts, self.max_new_tokens)]
        rows = zip(self.prompts, texts, self.tests, strict=True)
        passed = [run_program(f"{prompt}{text}\n{test}", self.limits).passed for prompt, text, test in rows]
        return [mean(self.name, "pass_at_1", [float(x) for x in passed])]


def text_tasks(cfg: EvaluateConfig) -> list[Texts]:
    """Return a task for each file of evaluate.texts, named by the file.

    Raises:
        DataError: a file cannot be read, or has no text.
    """
    if cfg.texts is None:
        return []
    files = find_files("evaluate.texts", cfg.texts)
    names = [path.name.split(".")[0] for path in files]
    names = [path.name if names.count(name) > 1 else name for path, name in zip(files, names, strict=True)]
    return [_texts(name, "evaluate.texts", path, cfg.text_key, 0) for name, path in zip(names, files, strict=True)]


def make_task(name: str, task: TaskConfig, cfg: EvaluateConfig) -> Task:
    """Read and check the rows of a task.

    Raises:
        DataError: a row cannot be read, or lacks a field.
    """
    key, path = f"evaluate.tasks.{name}", Path(cfg.folder, task.path).expanduser()
    if task.kind == TaskKind.text:
        return _texts(name, f"{key}.path", path, cfg.text_key, task.limit)
    rows = read_rows(f"{key}.path", path, task.limit)
    if task.kind == TaskKind.code:
        return _programs(name, task, cfg, rows)
    prompts = filled(f"{key}.prompt", rows, task.prompt)
    answers = field(f"{key}.answer", rows, task.answer)
    if task.kind == TaskKind.choice:
        unknown = next((answer for answer in answers if answer not in task.choices), None)
        if unknown is not None:
            rule = f"of {path} holds {unknown!r}, which is not one of evaluate.tasks.{name}.choices={task.choices}"
            raise DataError(Problem(f"{key}.answer", task.answer, rule, "list all choices, as they are in the rows"))
        return Choices(name, prompts, task.choices, answers)
    return _numbers(name, task, prompts, answers)


def _texts(name: str, key: str, path: Path, text_key: str, limit: int) -> Texts:
    documents = list(Reader(key, text_key, OnBadLine.stop, Counter()).documents(path))
    if not documents:
        raise DataError(Problem(key, str(path), "has no text", "name files with text"))
    return Texts(name, documents[: limit or None])


def _numbers(name: str, task: TaskConfig, prompts: list[str], answers: list[str]) -> Numbers:
    """Make a task of numbers; in gsm8k every answer has one, else rows with another answer are left out."""
    key = f"evaluate.tasks.{name}.answer"
    if task.kind == TaskKind.gsm8k:
        wanted = [marked_number(answer) for answer in answers]
        missing = next((i for i, number in enumerate(wanted, start=1) if number is None), None)
        if missing is not None:
            rule = f"has no number after #### in row {missing}"
            raise DataError(Problem(key, task.answer, rule, "name the field with the worked answer"))
        read, kept = marked_number, [(p, w) for p, w in zip(prompts, wanted, strict=True) if w is not None]
    else:
        numbers = [scaled_numbers(answer) for answer in answers]
        read, kept = first_number, [(p, n[0]) for p, n in zip(prompts, numbers, strict=True) if len(n) == 1]
    if not kept:
        raise DataError(Problem(key, task.answer, "holds one number in no row", "name the field with the answer"))
    asked, right = zip(*kept, strict=True)
    n_skipped = len(prompts) - len(kept)
    tolerance = 0.0 if task.kind == TaskKind.gsm8k else task.tolerance
    return Numbers(name, asked, right, read, tolerance, task.max_new_tokens, task.stops or [], n_skipped)


def first_number(text: str) -> float | None:
    """Return the first number of a text, with its scale; None if there is none."""
    numbers = scaled_numbers(text)
    return numbers[0] if numbers else None


def _programs(name: str, task: TaskConfig, cfg: EvaluateConfig, rows: Sequence) -> Programs:
    key = f"evaluate.tasks.{name}.path"
    prompts, tests, names = (field(key, rows, part) for part in ("prompt", "test", "entry_point"))
    programs = [f"{test}\ncheck({entry})" for test, entry in zip(tests, names, strict=True)]
    limits = Limits(cfg.code_seconds, int(cfg.code_memory_bytes))
    return Programs(name, prompts, programs, limits, task.max_new_tokens)
