"""What a chain prints: the plan of its stages, what a stage changes, and the table of results."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from deepseek_exp import planner
from deepseek_exp.config import Do
from deepseek_exp.config.compose import leaves
from deepseek_exp.errors import show
from deepseek_exp.experiment.chain import Stage

if TYPE_CHECKING:
    from deepseek_exp.evaluate.yardstick import Change

GB = 1e9
# Keys that a diff leaves out: they name where something is, and not what is done.
NOT_SHOWN = (
    *("do", "resume", "init_from", "branches", "output_dir", "tracking", "chain"),
    *("data.tokenizer", "data.cache_dir"),
)


@dataclass(frozen=True)
class Row:
    """The result of one stage.

    Attributes:
        stage: its name.
        do: its verb.
        start: the stage that it starts from; empty if none.
        n_parameters: of its model; None if it saves no weights.
        n_bytes: of its weights.
        loss: on the yardstick, nats per token.
        by_text: the same by text.
        bits_per_byte: the same in bits per byte.
        to_start: change of the loss to the stage that it starts from.
        to_first: change of the loss to the first stage.
        agreement: share of tokens whose most likely successor is that of the first stage.
        val_loss: validation loss at the end of the stage, on its own text, nats per token.
        tokens_per_second: speed of its training.
        seconds: duration.
        reused: whether it was not run, since nothing had changed.
    """

    stage: str
    do: str
    start: str
    n_parameters: int | None
    n_bytes: int | None
    loss: float | None
    by_text: Mapping[str, float]
    bits_per_byte: float | None
    to_start: Change | None
    to_first: Change | None
    agreement: float | None
    val_loss: float | None
    tokens_per_second: float | None
    seconds: float
    reused: bool


def plan_text(stages: Sequence[Stage]) -> str:
    """Return the plan of every stage, and the time of all."""
    rows = [["stage", "do", "from", "parameters", "GB per rank", "usable", "", "steps", "step", "tokens", "time"]]
    total = 0.0
    for stage in stages:
        found = planner.brief(stage.exp)
        memory = [f"{found.memory_bytes / GB:,.2f}", f"{found.usable_bytes / GB:,.2f}"]
        cells = [stage.name, stage.do.value, stage.start or "-", f"{found.n_parameters:,}"]
        if stage.do is Do.eval:
            rows.append([*cells, *("-",) * 7])
            continue
        fits, epochs = "fits" if found.fits else "does not fit", stage.exp.trainer.max_epochs
        if epochs is not None:  # how many steps these are is known once the data is read
            rows.append([*cells, *memory, fits, f"{epochs:g} epochs", _duration(found.step_seconds), "-", "-"])
            continue
        total += found.seconds
        steps = [f"{stage.exp.trainer.max_steps:,}", _duration(found.step_seconds), f"{found.tokens:,}"]
        rows.append([*cells, *memory, fits, *steps, _duration(found.seconds)])
    note = "Predicted, not measured; without validation, and without stages of trainer.max_epochs."
    return "\n".join([aligned(rows), "", f"all stages: {_duration(total)}", note])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def changes(before: DictConfig, now: DictConfig) -> list[tuple[str, Any, Any]]:
    """Return the keys whose values differ between two trees, with both values."""
    plain = [OmegaConf.to_container(tree, resolve=True, enum_to_str=True) for tree in (before, now)]
    old, new = (dict(leaves(tree)) for tree in plain)
    return [(path, old[path], new[path]) for path in new if old[path] != new[path] and not _hidden(path)]


def _hidden(path: str) -> bool:
    return any(path == key or path.startswith(f"{key}.") for key in NOT_SHOWN)


def diff_text(stage: Stage, start: Stage | None, source: str, number: str) -> str:
    """Return what a stage does, and what it changes of the stage that it starts from.

    Args:
        stage: the stage.
        start: the stage that it starts from.
        source: what its weights come from, in words.
        number: of the stage, such as 2/3.
    """
    head = f"stage {number}  {stage.name}  do={stage.do.value}  from {source}"
    if start is None:
        return head
    rows = [["", start.name, stage.name]]
    if stage.do is not start.do:
        rows.append(["do", start.do.value, stage.do.value])
    rows += [[path, show(old), show(new)] for path, old, new in changes(start.tree, stage.tree)]
    if len(rows) == 1:
        rows.append(["nothing differs", "", ""])
    return "\n".join([head, *(f"  {line}" for line in aligned(rows).splitlines())])


HEADINGS = ("stage", "do", "from", "parameters", "bytes", "loss")
MORE = ("bits/byte", "to its start", "to the first", "agreement", "val/loss", "tokens/s", "seconds", "")


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table as lines of cells, the headings first."""
    texts = list(dict.fromkeys(name for row in rows for name in row.by_text))
    texts = texts if len(texts) > 1 else []
    lines = [[*HEADINGS, *(f"loss {name}" for name in texts), *MORE]]
    for row in rows:
        of_texts = [row.by_text.get(name) for name in texts]
        cells = [row.stage, row.do, row.start, row.n_parameters, row.n_bytes, row.loss, *of_texts, row.bits_per_byte]
        cells += [_change(row.to_start), _change(row.to_first)]
        cells += [None if row.agreement is None else f"{row.agreement:.1%}", row.val_loss, row.tokens_per_second]
        lines.append([*map(_cell, cells), f"{row.seconds:.1f}", "reused" if row.reused else ""])
    return lines


def _change(change: Change | None) -> str | None:
    if change is None:
        return None
    error = "" if math.isnan(change.standard_error) else f" ±{change.standard_error:.2f}"
    return f"{change.percent:+.2f}%{error}"


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if isinstance(value, float) and value >= 1000 else _number(value)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[Row]) -> str:
    """Return the table in Markdown, with what its columns mean."""
    head, *body = table(rows)
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + f"\n{EXPLAINED}\n"


def csv_text(rows: Sequence[Row]) -> str:
    """Return the table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table(rows))
    return text.getvalue()


EXPLAINED = (
    "loss: nats per token on the same tokens for every stage. Changes are paired, with the standard error over "
    "sequences. agreement: most likely tokens that are those of the first stage. val/loss: on the stage's own text."
)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded: Iterator[str] = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    return "\n".join(padded)
