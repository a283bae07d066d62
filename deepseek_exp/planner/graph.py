"""The memory of a plan as a picture, and the plan's artifacts in the record of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from deepseek_exp.config import ExperimentConfig
from deepseek_exp.planner.layers import layers_of
from deepseek_exp.planner.memory import USABLE
from deepseek_exp.planner.report import GB, MEMORY, describe, report
from deepseek_exp.planner.search import Plan, asked_layout, make_plan

# The parts of the memory from the bottom up, in colours that the colour-blind can distinguish (Okabe and Ito 2008).
COLOURS = dict(zip(MEMORY, ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7"), strict=True))
LIMIT = "#d55e00"
CENTRED = 'text-anchor="middle"'
# In pixels: the plot's left, top, height and width, and the maximum width of a bar and of the gap after it.
LEFT, TOP, HEIGHT = 76, 88, 300
WIDTH, BAR, GAP = 760, 72, 28
# If the highest bar is lower than this fraction of the usable memory, the axis ends above the bars instead.
FAR = 0.1


def plan_artifacts(exp: ExperimentConfig) -> dict[str, str]:
    """Return the plan's artifacts: path in the run's artifacts -> text."""
    plan = make_plan(exp, asked_layout(exp), layers_of(exp.model, exp.data.seq_len, exp.lora))
    return {"plan/memory.svg": graph(exp, plan), "plan/plan.txt": report(exp) + "\n"}


def graph(exp: ExperimentConfig, plan: Plan) -> str:
    """Draw the memory of one rank of each stage as stacked bars, with a line at the usable memory.

    Args:
        exp: provides the model's name and the cluster.
        plan: what to draw.

    Returns:
        A self-contained SVG picture.
    """
    usable = USABLE * exp.cluster.memory_bytes / GB
    fullest = max(m.total for m in plan.memory) / GB
    top = _ceiling(max(usable, fullest) if fullest > FAR * usable else fullest)
    body = [*_head(exp, plan), *_axis(top), *_bars(plan, top), *_limit(usable, top), *_labels(plan, top)]
    size = f'width="{LEFT + WIDTH + 32}" height="{TOP + HEIGHT + 64}"'
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    return "\n".join([*lines, *body, "</svg>\n"])


def _head(exp: ExperimentConfig, plan: Plan) -> Iterator[str]:
    yield _text(
        LEFT, 26, f"Memory of one rank by pipeline stage: {exp.model.version} on {exp.cluster.gpu}", 'font-size="17"'
    )
    yield _text(LEFT, 46, f"{describe(plan.layout)}, micro batches of {plan.layout.micro_batch_seqs}", 'fill="#555"')
    for i, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + 112 * i
        yield f'<rect x="{x}" y="59" width="12" height="12" fill="{colour}"/>' + _text(x + 18, 70, name)


def _axis(top: float) -> Iterator[str]:
    step = _step(top)
    for i in range(round(top / step) + 1):
        y = _y(i * step, top)
        yield f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(LEFT - 8, y + 4, f"{i * step:,.6g}", 'text-anchor="end"')
    middle = TOP + HEIGHT / 2
    yield _text(22, middle, "GB", f'{CENTRED} transform="rotate(-90 22 {middle})"')
    yield _text(LEFT + WIDTH / 2, TOP + HEIGHT + 48, "stage", CENTRED)


def _bars(plan: Plan, top: float) -> Iterator[str]:
    for i, memory in enumerate(plan.memory):
        middle, width = _place(i, len(plan.memory))
        below = 0.0
        for name, colour in COLOURS.items():
            size = getattr(memory, name) / GB
            y, height = _y(below + size, top), size / top * HEIGHT
            title = f"<title>stage {i}, {name}: {size:,.2f} GB of {memory.total / GB:,.2f}</title>"
            box = f'x="{middle - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
            yield f'<rect {box} fill="{colour}">{title}</rect>'
            below += size


def _limit(usable: float, top: float) -> Iterator[str]:
    if usable <= top:
        y = _y(usable, top)
        yield f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{LIMIT}" stroke-width="2"/>'
    x = LEFT + 112 * len(COLOURS)
    yield f'<line x1="{x}" x2="{x + 20}" y1="65" y2="65" stroke="{LIMIT}" stroke-width="2"/>'
    yield _text(x + 26, 70, f"usable, {usable:,.4g} GB" + (", far above" if usable > top else ""))


def _labels(plan: Plan, top: float) -> Iterator[str]:
    """Write each stage's number below its bar and its sum above it, if there is room."""
    n = len(plan.memory)
    named = math.ceil(24 * n / WIDTH)
    for i, memory in enumerate(plan.memory):
        middle, width = _place(i, n)
        if i % named == 0:
            yield _text(middle, TOP + HEIGHT + 20, str(i), CENTRED)
        if width > 32:
            halo = 'font-weight="bold" stroke="#fff" stroke-width="4" paint-order="stroke"'
            total = memory.total / GB
            yield _text(middle, _y(total, top) - 6, f"{total:,.3g}", f"{CENTRED} {halo}")


def _place(stage: int, n: int) -> tuple[float, float]:
    """Return the centre and the width of a bar."""
    pitch = min(BAR + GAP, WIDTH / n)
    return LEFT + WIDTH / 2 + (stage + 0.5 - n / 2) * pitch, pitch * BAR / (BAR + GAP)


def _y(size: float, top: float) -> float:
    return TOP + HEIGHT * (1 - size / top)


def _step(most: float) -> float:
    """Return a round step, 1, 2 or 5 times a power of ten, for four to nine lines on the axis."""
    unit = 10.0 ** math.floor(math.log10(most / 4))
    return next(n * unit for n in (5, 2, 1) if most / (n * unit) >= 4)


def _ceiling(most: float) -> float:
    """Return the round end of an axis, with room for a label above the highest bar."""
    step = _step(most)
    return step * math.ceil(most * 1.08 / step)


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'
