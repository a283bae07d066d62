"""Who may import whom: imports point down only, and there are no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.runs import ROOT

PACKAGE = "deepseek_exp"
# a room is a package or file at the top; a module that is listed has its own layer
LAYER = {
    "errors": 0, "redact": 0, "disk": 0, "console": 0, "config": 0,
    "huggingface": 1, "kernels": 1, "planner": 1, "data": 1, "tracking": 1, "checkpoint": 1, "launch": 1,
    "experiment": 2, "models": 2,
    "adapt": 3, "huggingface.weights": 3, "huggingface.export": 3, "huggingface.adapters": 3,
    "inference": 4,
    "parallel": 5, "finetune": 5, "evaluate": 5,
    "train": 6,
    "commands": 7,
    "run": 8,
}  # fmt: skip
# layers whose rooms never import each other
APART = {1, 3, 5}
# rooms that answer at once: they import neither torch nor MLflow, nor anything that does
LIGHT = {
    *("errors", "redact", "disk", "console", "config", "planner", "experiment", "launch", "huggingface"),
    *("checkpoint.manifest", "checkpoint.migrations", "checkpoint.saved_config", "tracking.rundir", "tracking.uri"),
}
HEAVY = {"torch", "pytorch_lightning", "mlflow", "deepspeed", "transformers", "tokenizers", "numpy"}


def module_of(path: Path) -> str:
    """Return a file's dotted name within the package."""
    if path == ROOT / "run.py":
        return "run"
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_of(path): path
    for path in [ROOT / "run.py", *(ROOT / PACKAGE).rglob("*.py")]
    if path != ROOT / PACKAGE / "__init__.py"
}


def imports(module: str, *, lazy: bool = True) -> set[str]:
    """Return the modules that one imports: ours within the package, others by their full name.

    Args:
        module: dotted name within the package.
        lazy: include imports inside of functions and those for type checkers.
    """
    tree = ast.parse(MODULES[module].read_text())
    found = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = {f"{base}.{alias.name}".removeprefix(f"{PACKAGE}.") for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return {name.removeprefix(f"{PACKAGE}.") for name in found}


def room(module: str) -> str:
    """Return what of `LAYER` a module belongs to."""
    return module if module in LAYER else module.split(".")[0]


def test_imports_point_down():
    wrong = []
    for module in MODULES:
        here = room(module)
        for name in sorted(imports(module) & set(MODULES)):
            there = room(name)
            level = LAYER[there] - LAYER[here]
            if here.split(".")[0] != there.split(".")[0] and (level > 0 or (level == 0 and LAYER[here] in APART)):
                wrong.append(f"{module} (layer {LAYER[here]}) imports {name} (layer {LAYER[there]})")
            if here != there and here.split(".")[0] == there.split(".")[0] and level > 0:
                wrong.append(f"{module} imports {name}, which is above it")
    assert wrong == []


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Return what lies on a cycle, after all that does not was taken away."""
    graph = {node: others & set(graph) - {node} for node, others in graph.items()}
    while True:
        ends = {node for node, others in graph.items() if not others}
        if not ends:
            break
        graph = {node: others - ends for node, others in graph.items() if node not in ends}
    reached = set().union(*graph.values())
    while True:  # and from the other side
        graph = {node: others for node, others in graph.items() if node in reached}
        if (rest := set().union(*graph.values())) == reached:
            return sorted(f"{node} -> {', '.join(sorted(others & reached))}" for node, others in graph.items())
        reached = rest


def test_no_cycle_of_modules():
    # a package's door imports its rooms, which may import the package by name
    assert cycles({module: imports(module) for module in MODULES}) == []


def test_no_cycle_of_rooms():
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        graph.setdefault(room(module), set()).update(room(name) for name in imports(module) & set(MODULES))
    assert cycles(graph) == []


def test_a_cycle_is_seen():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set(), "e": {"a"}}
    assert cycles(graph) == ["b -> c", "c -> b"]


def test_light_rooms_import_nothing_heavy():
    wrong = []
    for module in MODULES:
        if module in LIGHT or (room(module) in LIGHT and room(module) == module.split(".")[0]):
            for name in sorted(imports(module, lazy=False)):
                heavy = name.split(".")[0] in HEAVY
                ours = name in MODULES and name not in LIGHT and room(name) not in LIGHT
                if heavy or ours:
                    wrong.append(f"{module} imports {name}")
    assert wrong == []
