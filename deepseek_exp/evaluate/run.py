"""All tasks of an evaluation, on one model: the same tokens, start of documents and templates for every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from deepseek_exp.config import EvaluateConfig, TaskKind
from deepseek_exp.errors import CheckpointError, Problem
from deepseek_exp.evaluate.harness import Harness, require_lm_eval
from deepseek_exp.evaluate.results import Measure
from deepseek_exp.evaluate.sandbox import has_no_network
from deepseek_exp.evaluate.scorer import Scorer
from deepseek_exp.evaluate.tasks import Numbers, Programs, Task, Texts, make_task, text_tasks
from deepseek_exp.inference import from_pretrained

Say = Callable[[str], None]


def make_tasks(cfg: EvaluateConfig) -> list[Task]:
    """Read the rows of all tasks, before a model is loaded.

    Raises:
        UserError: a file cannot be read, a row lacks what its task needs, or lm-eval is needed and not installed.
    """
    tasks: list[Task] = list(text_tasks(cfg))
    for name, task in cfg.tasks.items():
        if task.kind == TaskKind.lm_eval:
            require_lm_eval(f"evaluate.tasks.{name}.kind")
            folder = None if task.path is None else Path(cfg.folder, task.path).expanduser()
            tasks.append(Harness(name, task.tasks, folder, task.limit, task.n_shot, task.max_new_tokens))
        else:
            tasks.append(make_task(name, task, cfg))
    return tasks


def run_tasks(tasks: Sequence[Task], scorer: Scorer, cfg: EvaluateConfig, base: Path | None, say: Say) -> list[Measure]:
    """Measure a model on tasks.

    Args:
        tasks: from `make_tasks`.
        scorer: the model.
        cfg: the evaluation.
        base: folder of the checkpoint that evaluate.agree_with names; None if it names none.
        say: prints a line.

    Raises:
        CheckpointError: the model to compare with has another tokenizer.
    """
    found: list[Measure] = []
    if any(isinstance(task, Programs) for task in tasks) and not has_no_network():
        say("note        generated code can reach the network: this kernel allows no network namespaces")
    for task in tasks:
        before = scorer.n_truncated
        found += task.run(scorer)
        if scorer.n_truncated > before:
            n = scorer.n_truncated - before
            say(f"note        {task.name}: {n:,} contexts lost their first tokens to max_seq_len={scorer.max_seq_len}")
        if isinstance(task, Numbers) and task.n_skipped:
            say(f"note        {task.name}: {task.n_skipped:,} rows without exactly one number are left out")
    texts = [task for task in tasks if isinstance(task, Texts)]
    if base is not None and texts:
        other = _other(scorer, base)
        for text in texts:
            found += text.against(other)
    return found


def _other(scorer: Scorer, base: Path) -> Scorer:
    """Load the model to compare with, on the same device and in the same type."""
    weight = scorer.model.embedding.weight
    other = from_pretrained(base, str(weight.device), weight.dtype)
    if other.tokenizer.digest != scorer.tokenizer.digest:
        rule = "has another tokenizer, so its tokens are not comparable"
        fix = "name a run with the same tokenizer, or compare bits_per_byte of two evaluations"
        raise CheckpointError(Problem("evaluate.agree_with", str(base), rule, fix))
    return Scorer(other.model, other.tokenizer, scorer.batch_seqs)
