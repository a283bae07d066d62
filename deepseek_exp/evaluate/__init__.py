"""Evaluate models: their loss on the same tokens, and tasks such as answers, programs, and those of lm-eval."""

from deepseek_exp.evaluate.results import Measure, as_json, as_metrics, table
from deepseek_exp.evaluate.run import make_tasks, run_tasks
from deepseek_exp.evaluate.scorer import Scorer
from deepseek_exp.evaluate.yardstick import Scores, TokenSet, agreement, change, score, token_set

__all__ = [
    "Measure",
    "Scorer",
    "Scores",
    "TokenSet",
    "agreement",
    "as_json",
    "as_metrics",
    "change",
    "make_tasks",
    "run_tasks",
    "score",
    "table",
    "token_set",
]
