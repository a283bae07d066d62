"""Small files of pairs and prompts, and a tokenizer of bytes, for trainings on rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepseek_exp.data import Tokenizer
from tests.parallel.layouts import Watch


class Stopped(Watch):
    """Ends the training after some steps, with a checkpoint."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps

    def before_fit(self, parts: Any, trainer: Any) -> None:
        train = parts.lit.training_step

        def step(batch: Any, batch_idx: int) -> Any:
            found = train(batch, batch_idx)
            trainer.should_stop = trainer.global_step >= self.n_steps
            return found

        parts.lit.training_step = step


def tokenizer(folder: Path) -> str:
    """Write a tokenizer of bytes; returns the override that names it."""
    path = folder / "tokenizer.json"
    Tokenizer.train(["12+34=46"], 258).save(path)
    return f"data.tokenizer={path}"


def pairs(folder: Path, n: int = 24) -> tuple[str, ...]:
    """Write preference pairs of many lengths; returns the overrides that train on them."""
    rows = [
        {"prompt": f"{i}+{i}" + "?" * (i % 5), "chosen": f"is {2 * i}", "rejected": "no" + " idea" * (i % 3)}
        for i in range(n)
    ]
    return _written(folder, "preference", rows)


def prompts(folder: Path, n: int = 20) -> tuple[str, ...]:
    """Write prompts of different lengths; returns the overrides that train on them."""
    rows = [{"prompt": "say a" + "!" * (i % 4), "answer": "a", "extra": i} for i in range(n)]
    return _written(folder, "prompts", rows)


def _written(folder: Path, source: str, rows: list[dict[str, object]]) -> tuple[str, ...]:
    path = folder / f"{source}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data={source}", f"data.path={path}", "data.valid_fraction=0.25", "data.template=raw", tokenizer(folder)
