"""The picture of a plan's memory, read back as a picture is seen: by the heights of its parts."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from deepseek_exp import planner
from deepseek_exp.planner.graph import HEIGHT, LEFT, TOP, WIDTH, graph
from deepseek_exp.planner.report import MEMORY
from tests.planner.plan_parts import experiment, layout, planned

EXP = experiment("model=v3_moe", "size=1b", "cluster=h100_8", "trainer.precision=bf16")
SVG = "{http://www.w3.org/2000/svg}"


def drawn(exp, how):
    plan = planned(exp, how)
    return plan, ElementTree.fromstring(graph(exp, plan))


def texts(picture) -> list[str]:
    return [e.text for e in picture.iter(f"{SVG}text")]


def bars(picture) -> list[list[ElementTree.Element]]:
    found = [e for e in picture.iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None]
    return [found[i : i + len(MEMORY)] for i in range(0, len(found), len(MEMORY))]


@pytest.mark.parametrize("pp", [1, 2, 16])
def test_heights_are_bytes(pp):
    plan, picture = drawn(EXP, layout(pp=pp, zero=1))
    stacks = bars(picture)
    assert len(stacks) == pp
    tallest = max(range(pp), key=lambda i: plan.memory[i].total)  # heights are rounded to 0.1: least so, relatively
    scale = sum(float(e.get("height")) for e in stacks[tallest]) / plan.memory[tallest].total
    for memory, stack in zip(plan.memory, stacks, strict=True):
        assert [float(e.get("height")) for e in stack] == pytest.approx(
            [getattr(memory, name) * scale for name in MEMORY],
            abs=0.3,  # five roundings to 0.1 are in the scale
        )
        ends = [TOP + HEIGHT] + [float(e.get("y")) for e in stack]
        assert [a - b for a, b in itertools.pairwise(ends)] == pytest.approx(
            [float(e.get("height")) for e in stack], abs=0.2
        )  # each stands on the one before


@pytest.mark.parametrize("pp", [1, 5, 16])
def test_all_is_inside_and_named(pp):
    _, picture = drawn(EXP, layout(pp=pp, zero=1))
    for stack in bars(picture):
        for e in stack:
            assert float(e.get("x")) >= LEFT
            assert float(e.get("x")) + float(e.get("width")) <= LEFT + WIDTH
            assert float(e.get("y")) >= TOP
    assert {*MEMORY, "GB", "stage", "0", str(pp - 1)} <= set(texts(picture))


def test_the_usable_line_is_where_its_number_is():
    plan, picture = drawn(EXP, layout())
    assert "usable, 73.6 GB" in texts(picture)
    line = next(e for e in picture.iter(f"{SVG}line") if e.get("stroke-width") == "2")
    height = TOP + HEIGHT - float(line.get("y1"))
    total = sum(float(e.get("height")) for e in bars(picture)[0])
    assert height / total == pytest.approx(73.6e9 / plan.memory[0].total, rel=0.01)


def test_low_bars_are_seen():
    _, picture = drawn(experiment("size=tiny"), layout())
    assert sum(float(e.get("height")) for e in bars(picture)[0]) > HEIGHT / 2
    assert "usable, 1.84 GB, far above" in texts(picture)


def test_the_artifacts_are_the_picture_and_the_text():
    exp = experiment("parallel=3d")
    files = planner.plan_artifacts(exp)
    assert list(files) == ["plan/memory.svg", "plan/plan.txt"]
    assert files["plan/memory.svg"] == graph(exp, planned(exp, layout(2, 2, 2, 1, zero=1)))
    assert files["plan/plan.txt"] == planner.report(exp) + "\n"
