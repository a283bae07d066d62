"""lm-eval's tasks (EleutherAI's LM evaluation harness), through its LM interface. lm-eval is an optional package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_exp.errors import Problem, UserError
from deepseek_exp.evaluate.answers import until
from deepseek_exp.evaluate.results import Measure
from deepseek_exp.evaluate.scorer import Scorer

# Samples of the bootstrap for metrics that are no mean; lm-eval computes the errors of means in closed form.
BOOTSTRAP = 200


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-eval.

    Attributes:
        name: of the entry in evaluate.tasks.
        tasks: names of lm-eval's tasks.
        folder: its YAML files of tasks; None: those that lm-eval brings, whose data it downloads.
        limit: most items of each task; 0: all.
        n_shot: examples in the context; None: as each task says.
        max_new_tokens: of a completion, where the task does not say.
    """

    name: str
    tasks: Sequence[str]
    folder: Path | None
    limit: int
    n_shot: int | None
    max_new_tokens: int

    def run(self, scorer: Scorer) -> list[Measure]:
        """Return every metric of every task, as lm-eval computes it."""
        lm_eval = require_lm_eval(f"evaluate.tasks.{self.name}.kind")
        from lm_eval.tasks import TaskManager

        where = None if self.folder is None else str(self.folder)
        manager = TaskManager(include_path=where, include_defaults=self.folder is None)
        unknown = [task for task in self.tasks if task not in manager.all_tasks]
        if unknown:
            key, rule = f"evaluate.tasks.{self.name}.tasks", f"is no task of {self.folder or 'lm-eval'}"
            near = ", ".join(sorted(manager.all_tasks)[:5])
            raise UserError(Problem(key, unknown[0], rule, f"use names of tasks, such as {near}"))
        found = lm_eval.simple_evaluate(
            model=harness_model(scorer, self.max_new_tokens),
            tasks=list(self.tasks),
            task_manager=manager,
            limit=self.limit or None,
            num_fewshot=self.n_shot,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
        return list(measures(found))


def require_lm_eval(key: str) -> Any:
    """Import and return lm-eval.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        rule = f"needs the package lm-eval ({error})"
        raise UserError(Problem(key, "lm_eval", rule, "install it: pip install 'deepseek_exp[eval]'")) from error
    return lm_eval


def harness_model(scorer: Scorer, max_new_tokens: int) -> Any:
    """Return lm-eval's interface to a model. The class is made here because its base class may not be installed."""
    from lm_eval.api.model import LM

    class HarnessModel(LM):
        """Answers lm-eval's three kinds of requests."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """Return the log-likelihood of each continuation, and whether it is the most likely one."""
            found = scorer.likelihoods([request.args for request in requests])
            return [(x.log_prob, x.is_greedy) for x in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            """Return the log-likelihood of each text."""
            found = scorer.documents([request.args[0] for request in requests])
            return [-float(x.nll.double().sum()) for x in found]

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Return the most likely continuation of each context, up to a stop.

            Raises:
                UserError: a task asks for sampling.
            """
            texts = [""] * len(requests)
            groups: dict[int, list[int]] = {}
            for index, request in enumerate(requests):
                options = request.args[1]
                if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                    rule = "asks for sampled text, and texts are generated greedily here"
                    raise UserError(Problem("evaluate.tasks", request.task_name, rule, "leave the task out"))
                groups.setdefault(int(options.get("max_gen_toks", max_new_tokens)), []).append(index)
            for n_new, indices in groups.items():
                done = scorer.complete([requests[i].args[0] for i in indices], n_new)
                for i, text in zip(indices, done, strict=True):
                    stops = requests[i].args[1].get("until") or []
                    texts[i] = until(text, [stops] if isinstance(stops, str) else stops)
            return texts

    return HarnessModel()


def measures(found: dict[str, Any]) -> list[Measure]:
    """Return lm-eval's results as measures: `acc,none` is acc, and `exact_match,strict` exact_match.strict."""
    rows = []
    for task, values in found["results"].items():
        n = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric}.{kind}"
            rows.append(Measure(task, shown, float(value), stderr if isinstance(stderr, float) else None, n))
    return rows
